"""The cache key: every part that changes rows changes it, and nothing else does."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.cache import keys
from trainer.cache.keys import Fingerprints, cache_key, tokenizer_hash
from trainer.cache.text import EncodeOptions
from trainer.tasks.spec import Family, TaskSpec

OPTIONS = EncodeOptions("encoder", 32, 12, 8, 2)
CLASSES = TaskSpec(name="t", family=Family.CLASSIFICATION, labels=("a", "b"))
PAIRS = TaskSpec(name="t", family=Family.PAIR_CLASSIFICATION, num_labels=2)
SPAN = TaskSpec(name="t", family=Family.SPAN)
SEQ2SEQ = TaskSpec(name="t", family=Family.SEQ2SEQ)
SCORES = TaskSpec(name="t", family=Family.REGRESSION, score_range=(0, 5))


def key(spec: TaskSpec, evaluation: bool = False, options: EncodeOptions = OPTIONS) -> str:
    return cache_key(spec, evaluation, "source", "tokenizer", options)


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        (CLASSES, {"family": Family.MULTIPLE_CHOICE}),
        (CLASSES, {"labels": ("b", "a")}),
        (CLASSES, {"labels": ("a", "b", "c")}),
        (CLASSES, {"columns": {"text": "body"}}),
        (PAIRS, {"num_labels": 3}),
        (SCORES, {"score_range": (0, 4)}),
        (SCORES, {"score_range": None}),
    ],
)
def test_task_fields_that_change_rows(spec: TaskSpec, changes: dict[str, Any]) -> None:
    assert key(spec) != key(spec.model_copy(update=changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"licence": "MIT"},
        {"citation": "Someone 2020"},
        {"metric": "macro_f1"},
        {"train": "elsewhere.jsonl"},
        {"dev": "dev.jsonl"},
    ],
)
def test_task_fields_that_do_not(changes: dict[str, Any]) -> None:
    assert key(CLASSES) == key(CLASSES.model_copy(update=changes))


@pytest.mark.parametrize(
    ("option", "value", "touched"),
    [
        ("kind", "decoder", {"classes", "span", "span eval", "seq2seq"}),
        ("max_length", 64, {"classes", "span", "span eval", "seq2seq"}),
        ("max_target_length", 64, {"seq2seq"}),
        ("span_stride", 4, {"span", "span eval"}),
        ("span_windows", 3, {"span"}),
    ],
)
def test_options_touch_the_families_that_use_them(option: str, value: Any, touched: set[str]) -> None:
    cases = {"classes": (CLASSES, False), "span": (SPAN, False), "span eval": (SPAN, True), "seq2seq": (SEQ2SEQ, True)}
    changed = replace(OPTIONS, **{option: value})
    assert {n for n, case in cases.items() if key(*case) != key(*case, options=changed)} == touched


def test_evaluation_counts_where_it_keeps_something() -> None:
    ranking = PAIRS.model_copy(update={"metric": "map_mrr"})
    for spec in (SPAN, SEQ2SEQ, SCORES, ranking):
        assert key(spec, False) != key(spec, True)
    for spec in (CLASSES, PAIRS):
        assert key(spec, False) == key(spec, True)
    assert key(ranking, False) == key(PAIRS, False)


def test_source_tokenizer_and_versions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    first = key(CLASSES)
    assert first != cache_key(CLASSES, False, "other", "tokenizer", OPTIONS)
    assert first != cache_key(CLASSES, False, "source", "other", OPTIONS)
    for name in ("LAYOUT_VERSION", "ENCODER_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(keys, name, 99)
            assert key(CLASSES) != first
    assert key(CLASSES) == first


def test_tokenizer_hash_reads_the_tokenizers_files(
    minilm_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    names = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "config.json"]
    folder.mkdir()
    for name in names:
        shutil.copy(Path(minilm_path) / name, folder / name)
    first = tokenizer_hash(str(folder))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("text")
    shutil.move(folder, tmp_path / "moved")
    assert tokenizer_hash(str(tmp_path / "moved")) == first
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text().replace('"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 0.2'))
    assert tokenizer_hash(str(tmp_path / "moved")) == first
    for name, old, new in [
        ("tokenizer.json", "[CLS]", "[CLZ]"),
        ("tokenizer_config.json", "true", "false"),
        ("vocab.txt", "the", "teh"),
        ("special_tokens_map.json", "[PAD]", "[PAT]"),
        ("config.json", '"model_type": "bert"', '"model_type": "electra"'),
    ]:
        file = tmp_path / "moved" / name
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new, 1))
        assert tokenizer_hash(str(tmp_path / "moved")) != first, name
        file.write_text(before)
    (tmp_path / "moved" / "spiece.model").write_bytes(b"pieces")
    assert tokenizer_hash(str(tmp_path / "moved")) != first
    (tmp_path / "moved" / "spiece.model").unlink()
    assert tokenizer_hash(str(tmp_path / "moved")) == first
    monkeypatch.setattr(keys, "version", lambda name: "99")
    assert tokenizer_hash(str(tmp_path / "moved")) != first


def test_fingerprints_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n')
    calls = []
    original = keys.open_source

    def counted(uri: str, split: str) -> Any:
        calls.append(uri)
        return original(uri, split)

    monkeypatch.setattr(keys, "open_source", counted)

    def fingerprint() -> str:
        known = Fingerprints(tmp_path)
        found = known.of(str(source), "train")
        known.save()
        return found

    first = fingerprint()
    assert fingerprint() == first
    assert len(calls) == 1
    stat = source.stat()
    source.write_text('{"text": "b"}\n')  # as long as before
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # and as old, as after `cp -p`
    second = fingerprint()
    assert second != first
    source.write_text('{"text": "a"}\n')
    assert fingerprint() == first  # touched, but the same
    assert len(calls) == 3
    monkeypatch.chdir(tmp_path)
    assert Fingerprints(tmp_path).of("a.jsonl", "train") == first
    assert len(calls) == 3  # a relative name of the same file
