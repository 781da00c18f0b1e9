"""The page as a browser would read it: everything there, nothing injected, nothing fetched."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report.small import MANY, TASKS, append, write_run

from trainer.metrics.log import read_metrics
from trainer.report import write_report

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Elements with their attributes, and whether every one is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def page_of(*runs: Path, out: Path | None = None) -> str:
    text = write_report(runs, out or runs[0].parent / "page.html").read_text(encoding="utf-8")
    Page(text)
    return text


def section(text: str, anchor: str) -> ElementTree.Element:
    """A section of the page; it is well-formed, or this fails."""
    found = re.search(rf'<section id="{anchor}">.*?</section>', text, re.DOTALL)
    assert found is not None
    return ElementTree.fromstring(found[0])


def charts(text: str, anchor: str) -> dict[str, ElementTree.Element]:
    """Task -> its figure in a section."""
    return {f.attrib["data-task"]: f for f in section(text, anchor).iter("figure") if "data-task" in f.attrib}


def rows(text: str, anchor: str) -> dict[str, list[ElementTree.Element]]:
    """Task -> the cells of its line in a section's table."""
    return {r.attrib["data-task"]: list(r) for r in section(text, anchor).iter("tr") if "data-task" in r.attrib}


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run, one with weights and another learning rate, and their page."""
    folder = tmp_path_factory.mktemp("two")
    first = write_run(folder / "plain")
    second = write_run(folder / "meta", seed=1, steps=30, meta=True, optimizer={"lr": 1e-3})
    return first, second, page_of(first, second)


@pytest.mark.parametrize("anchor", ["metric-curves", "loss", "weights"])
def test_every_task_has_a_chart_with_a_line_for_each_run(two: tuple[Path, Path, str], anchor: str) -> None:
    found = charts(two[2], anchor)
    assert set(found) == set(TASKS)
    runs = 1 if anchor == "weights" else 2
    for figure in found.values():
        lines = [path.attrib["d"] for path in figure.iter("path") if path.attrib["class"] == "line"]
        assert len(lines) == runs
        assert all(re.fullmatch(r"M[-\d.]+,[-\d.]+(L[-\d.]+,[-\d.]+)+", line) for line in lines)


def test_lines_are_where_the_numbers_are(two: tuple[Path, Path, str]) -> None:
    """Dots of a metric: one for each evaluation, evenly spaced, higher where the number is higher."""
    run = two[0]
    log = [r["eval/topic/accuracy"] for r in read_metrics(run / "metrics.jsonl") if "eval/topic/accuracy" in r]
    group = charts(two[2], "metric-curves")["topic"].find(".//g[@class='run0 c0']")
    assert group is not None
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"]), words(c)) for c in group.iter("circle")]
    assert len(dots) == len(log) == 5
    gaps = [b[0] - a[0] for a, b in pairwise(dots)]
    assert max(gaps) - min(gaps) < 0.3
    slope = (dots[-1][1] - dots[0][1]) / (log[-1] - log[0])
    assert slope < 0
    for (_, y, hover), value, window in zip(dots, log, range(0, 50, 10), strict=True):
        assert y == pytest.approx(dots[0][1] + slope * (value - log[0]), abs=0.2)
        assert hover == f"plain, window {window}: {100 * value:.4g}"


@pytest.mark.parametrize("anchor", ["metric-curves", "loss", "weights", "throughput"])
def test_no_line_leaves_its_frame(two: tuple[Path, Path, str], anchor: str) -> None:
    found = [svg for svg in section(two[2], anchor).iter("svg") if "chart" in svg.attrib.get("class", "")]
    assert found
    for svg in found:
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for path in (p for p in svg.iter("path") if p.attrib["class"] == "line"):
            points = [tuple(map(float, pair.split(","))) for pair in path.attrib["d"][1:].split("L")]
            assert all(0 <= x <= width and 0 <= y <= height - 15 for x, y in points)


def test_the_table_has_the_numbers_of_the_log(two: tuple[Path, Path, str]) -> None:
    found = rows(two[2], "metrics")
    assert set(found) == set(TASKS)
    for name, (family, metric) in TASKS.items():
        cells = found[name]
        assert [words(cell) for cell in cells[:3]] == [name, family, metric]
        numbers = [None if (v := cell.attrib.get("data-v")) is None else float(v) for cell in cells[3:]]
        expected: list[float | None] = [50, None if metric == "perplexity" else 0.25]
        after = []
        for run in two[:2]:
            values = [
                r[f"eval/{name}/{metric}"] for r in read_metrics(run / "metrics.jsonl") if f"eval/{name}/{metric}" in r
            ]
            best = min(values[1:]) if metric == "perplexity" else max(values[1:])
            expected += [values[0], values[-1], values[-1] - values[0], best]
            after.append(values[-1])
        assert numbers == pytest.approx([*expected, after[1] - after[0]])
        if metric != "perplexity":
            assert words(cells[6]) == f"{100 * after[0]:.1f}"
        change = cells[7].attrib["class"]
        assert ("better" in change) == ((numbers[4] or 0) < 0 if metric == "perplexity" else (numbers[4] or 0) > 0)


def test_means_leave_perplexities_out(two: tuple[Path, Path, str]) -> None:
    results = json.loads((two[0] / "results.json").read_text())
    foot = section(two[2], "metrics").find(".//tfoot/tr")
    assert foot is not None
    cells = list(foot)
    assert words(cells[1]) == "4"
    assert float(cells[2].attrib["data-v"]) == pytest.approx(results["mean"]["before"])
    assert float(cells[3].attrib["data-v"]) == pytest.approx(results["mean"]["after"])


def test_it_asks_the_network_for_nothing(two: tuple[Path, Path, str]) -> None:
    text = two[2]
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in text
    page = Page(text)
    assert page.count("script") == page.count("style") == 1
    assert not [tag for tag, attributes in page.elements if "src" in attributes or tag in ("link", "img", "iframe")]
    assert all((a["href"] or "").startswith("#") for _, a in page.elements if "href" in a)


def test_links_of_the_page_lead_somewhere(two: tuple[Path, Path, str]) -> None:
    page = Page(two[2])
    anchors = {a["id"] for _, a in page.elements if "id" in a}
    assert {(a["href"] or "")[1:] for _, a in page.elements if "href" in a} == anchors
    assert len(anchors) == 9


def test_configuration_names_what_differs_first(two: tuple[Path, Path, str]) -> None:
    tables = list(section(two[2], "configuration").iter("table"))
    differ = {r.attrib["data-key"]: [words(c) for c in r][1:] for r in tables[0].iter("tr") if "data-key" in r.attrib}
    assert differ.pop("optimizer.lr") == ["5e-05", "0.001"]
    assert differ.pop("training.steps") == ["40", "30"]
    assert differ.pop("meta.end_task") == ["-", "topic"]
    assert all(key.startswith("meta") for key in differ)
    whole = {r.attrib["data-key"]: r.attrib["class"] for r in tables[1].iter("tr") if "data-key" in r.attrib}
    assert whole["window.tokens"] == "default"
    assert whole["optimizer.lr"] == whole["name"] == "set"


def test_shares_are_the_means_of_the_log(two: tuple[Path, Path, str]) -> None:
    records = read_metrics(two[0] / "metrics.jsonl")
    for name, cells in rows(two[2], "sampling").items():
        drawn = [r[f"share/{name}"] for r in records if f"share/{name}" in r]
        assert float(cells[2].attrib["data-v"]) == pytest.approx(0.25)  # by size, and all have 900 rows
        assert float(cells[3].attrib["data-v"]) == pytest.approx(sum(drawn) / len(drawn))
        bar = cells[-1].find(".//rect")
        assert bar is not None
        assert float(bar.attrib["width"]) > 0


def test_alignments_have_bands(two: tuple[Path, Path, str]) -> None:
    bands = [p for p in section(two[2], "weights").iter("path") if p.attrib["class"] == "band"]
    assert len(bands) == len(TASKS)
    assert all(p.attrib["d"].endswith("Z") for p in bands)


def test_a_name_cannot_become_markup(tmp_path: Path) -> None:
    hostile = '<script>alert("1")</script>&\x00\ud800'
    run = write_run(tmp_path / "run", {"a": ("classification", "accuracy"), hostile: ("classification", "<b>")})
    text = page_of(run)
    assert Page(text).count("script") == 1
    assert "alert" not in re.sub(r"&lt;script&gt;alert\(&quot;1&quot;\)&lt;/script&gt;&amp;\ufffd\ufffd", "", text)
    shown = '<script>alert("1")</script>&\ufffd\ufffd'
    assert set(charts(text, "metric-curves")) == {"a", shown}
    assert words(rows(text, "metrics")[shown][2]) == "<b>"


@pytest.mark.parametrize("tasks", [MANY, {"topic": TASKS["topic"]}], ids=["many", "one"])
def test_any_number_of_tasks(tmp_path: Path, tasks: dict[str, tuple[str, str]]) -> None:
    text = page_of(write_run(tmp_path / "run", tasks, steps=500, every=50))
    assert set(charts(text, "loss")) == set(charts(text, "metric-curves")) == set(rows(text, "metrics")) == set(tasks)
    assert len(text) < 60_000 + 400_000 + 14_000 * len(tasks)
    for path in section(text, "loss").iter("path"):
        assert path.attrib["d"].count(",") <= 400


def test_a_run_without_evaluations(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run", evaluated=False, finished=False))
    assert "No evaluation in the log yet." in words(section(text, "metrics"))
    assert set(charts(text, "loss")) == set(TASKS)
    assert not charts(text, "metric-curves")


def test_a_run_that_has_logged_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", evaluated=False, finished=False)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    text = page_of(tmp_path / "run")
    assert "not started" in words(section(text, "runs"))
    assert "No training step in the log yet." in words(section(text, "loss"))


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    before = page_of(run)
    append(run, [{"step": 40, "train/loss": None}, {"step": 40, "train/loss": "high", "train/loss/mood": [1]}])
    append(run, [{"step": 40, "eval/mood/macro_f1": float("nan"), "train/loss/topic": float("inf")}])
    after = page_of(run)
    for anchor in ("metrics", "metric-curves", "loss"):
        assert ElementTree.tostring(section(after, anchor)) == ElementTree.tostring(section(before, anchor))


def test_the_environment_is_what_the_run_wrote(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one")
    found = {"device": "a fast one", "commit": "abc1234", "python": "3.11.9", "packages": {"torch": "2.99.1"}}
    (run / "environment.json").write_text(json.dumps(found))
    facts = words(section(page_of(run), "environment"))
    for value in ("a fast one", "abc1234", "3.11.9", "2.99.1"):
        assert value in facts
    assert "deepspeed" not in facts
