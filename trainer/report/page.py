"""The page: sections in order, one file with everything in it.

Owns: the document, its style sheet and script, and where it is written. The page asks the network for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from trainer.errors import RunError
from trainer.report.compared import Compared
from trainer.report.curves import loss_curves, machine_curves, metric_curves
from trainer.report.facts import configuration, environment, overview
from trainer.report.markup import Child, Markup, join, tag
from trainer.report.run_files import read_run
from trainer.report.sampling import sampling_section
from trainer.report.scores import scores_section
from trainer.report.weights import weights_section

FILE_NAME = "report.html"


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page about one or several runs; return where.

    Args:
        runs: run directories; the first is what the others are compared with.
        out: the file to write. Default: `report.html` in the run's directory, or of several runs in the current one.

    Raises:
        RunError: a directory is no run, a file of it is damaged, or the page cannot be written.
        ConfigError: a run's recipe is damaged.
    """
    compared = Compared([read_run(path) for path in runs])
    if out is None:
        out = Path(FILE_NAME) if compared.several else runs[0] / FILE_NAME
    text = render(compared)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from error
    return out


def render(compared: Compared) -> str:
    """The page as text."""
    sections = [
        ("runs", "Runs" if compared.several else "Run", overview(compared)),
        ("metrics", "Metrics", scores_section(compared)),
        ("metric-curves", "Dev metrics over time", metric_curves(compared)),
        ("loss", "Training loss", loss_curves(compared)),
        ("weights", "Learned weights", weights_section(compared)),
        ("sampling", "Sampling", sampling_section(compared)),
        ("throughput", "Throughput and optimizer", machine_curves(compared)),
        ("configuration", "Configuration", configuration(compared)),
        ("environment", "Environment", environment(compared)),
    ]
    shown = [(anchor, title, content) for anchor, title, content in sections if content is not None]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in shown]
    body = [tag("section", tag("h2", title), content, id=anchor) for anchor, title, content in shown]
    names = ", ".join(compared.labels)
    made = f"made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by sett report"
    head = tag("header", tag("h1", names), tag("p", made, class_="note"))
    navigation = tag("nav", *_chips(compared), tag("span", *links, class_="links"))
    return "<!DOCTYPE html>\n" + tag(
        "html", _head(names), tag("body", head, navigation, tag("main", *body), _script()), lang="en"
    )


def _chips(compared: Compared) -> list[Child]:
    """The legend of the whole page, always in sight; a click hides a run."""
    if not compared.several:
        return []
    return [
        tag("button", label, class_=f"key {style}", data_run=f"run{index}", type="button", title="show or hide")
        for index, (label, style, _) in enumerate(compared.each())
    ]


def _head(title: str) -> Markup:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: sett report"),
        tag("style", _asset("page.css")),
    )


def _script() -> Markup:
    return join(tag("script", _asset("page.js")))


def _asset(name: str) -> Markup:
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))
