"""Data sets of the hub, with a local folder in the hub's place: `datasets` itself reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.errors import DataError
from trainer.tasks.sources import open_source


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with one data set, `some/set`, that comes with code; the calls that asked for it."""
    for config in ("one", "two"):
        for split in ("train", "validation"):
            folder = tmp_path / "export" / config / split
            folder.mkdir(parents=True)
            pq.write_table(pa.table({"text": [f"{config} {split}"]}), folder / "0000.parquet")
    real, calls = datasets.load_dataset, []

    def load(path: str, name: str | None = None, **arguments: Any) -> Any:
        calls.append({"path": path, "name": name, **arguments})
        if path == "broken/set":
            raise RuntimeError("something else")
        if "revision" not in arguments:
            raise RuntimeError("Dataset scripts are no longer supported, but found set.py")
        del arguments["revision"]
        return real(str(tmp_path / "export"), name, cache_dir=str(tmp_path / "cache"), **arguments)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize(
    ("uri", "split", "text"),
    [
        ("hub:some/set:one@train", "train", "one train"),
        ("hub:some/set:two@train", "dev", "two train"),
        ("hub:some/set:two", "dev", "two validation"),
    ],
)
def test_of_a_data_set_with_code_the_hubs_parquet_copy_is_read(
    hub: list[dict[str, Any]], uri: str, split: str, text: str
) -> None:
    rows = [row for chunk in open_source(uri, split).chunks() for row in chunk.rows()]
    assert [row.data for row in rows] == [{"text": text}]
    assert rows[0].place == f"{uri.partition('@')[0]}@{'validation' if '@' not in uri else 'train'}:1"
    first, second = hub
    assert "revision" not in first
    assert second["revision"] == "refs/convert/parquet"
    assert "trust_remote_code" not in first | second


def test_other_errors_of_the_hub_are_told_as_they_are(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="hub:broken/set: cannot be loaded from the hub: RuntimeError: something else"):
        open_source("hub:broken/set", "train")
    assert len(hub) == 1
