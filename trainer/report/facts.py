"""What was run: the first table of the page, the configuration, the environment.

Owns: which facts are told, and which keys of the recipe count as a difference between runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from trainer.metrics.progress import duration
from trainer.report.compared import Compared
from trainer.report.markup import Child, Markup, join, tag
from trainer.report.run_files import RunFiles
from trainer.report.scale import score

WHERE = ("name", "output")
"""Keys that differ between any two runs."""


def overview(compared: Compared) -> Markup:
    """State, time and outcome of every run."""
    facts: list[tuple[str, Callable[[RunFiles], Child]]] = [
        ("state", lambda run: tag("span", run.state, class_=f"state {run.state.split()[0]}")),
        ("windows", lambda run: f"{run.last_step:,} of {run.recipe.training.steps:,}"),
        ("tasks", lambda run: f"{len(run.tasks):,}"),
        ("mean dev metric", _mean),
        ("first line of the log", lambda run: _date(run.times[0]) if run.times else None),
        ("last line of the log", lambda run: _date(run.times[-1]) if run.times else None),
        ("time in training windows", lambda run: duration(run.seconds) if run.seconds else None),
        ("time from first to last line", lambda run: duration(run.times[-1] - run.times[0]) if run.times else None),
        ("tokens trained on", lambda run: f"{run.tokens:,.0f}" if run.tokens else None),
        ("device", _device),
        ("ranks", lambda run: run.checkpoint.get("world_size")),
        ("directory", lambda run: str(run.path.absolute())),
    ]
    return _facts(compared, facts)


def environment(compared: Compared) -> Markup:
    """The machine and the versions, as far as the directory of a run knows them."""
    facts: list[tuple[str, Callable[[RunFiles], Child]]] = [
        ("device", _device),
        ("ranks", lambda run: run.checkpoint.get("world_size")),
        ("ZeRO stage", lambda run: run.checkpoint.get("zero_stage")),
        ("precision", lambda run: run.recipe.training.precision),
        ("peak memory of the first GPU, GiB", lambda run: _peak(run, "memory/gpu_peak_gib")),
        ("peak memory of the first process, GiB", lambda run: _peak(run, "memory/host_gib")),
        ("commit of sett", lambda run: run.environment.get("commit")),
        ("python", lambda run: run.environment.get("python")),
        *((name, partial(_package, name)) for name in ("sett", "torch", "deepspeed", "transformers")),
    ]
    return _facts(compared, facts)


def configuration(compared: Compared) -> Markup:
    """The whole recipe of every run, defaults filled in; first the keys in which the runs differ."""
    runs = [_flat(run.recipe.model_dump(mode="json")) for run in compared.runs]
    chosen = set().union(*(_flat(run.recipe.model_dump(mode="json", exclude_unset=True)) for run in compared.runs))
    keys = list(dict.fromkeys(key for values in runs for key in values))
    differ = [k for k in keys if k not in WHERE and any(values.get(k) != runs[0].get(k) for values in runs)]
    parts: list[Child] = []
    if compared.several:
        said = "Keys in which the runs differ:" if differ else "The recipes agree in every key."
        parts.append(tag("p", said, class_="note"))
        parts += [_recipe_table(compared, runs, differ, chosen)] if differ else []
    title = "The whole recipe, defaults filled in (bold: set by the recipe, not a default)"
    whole = tag("details", tag("summary", title), _recipe_table(compared, runs, keys, chosen))
    return join(*parts, whole)


def _recipe_table(compared: Compared, runs: list[dict[str, str]], keys: list[str], chosen: set[str]) -> Markup:
    rows = []
    for key in keys:
        values = [tag("td", run.get(key, "-")) for run in runs]
        rows.append(
            tag("tr", tag("th", key, scope="row"), *values, class_="set" if key in chosen else "default", data_key=key)
        )
    return tag("div", tag("table", _head(compared), tag("tbody", *rows), class_="facts recipe"), class_="wide")


def _facts(compared: Compared, facts: list[tuple[str, Callable[[RunFiles], Child]]]) -> Markup:
    """A line for each fact that is known of a run."""
    rows = []
    for name, tell in facts:
        told = [tell(run) for run in compared.runs]
        if any(value is not None for value in told):
            cells = [tag("td", "-" if value is None else value) for value in told]
            rows.append(tag("tr", tag("th", name, scope="row"), *cells))
    # The facts of a single run are short lines: half of them beside the other half.
    halves = [rows] if compared.several else [rows[: (len(rows) + 1) // 2], rows[(len(rows) + 1) // 2 :]]
    tables = [tag("table", _head(compared), tag("tbody", *half), class_="facts") for half in halves]
    return tag("div", *(tag("div", table, class_="wide") for table in tables), class_="pair")


def _head(compared: Compared) -> Markup | None:
    if not compared.several:
        return None
    names = [
        tag("th", label, class_=f"run {style}") for label, style in zip(compared.labels, compared.styles, strict=True)
    ]
    return tag("thead", tag("tr", tag("td"), *names))


def _mean(run: RunFiles) -> str | None:
    steps, values = run.series("eval/mean")
    if not len(steps):
        return None
    shown = [score(float(value), percent=True) for value in (values[0], values[-1])]
    if len(steps) == 1:
        return f"{shown[0]} % at window {int(steps[0]):,}"
    best = int(values.argmax())
    return f"{shown[0]} → {shown[1]} % (best {score(float(values[best]), True)} % at window {int(steps[best]):,})"


def _device(run: RunFiles) -> str:
    kind = "GPU" if len(run.series("memory/gpu_peak_gib").steps) else "CPU"
    return str(run.environment.get("device") or kind)


def _package(name: str, run: RunFiles) -> str | None:
    found = run.environment.get("packages", {}).get(name)
    return None if found is None else str(found)


def _peak(run: RunFiles, key: str) -> str | None:
    values = run.series(key).values
    return f"{values.max():.2f}" if len(values) else None


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """`section.key` -> the value as YAML would have it on one line."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
