"""What is read of run directories, whole and damaged."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from report.small import TASKS, append, mark, write_run

from trainer.errors import RunError
from trainer.report import write_report
from trainer.report.compared import Compared
from trainer.report.run_files import QUIET_SECONDS, by_family, read_run
from trainer.report.sampling import drawn_shares, planned_shares


def with_times(run: Path, times: list[float]) -> Path:
    """The log replaced by lines written at `times`."""
    (run / "metrics.jsonl").write_text("")
    append(run, [{"step": n, "time": t, "train/loss": 1.0} for n, t in enumerate(times, start=1)])
    return run


def test_times_and_tokens_are_sums_over_windows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    (run / "metrics.jsonl").write_text("")
    append(
        run, [{"step": n, "train/seconds_per_window": 2.0, "train/tokens_per_second": 10.0 * n} for n in (5, 10, 12)]
    )
    files = read_run(run)
    assert files.seconds == 24.0
    assert files.tokens == 2 * (5 * 50 + 5 * 100 + 2 * 120)


@pytest.mark.parametrize(
    ("ages", "state"),
    [
        ([60.0, 0.0], "running"),
        ([QUIET_SECONDS + 100, QUIET_SECONDS + 60], "stopped"),
        ([4 * QUIET_SECONDS, 2 * QUIET_SECONDS], "running"),  # its lines are that far apart
        ([], "not started"),
    ],
)
def test_the_state_of_an_unfinished_run(tmp_path: Path, ages: list[float], state: str) -> None:
    run = with_times(write_run(tmp_path / "run", finished=False), [time.time() - age for age in ages])
    assert read_run(run).state == state
    mark(run, 2, finished=False)
    assert read_run(run).state == state
    mark(run, 40, finished=True)
    assert read_run(run).state == "finished"


def test_after_is_what_the_run_chose(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["tasks"][0]["after"] = 0.125
    (run / "results.json").write_text(json.dumps(results))
    chosen = read_run(run).scores["topic"]
    assert chosen.after == 0.125
    (run / "results.json").unlink()
    last = read_run(run).scores["topic"]
    assert last.after == last.series.values[-1] != 0.125


def test_only_one_evaluation_is_a_before_and_no_after(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5, finished=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    found = read_run(run).scores["topic"]
    assert found.before is not None
    assert found.after is found.best is None


def test_families_come_from_results_cards_or_another_run(tmp_path: Path) -> None:
    finished, running = write_run(tmp_path / "a"), write_run(tmp_path / "b", finished=False)
    expected = {"classification": ["mood", "topic"], "regression": ["score"], "masked_lm": ["text"]}
    assert by_family([read_run(finished)]) == by_family([read_run(running), read_run(finished)]) == expected
    assert by_family([read_run(running)]) == {"other": sorted(TASKS)}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    named = [{"name": "mood", "family": "classification", "num_labels": 2, "train": str(rows)}]
    declared = write_run(tmp_path / "c", finished=False)
    recipe = yaml.safe_load((declared / "recipe.yaml").read_text())
    (declared / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "tasks": named}))
    assert by_family([read_run(declared)])["classification"] == ["mood"]


def test_planned_shares_need_sizes_only_where_the_rule_does(tmp_path: Path) -> None:
    by_size = read_run(write_run(tmp_path / "a", finished=False))
    assert planned_shares(by_size) == {}
    equal = read_run(write_run(tmp_path / "b", finished=False, sampling={"rule": "equal"}))
    assert planned_shares(equal) == dict.fromkeys(TASKS, 0.25)
    rates = {"topic": 2, "mood": 1, "score": 1, "text": 0}
    fixed = read_run(write_run(tmp_path / "c", finished=False, sampling={"rule": "fixed", "rates": rates}))
    assert planned_shares(fixed) == {"topic": 0.5, "mood": 0.25, "score": 0.25, "text": 0.0}


def test_drawn_shares_count_windows_not_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    (run / "metrics.jsonl").write_text("")
    append(run, [{"step": 10, "share/topic": 0.5}, {"step": 12, "share/topic": 0.2}])
    assert drawn_shares(read_run(run)) == {"topic": pytest.approx((10 * 0.5 + 2 * 0.2) / 12)}


def test_names_that_are_the_same_become_paths(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run"), write_run(tmp_path / "other")]
    assert Compared([read_run(path) for path in paths]).labels == [str(paths[0]), str(paths[1]), "other"]


def test_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    whole = read_run(run).last_step
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "train/lo')
    assert read_run(run).last_step == whole == 40


def test_no_run_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"gone: no such directory; give the directory of a run"):
        read_run(tmp_path / "gone")
    with pytest.raises(RunError, match=r"not a run directory \(no recipe.yaml in it\); `sett train RECIPE` makes one"):
        read_run(tmp_path)
    write_run(tmp_path / "stages" / "one")
    with pytest.raises(RunError, match=r"it holds some; name those you want: .*stages/one"):
        read_run(tmp_path / "stages")
    (tmp_path / "stages" / "one" / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"metrics.jsonl: no such file"):
        read_run(tmp_path / "stages" / "one")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "{", "results.json: damaged .*delete it"),
        ("results.json", '{"tasks": [{"task": "topic"}]}', "results.json: damaged .*after, family, metric, task"),
        ("results.json", "[]", "results.json: damaged .not a JSON object"),
        ("checkpoints/step-00000040/sett.json", "{", "sett.json: damaged .*delete .*step-00000040"),
        ("metrics.jsonl", "nothing\n{}\n", "metrics.jsonl:1: not a line of metrics"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(RunError, match=message):
        read_run(run)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics.jsonl: cannot be read: Is a directory"):
        read_run(run)


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"no/page.html: cannot be written \(No such file or directory\); .*--out"):
        write_report([run], tmp_path / "no" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"folder: cannot be written"):
        write_report([run], tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run"]
