"""Reading cached rows back, and cutting them."""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.cache import arrow_file
from trainer.cache.arrow_file import ArrowFile
from trainer.cache.layout import schema_of
from trainer.cache.store import CachedSplit
from trainer.cache.views import SplitView, cut_dev, limit
from trainer.errors import DataError, RunError
from trainer.tasks.spec import Family, TaskSpec

SPAN = TaskSpec(name="where", family=Family.SPAN)
LM = TaskSpec(name="lm", family=Family.CAUSAL_LM)


def span_row(i: int) -> dict[str, Any]:
    sequences = [list(range(i, i + 3 + (i + j) % 5)) for j in range(i % 3 + 1)]
    return {
        "row": i,
        "key": 2**64 - 1 - i,
        "sequences": sequences,
        "second": [2] * len(sequences),
        "count": len(sequences),
        "length": max(map(len, sequences)),
        "units": 1,
        "truncated": i % 7 == 0,
        "reference": json.dumps({"answers": [f"ä{i}"]}) if i % 2 else "",
        "positions": list(range(i % 4)),
        "start": i % 4,
        "end": i % 4,
        "offsets": [],
    }


def lm_row(i: int, key: int) -> dict[str, Any]:
    ids = [(i + j) % 100 for j in range(60)]
    row = {"row": i, "key": key, "sequences": [ids], "second": [60], "count": 1, "length": 60, "units": 59}
    return {**row, "truncated": False, "reference": ""}


def write(path: Path, spec: TaskSpec, rows: list[dict[str, Any]], chunk: int = 10) -> CachedSplit:
    schema = schema_of(spec.family)
    with ArrowFile(path, schema) as file:
        for first in range(0, len(rows), chunk):
            part = pa.RecordBatch.from_pylist(rows[first : first + chunk], schema=schema)
            file.add(part)
        file.commit()
    return CachedSplit(path, spec)


def keyed(tmp_path: Path, keys: list[int]) -> CachedSplit:
    return write(tmp_path / "keys.arrow", LM, [lm_row(i, key) for i, key in enumerate(keys)], chunk=1000)


@pytest.mark.parametrize("batch_bytes", [1 << 24, 1])
def test_rows_come_back(tmp_path: Path, batch_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_file, "_BATCH_BYTES", batch_bytes)  # one record batch, and one for every ten rows
    rows = [span_row(i) for i in range(53)]
    split = write(tmp_path / "span.arrow", SPAN, rows)
    assert len(split) == 53
    for name in ("row", "key", "count", "length", "units", "truncated", "start", "end"):
        column = split.column(name)
        assert column.tolist() == [row[name] for row in rows]
        assert column.flags.c_contiguous
    indices = np.array([52, 0, 17, 17, 9, 10, 30])
    for found, i in zip(split.rows(indices), indices, strict=True):
        expected = {k: v for k, v in rows[i].items() if k != "reference"}
        assert {k: type(found[k]) for k in ("row", "key", "truncated")} == {"row": int, "key": int, "truncated": bool}
        assert isinstance(found["sequences"], list)
        assert all(s.dtype == np.int32 for s in [*found["sequences"], found["positions"], found["second"]])
        assert {k: _plain(v) for k, v in found.items()} == expected
    assert split.references(indices) == [json.loads(t) if (t := rows[i]["reference"]) else None for i in indices]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list) else value


def test_rows_are_views_of_the_file(tmp_path: Path) -> None:
    split = keyed(tmp_path, list(range(10)))
    ids = split.rows(np.array([3]))[0]["sequences"][0]
    assert not ids.flags.owndata
    assert not ids.flags.writeable
    assert not split.column("key").flags.owndata


def test_reading_a_batch_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    split = keyed(tmp_path, list(range(5000)))
    random = np.random.default_rng(0)
    times = []
    for _ in range(50):
        indices = random.integers(0, 5000, 64)
        begin = time.perf_counter()
        split.rows(indices)
        times.append(time.perf_counter() - begin)
    assert min(times) < 1e-3


@pytest.mark.parametrize("index", [-1, 10])
def test_rows_outside_are_an_error(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError):
        keyed(tmp_path, list(range(10))).rows(np.array([index]))


def test_split_travels_to_another_process(tmp_path: Path) -> None:
    split = keyed(tmp_path, list(range(10)))
    sent = pickle.dumps(split)
    assert len(sent) < 2000
    assert pickle.loads(sent).column("key").tolist() == list(range(10))


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    split = keyed(tmp_path, list(range(100)))
    with pytest.raises(RunError, match="no token cache of a span task"):
        CachedSplit(split.path, SPAN)
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(split.path.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"cut.arrow: .*cannot be read.*delete the file"):
        CachedSplit(cut, LM)
    with pytest.raises(RunError, match=r"gone.arrow"):
        CachedSplit(tmp_path / "gone.arrow", LM)


KEYS = st.lists(st.integers(0, 12) | st.integers(0, 2**64 - 1), min_size=2, max_size=60)


@given(keys=KEYS, share=st.floats(0.01, 0.99), rows=st.integers(1, 20), seed=st.integers(0, 2**63 - 1))
def test_cut_dev(tmp_path_factory: pytest.TempPathFactory, keys: list[int], share: float, rows: int, seed: int) -> None:
    split = keyed(tmp_path_factory.mktemp("cut"), keys)
    most = max(1, min(rows, int(share * len(keys))))
    if min(Counter(keys).values()) > most:
        with pytest.raises(DataError, match="task 'lm': has no dev source"):
            cut_dev(split, share, rows, seed)
        return
    train, dev = cut_dev(split, share, rows, seed)
    assert 1 <= len(dev) <= most
    assert len(train) >= 1
    assert sorted([*train.column("row"), *dev.column("row")]) == list(range(len(keys)))
    assert not set(train.column("key")) & set(dev.column("key"))
    shuffled = keyed(tmp_path_factory.mktemp("cut"), keys[::-1])  # only the texts decide
    assert sorted(cut_dev(shuffled, share, rows, seed)[1].column("key")) == sorted(dev.column("key"))


def test_cut_dev_takes_the_smallest_and_as_many_as_asked(tmp_path: Path) -> None:
    split = keyed(tmp_path, list(range(3000)))
    assert len(cut_dev(split, 0.1, 500, 0)[1]) == 300
    small, large = (set(cut_dev(split, 0.9, n, 7)[1].column("key")) for n in (50, 500))
    assert (len(small), len(large)) == (50, 500)
    assert small < large  # a larger cut keeps the smaller one
    assert set(cut_dev(split, 0.9, 50, 8)[1].column("key")) != small
    expected = 50 * 50 / 3000
    assert abs(len(small & set(cut_dev(split, 0.9, 50, 9)[1].column("key"))) - expected) < 6


def test_cut_dev_looks_behind_repeated_texts(tmp_path: Path) -> None:
    keys = [i // 100 for i in range(3000)] + [10**6 + i for i in range(5)]
    _, dev = cut_dev(keyed(tmp_path, keys), 0.9, 5, 3)
    assert sorted(dev.column("key")) == [10**6 + i for i in range(5)]


def test_limit_and_views(tmp_path: Path) -> None:
    split = keyed(tmp_path, list(range(200)))
    whole = SplitView(split, None)
    assert len(whole) == 200
    some = limit(whole, 20, 1)
    assert len(some) == 20
    assert some.column("row").tolist() == sorted(some.column("row").tolist())
    assert set(limit(whole, 5, 1).column("row")) < set(some.column("row"))
    assert limit(whole, 0, 1) is whole
    assert limit(whole, 200, 1) is whole
    train, _ = cut_dev(split, 0.5, 100, 0)
    nested = limit(train, 10, 0)
    assert set(nested.column("row")) < set(train.column("row"))
    assert [r["row"] for r in nested.rows(np.array([9, 0]))] == nested.column("row")[[9, 0]].tolist()
    assert nested.references(np.array([1])) == [None]


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.arrow"
    schema = schema_of(Family.CAUSAL_LM)
    with ArrowFile(path, schema) as file:  # left without commit
        file.add(pa.RecordBatch.from_pylist([lm_row(0, 0)], schema=schema))
        assert len(list(path.parent.iterdir())) == 1
    assert list(path.parent.iterdir()) == []
