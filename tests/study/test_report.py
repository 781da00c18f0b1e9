"""The report: what a run's files come to, which runs count where, and the files, also for a half-finished study."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from study.stub import stub_runs

from trainer.errors import RunError
from trainer.metrics.table import TaskResult, write_results
from trainer.study import picture
from trainer.study.grid import Run
from trainer.study.report import terminal_table, to_markdown, write_report
from trainer.study.result import (
    PROVENANCE,
    TEST,
    Action,
    Result,
    next_action,
    peak_memory,
    read_result,
    store_provenance,
    store_test,
    training_seconds,
)
from trainer.study.schema import Study
from trainer.study.summary import summarise


def study(
    folder: Path, tasks: tuple[str, ...] = ("a", "b"), arms: tuple[str, ...] = ("base", "new"), seeds: int = 3
) -> Study:
    return Study(
        name="s",
        output=folder,
        seeds=seeds,
        baseline="base",
        tasks=dict.fromkeys(tasks),
        arms={arm: {"recipe": "r.yaml"} for arm in arms},  # type: ignore[misc]
    )


def results(of: Study, value: Callable[[str, str, int], float | None], metric: str = "accuracy") -> list[Result]:
    one = Result("", "", 0, metric, None, 0.4, 60.0, 1.5, "a CPU", "2026-01-01T00:00:00+00:00", "abc")
    return [
        replace(one, task=task, arm=arm, seed=seed, value=found)
        for seed in of.all_seeds
        for task in of.tasks
        for arm in of.arms
        if (found := value(task, arm, seed)) is not None
    ]


def finish(run: Run, after: float | None = 0.75, tasks: tuple[str, ...] = ("t", "u")) -> None:
    run.directory.mkdir(parents=True)
    rows = [TaskResult(t, "classification", "accuracy", 4, 0.5, 0.1, after if t == "t" else 0.3) for t in tasks]
    write_results(run.directory / "results.json", rows)
    lines: list[dict[str, Any]] = [
        {"step": 0, "time": 1.7e9, "eval/t/accuracy": 0.1},
        {"step": 10, "time": 1.7e9 + 9, "train/seconds_per_window": 0.5, "memory/host_gib": 2.0},
        {"step": 14, "time": 1.7e9 + 20, "train/seconds_per_window": 0.25, "memory/host_gib": 1.0},
        {"step": 14, "time": 1.7e9 + 30, "eval/t/accuracy": after},
    ]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_directory_says_what_is_left_and_what_came_out(tmp_path: Path) -> None:
    run = stub_runs(tmp_path)[0]
    assert next_action(run, "dev") is next_action(run, "test") is Action.TRAIN
    assert read_result(run, "dev") is None
    finish(run)
    assert next_action(run, "dev") is Action.NOTHING
    assert next_action(run, "test") is Action.TEST
    assert read_result(run, "test") is None
    result = read_result(run, "dev")
    assert result == Result("t", "one", 0, "accuracy", 0.75, 0.75, 6.0, 2.0, "", "2023-11-14T22:13:50+00:00", "")
    store_provenance(run.directory)
    result = read_result(run, "dev")
    assert result is not None
    assert result.device
    assert result.date > "2026"
    assert set(json.loads((run.directory / PROVENANCE).read_text())) == {"device", "date", "commit"}


def test_test_is_the_judged_tasks_line_of_the_evaluation(tmp_path: Path) -> None:
    run = stub_runs(tmp_path)[0]
    finish(run)
    marker = run.directory / "checkpoints" / "step-00000014" / "sett.json"
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"step": 14, "world_size": 1, "zero_stage": 3, "group": 1}))
    tested = TaskResult("t", "classification", "accuracy", 9, 0.5, None, 0.625)
    write_results(run.directory / "eval-test-14-t.json", [tested])
    store_test(run)
    result = read_result(run, "test")
    assert result is not None
    assert (result.value, result.dev) == (0.625, 0.75)
    assert json.loads((run.directory / TEST).read_text())["step"] == 14


def test_numbers_that_are_missing_stay_missing(tmp_path: Path) -> None:
    run, other = stub_runs(tmp_path)[:2]
    finish(run, after=None)
    result = read_result(run, "dev")
    assert result is not None
    assert result.value is None
    finish(other, tasks=("u",))
    with pytest.raises(RunError, match="has no result of the task 't'"):
        read_result(other, "dev")
    assert training_seconds([]) is peak_memory([]) is None
    assert peak_memory([{"memory/host_gib": 9.0}, {"memory/gpu_peak_gib": 3.0}]) == 3.0


def test_pairs_are_of_one_task_and_seed_and_the_mean_takes_complete_seeds(tmp_path: Path) -> None:
    of = study(tmp_path)
    gains = {"a": 0.1, "b": 0.3}

    def value(task: str, arm: str, seed: int) -> float | None:
        if (task, arm, seed) == ("b", "new", 2):
            return None
        return 0.5 + 0.01 * seed**2 + (gains[task] if arm == "new" else 0.0)

    a, b, mean = summarise(of, results(of, value)).rows
    assert (a.task, b.task, mean.task) == ("a", "b", "mean")
    assert a.cells["base"].test is None
    for row, pairs, gain in ((a, 3, 0.1), (b, 2, 0.3), (mean, 4, 0.2)):
        test = row.cells["new"].test
        assert test is not None
        assert (test.pairs, test.difference, test.p) == (pairs, pytest.approx(gain), 2 / 2**pairs)
    assert len(mean.cells["base"].values) == 3
    assert mean.cells["new"].values == pytest.approx([0.7, 0.71])


def test_perplexity_is_no_percent_and_not_in_the_mean(tmp_path: Path) -> None:
    of = study(tmp_path)
    of_a = results(study(tmp_path, tasks=("a",)), lambda task, arm, seed: 12.5, "perplexity")
    of_b = results(study(tmp_path, tasks=("b",)), lambda task, arm, seed: 0.5)
    summary = summarise(of, of_a + of_b)
    assert [row.task for row in summary.rows] == ["a", "b"]
    text = to_markdown(of, summary)
    assert "| a | perplexity | 12.50 ± 0.00 |" in text
    assert "| b | accuracy | 50.0 ± 0.0 |" in text
    assert "perplexity as it is" in text


def test_the_table_says_how_sure_it_is(tmp_path: Path) -> None:
    def table(seeds: int) -> str:
        of = study(tmp_path, tasks=("a",), seeds=seeds)
        return to_markdown(
            of, summarise(of, results(of, lambda t, arm, seed: 0.5 + 0.02 * seed + 0.01 * (arm == "new")))
        )

    assert "| a | accuracy | 54.0 ± 3.2 | 55.0 ± 3.2 (+1.0, p = .062*, n = 5) |" in table(5)
    assert "fewer than 6 pairs" in table(5)
    assert "(+1.0, p = .031, n = 6)" in table(6)
    assert "fewer than 6 pairs" not in table(6)
    assert "sampled" not in table(14)
    assert "p < .001, n = 15" in table(15)
    assert "10,000 sampled sign flips" in table(15)
    assert "| 50.0 | 51.0 (+1.0, p = 1.000*, n = 1) |" in table(1)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_half_finished_study_has_a_report(tmp_path: Path) -> None:
    of = study(tmp_path / "out", tasks=("t",), arms=("base", "new"), seeds=2)
    runs = stub_runs(tmp_path, arms=("base", "new"))
    summary = write_report(of, runs)
    assert summary.results == []
    assert "| t | | - | - |" in (of.directory / "RESULTS.md").read_text()
    assert sorted(p.name for p in of.directory.iterdir()) == ["RESULTS.md", "results.csv", "summary.csv"]
    for run, after in zip(runs[:3], (0.5, 0.75, 0.25), strict=True):
        finish(run, after)
    write_report(of, runs)
    text = (of.directory / "RESULTS.md").read_text()
    assert "| t | accuracy | 37.5 ± 17.7 | 75.0 (+25.0, p = 1.000*, n = 1) |" in text
    assert "| runs finished | | 2 of 2 | 1 of 2 |" in text
    assert "| training time of a run | | 0:00:06 | 0:00:06 |" in text
    assert "| peak memory | GiB | 2.00 | 2.00 |" in text
    lines = read_csv(of.directory / "results.csv")
    assert [(r["arm"], r["seed"], r["value"]) for r in lines] == [
        ("base", "0", "0.5"),
        ("new", "0", "0.75"),
        ("base", "1", "0.25"),
    ]
    base, new = read_csv(of.directory / "summary.csv")
    assert (base["seeds"], base["mean"], base["p"]) == ("2", "0.375", "")
    assert (new["seeds"], new["difference"], new["std"], new["pairs"]) == ("1", "0.25", "", "1")
    console = Console(width=80, record=True)
    console.print(terminal_table(of, summarise(of, [])))
    assert "runs finished" in console.export_text()


def drawn(figure: Figure) -> list[Text]:
    """Texts that can be seen; an axis also has labels of ticks beyond its ends."""
    (part,) = figure.subfigs
    found = [*part.texts, *part.legends[0].get_texts()]
    for axes in part.axes:
        low, high = axes.get_xlim()
        ticks = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        titles = [child for child in axes.get_children() if isinstance(child, Text)]
        found += [*titles, *axes.get_yticklabels(), *ticks]
    return [text for text in found if text.get_text().strip()]


@pytest.mark.parametrize(("tasks", "arms", "seeds"), [(1, 2, 1), (2, 2, 5), (8, 5, 5), (3, 12, 2)])
def test_no_text_of_the_picture_overlaps_another(
    tmp_path: Path, tasks: int, arms: int, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(picture, "FigureCanvasAgg", lambda figure: figures.append(figure) or FigureCanvasAgg(figure))
    names = ("base", *(f"an-arm-with-quite-a-long-name-{i}" for i in range(arms - 1)))
    of = study(tmp_path, tuple(f"a_task_with_a_long_name_{i}" for i in range(tasks)), names, seeds)
    found = results(of, lambda task, arm, seed: None if arm == names[-1] else 0.7 + 0.0123 * seed + 0.001 * len(task))
    picture.draw_study(of, summarise(of, found), tmp_path / "out.png")
    width, height = struct.unpack(">II", (tmp_path / "out.png").read_bytes()[16:24])
    assert width < 4000
    assert height < 4000
    (figure,) = figures
    boxes = [(t.get_text(), t.get_window_extent().padded(-0.5)) for t in drawn(figure)]
    assert len(boxes) > tasks + 2
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        for other, beside in boxes[:index]:
            assert not box.overlaps(beside), f"{text!r} on {other!r}"
