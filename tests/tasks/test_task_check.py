import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from trainer.tasks import check
from trainer.tasks.cards import load_tasks
from trainer.tasks.check import Overlap, check_tasks
from trainer.tasks.overlap import Keys, TrainIndex
from trainer.tasks.report import render_list
from trainer.tasks.spec import TaskSpec

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

LONG = "A sentence that is longer than 24 characters"


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tasks(folder: Path) -> list[TaskSpec]:
    def text(*texts: str) -> list[object]:
        return [{"text": text, "label": i % 2} for i, text in enumerate(texts)]

    first = TaskSpec(
        name="first",
        family="classification",
        labels=("[no]", "yes", "never"),
        train=write(folder / "a.jsonl", text("one two", "x", "one two", LONG)),
        dev=write(folder / "b.jsonl", [*text("x", "x", "new"), {"text": "", "label": 0}, {"text": "y", "label": 9}]),
    )
    pair = {"text_a": LONG.upper() + "!", "text_b": "x", "score": 1}
    second = TaskSpec(
        name="second",
        family="regression",
        score_range=(0, 2),
        train=write(folder / "c.jsonl", [{"text_a": "x", "score": 2}]),
        test=write(folder / "d.jsonl", [pair, pair, {"text_a": "one two", "score": 0}]),
    )
    return [first, second]


@pytest.mark.parametrize("parallel_bytes", [1 << 30, 0])
def test_counts_places_and_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel_bytes: int) -> None:
    monkeypatch.setattr(check, "_PARALLEL_BYTES", parallel_bytes)  # both ways of reading: here, and in processes
    seen: list[tuple[str, int, int]] = []
    report = check_tasks(tasks(tmp_path), limit=1, progress=lambda *call: seen.append(call))
    first, second = report.tasks
    assert {name: split.rows for name, split in first.splits.items()} == {"train": 4, "dev": 3}
    assert {name: split.rows for name, split in second.splits.items()} == {"train": 1, "test": 3}
    assert first.splits["train"].words == 2 + 1 + 2 + 8
    assert first.splits["train"].labels == {0, 1}
    assert (first.train_duplicates, second.train_duplicates) == (1, 0)
    assert first.splits["dev"].bad.rows == [("b.jsonl:4", "text is empty")]
    assert first.splits["dev"].bad.total == 2
    assert not report.ok
    assert set(report.overlaps) == {
        Overlap("first", "first", "dev", 2, 0),
        Overlap("second", "first", "dev", 2, 0),
        Overlap("first", "second", "test", 1, 2),
    }
    assert report.overlap("second", "second", "test") == ("second", "second", "test", 0, 0)
    assert sorted(name for name, _, _ in seen) == ["first dev", "first train", "second test", "second train"]
    assert [done for _, done, _ in seen] == [1, 2, 3, 4]


def test_a_source_that_cannot_be_read_is_reported_not_raised(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[1]")
    (tmp_path / "dev.txt").write_text("\n\n")
    spec = TaskSpec(
        name="lm", family="masked_lm", train=str(tmp_path / "train.json"), dev=str(tmp_path / "dev.txt"), test="hub:?"
    )
    report = check_tasks([spec])
    bad = {split: facts.bad.rows for split, facts in report.tasks[0].splits.items()}
    assert "the file is one JSON array" in bad["train"][0][1]
    assert bad["dev"] == [("dev.txt", "no rows")]
    assert "hub:OWNER/NAME" in bad["test"][0][1]
    assert not report.ok


@pytest.mark.parametrize("width", [60, 100, 160])
def test_report_is_printed(tmp_path: Path, width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width)
    specs = tasks(tmp_path)
    render_list(specs, console)
    check_tasks(specs, limit=1).render(console)
    printed = out.getvalue()
    for expected in (
        "b.jsonl:4: text is empty",
        "... and 1 more",
        "first, dev: 2 bad rows",
        "2 tasks, 11 good rows, 2 bad rows.",
    ):
        assert expected in printed
    if width == 160:
        assert "3 (2)" in printed
        assert "1 / 2 / -" in printed
        assert "pearson_spearman" in printed


@given(
    train=st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=4),
    rows=st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_index_counts_what_comparing_every_pair_counts(train: list[list[int]], rows: list[list[int]]) -> None:
    index = TrainIndex([(t, np.array(keys, np.uint64)) for t, keys in enumerate(train)], len(train))
    flat = [(key, row) for row, keys in enumerate(rows) for key in keys]
    keys = Keys(np.array([k for k, _ in flat], np.uint64), np.array([r for _, r in flat], np.int64))
    assert index.count(keys).tolist() == [sum(bool(set(row) & set(keys)) for row in rows) for keys in train]


@pytest.mark.shared_data
def test_the_whole_collection_loads_and_counts_as_its_cards_say() -> None:
    if not DATA.is_dir():
        pytest.skip(f"NOT CHECKED: the task collection is not at {DATA}")
    cards = {path.parent.name: json.loads(path.read_text()) for path in sorted(DATA.glob("*/task.json"))}
    specs = load_tasks([str(DATA)])
    assert [spec.name for spec in specs] == list(cards)
    assert len(specs) == 117
    report = check_tasks(specs)
    assert [
        (t.spec.name, split, f.bad.rows) for t in report.tasks for split, f in t.splits.items() if f.bad.total
    ] == []
    for task in report.tasks:
        card = cards[task.spec.name]
        assert {split: facts.rows for split, facts in task.splits.items()} == card["splits"]
        duplicates = {"train_internal_duplicates": task.train_duplicates}
        for split in [split for split in ("dev", "test") if split in task.splits]:
            pair = report.overlap(task.spec.name, task.spec.name, split)
            duplicates[f"{split}_inputs_also_in_train"] = pair.inputs
        assert duplicates == card["exact_duplicates"]
    # What the collection's README names across tasks.
    assert report.overlap("subj", "sst5", "test").inputs == 273
    assert report.overlap("stsb", "mrpc", "test").texts > 500
    assert report.overlap("mrpc", "stsb", "test").texts > 100
    assert report.overlap("mnli_dev", "lingnli", "dev").texts > 4000
    assert report.overlap("snli_devtest", "cad_nli", "test").inputs == 0


@pytest.mark.shared_data
def test_unlabeled_text_of_the_collection_is_a_task() -> None:
    path = DATA / "unlabeled" / "cs.txt.gz"
    if not path.is_file():
        pytest.skip(f"NOT CHECKED: no unlabeled text at {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        paragraphs = sum(1 for line in file if line.strip())
    (facts,) = check_tasks([TaskSpec(name="cs", family="masked_lm", train=str(path))]).tasks
    assert facts.splits["train"].rows == paragraphs
    assert facts.bad == 0
