"""Language modelling on another task's text: tokenised as that task's rows are, and never on what it is judged by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny

from trainer.cache.keys import cache_key
from trainer.cache.text import EncodeOptions
from trainer.cache.views import SplitView
from trainer.errors import ConfigError, DataError
from trainer.run.prepare import Job, prepare
from trainer.tasks.derived import on_task
from trainer.tasks.spec import Family, TaskSpec

CARD_KEYS = ("name", "family", "labels", "metric", "score_range")


def folder(path: Path, name: str, dev: bool = True, rows: list[dict[str, Any]] | None = None) -> Path:
    """The folder of a tiny task, with its card."""
    declared = tiny.task(name, path)
    (path / name / "task.json").write_text(json.dumps({k: declared[k] for k in CARD_KEYS if k in declared}))
    if not dev:
        (path / name / "dev.jsonl").unlink()
    if rows is not None:
        tiny.write_rows(path / name / "train.jsonl", rows)
    return path / name


def job_of(tmp_path: Path, kind: str, *entries: str, **changes: Any) -> Job:
    return prepare(tiny.recipe(tmp_path, kind, tasks=list(entries), **changes))


def tokens(view: SplitView) -> list[list[int]]:
    return [ids.tolist() for row in view.rows(np.arange(len(view))) for ids in row["sequences"]]


@pytest.mark.parametrize("name", ["topic", "same"])
def test_what_fits_is_tokenised_as_the_task_itself(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "t", name)
    job = job_of(tmp_path, "encoder", str(path), f"masked_lm:{path}", model={"max_length": 96})
    ours, theirs = (view.split.rows(np.arange(60)) for view in job.train)
    for a, b in zip(ours, theirs, strict=True):
        assert a["sequences"][0].tolist() == b["sequences"][0].tolist()
        assert a["second"].tolist() == b["second"].tolist()
        assert a["key"] == b["key"]
        assert "label" not in b


def test_long_texts_become_pieces_that_hold_every_token_and_keep_their_type(tmp_path: Path) -> None:
    path = folder(tmp_path / "t", "same")
    whole = job_of(tmp_path, "encoder", f"masked_lm:{path}", model={"max_length": 96}).train[0].split
    cut = job_of(tmp_path, "encoder", f"masked_lm:{path}", model={"max_length": 16}).train[0].split
    assert len(cut) > len(whole)
    pieces = cut.rows(np.arange(len(cut)))
    for row in whole.rows(np.arange(60)):
        mine = [p for p in pieces if p["row"] == row["row"]]
        inner = [token for p in mine for token in p["sequences"][0][1:-1].tolist()]
        assert inner == row["sequences"][0][1:-1].tolist()
        types = [i >= p["second"][0] for p in mine for i in range(1, len(p["sequences"][0]) - 1)]
        assert types == [i >= row["second"][0] for i in range(1, len(row["sequences"][0]) - 1)]


def test_a_decoder_reads_the_texts_as_one(tmp_path: Path) -> None:
    path = folder(tmp_path / "t", "choose")
    job = job_of(tmp_path, "decoder", f"causal_lm:{path}", model={"max_length": 96})
    raw = json.loads((path / "train.jsonl").read_text().splitlines()[0])
    expected = job.tokenizer("\n".join([raw["context"], *raw["choices"]]), add_special_tokens=False)["input_ids"]
    assert tokens(job.train[0])[0][-len(expected) - 1 : -1] == expected


@pytest.mark.parametrize("length", [96, 16])
@pytest.mark.parametrize("name", ["topic", "same", "choose", "find"])
def test_rows_that_the_task_gives_to_dev_are_dev_rows_here_too(tmp_path: Path, name: str, length: int) -> None:
    path = folder(tmp_path / "t", name, dev=False)
    evaluation = {"dev_share": 0.25, "dev_rows": 9}
    model = {"max_length": length, "span_stride": 4}
    job = job_of(tmp_path, "encoder", str(path), f"masked_lm:{path}", evaluation=evaluation, model=model)
    for mine, theirs in ((job.train[0], job.train[1]), (job.dev[0], job.dev[1])):
        assert set(mine.column("row")) == set(theirs.column("row"))
    assert 0 < len(set(job.dev[1].column("row"))) <= 9
    assert length == 96 or len(job.train[1]) > 51


def test_text_that_also_stands_in_the_dev_split_is_not_trained_on(tmp_path: Path) -> None:
    path = folder(tmp_path / "t", "topic")
    leaked = json.loads((path / "dev.jsonl").read_text().splitlines()[3])
    rows = [*({"text": f"row {i}", "label": 0} for i in range(5)), {**leaked, "label": 0}, {**leaked, "label": 1}]
    tiny.write_rows(path / "train.jsonl", rows)
    job = job_of(tmp_path, "encoder", str(path), f"masked_lm:{path}")
    assert [len(view) for view in job.train] == [7, 5]
    assert not set(job.train[1].column("key")) & set(job.dev[0].column("key"))
    assert [len(view) for view in job.dev] == [12, 12]


def test_a_train_split_that_is_all_dev(tmp_path: Path) -> None:
    path = folder(tmp_path / "t", "topic")
    (path / "train.jsonl").write_text((path / "dev.jsonl").read_text())
    with pytest.raises(
        DataError, match=r"task 'topic.masked_lm': every row of its train source also stands among its dev rows"
    ):
        job_of(tmp_path, "encoder", f"masked_lm:{path}")


def test_labels_change_nothing(tmp_path: Path) -> None:
    """The same texts under other labels and targets give the same tokens."""
    found = []
    for label, target in ((0, "left"), (1, "right")):
        rows = [{"text": f"the dog {i}", "label": label} for i in range(20)]
        topic = folder(tmp_path / str(label), "topic", rows=rows)
        rewrite = folder(tmp_path / str(label), "rewrite", rows=[{"source": "the dog", "target": target}] * 9)
        job = job_of(tmp_path, "decoder", f"causal_lm:{topic}", f"causal_lm:{rewrite}")
        found.append([tokens(view) for view in job.train])
    assert found[0] == found[1]


def test_the_wrong_objective_for_a_model_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "t", "topic")
    words = (
        r"family masked_lm \(topic.masked_lm\) cannot be trained on this decoder: a decoder is causal; use causal_lm"
    )
    with pytest.raises(ConfigError, match=words):
        job_of(tmp_path, "decoder", f"masked_lm:{path}")


def test_the_cache_knows_whose_text_it_is() -> None:
    options = EncodeOptions("encoder", 32, 12, 8, 2)
    plain = TaskSpec(name="t", family="classification", labels=("a", "b"), train="x")
    moved = plain.model_copy(update={"columns": {"text": "body"}})
    keys = [
        cache_key(spec, False, "source", "tokenizer", options)
        for spec in (
            on_task(plain, Family.MASKED_LM, ""),
            on_task(moved, Family.MASKED_LM, ""),
            TaskSpec(name="t", family="masked_lm", train="x"),
        )
    ]
    assert len(set(keys)) == 3
