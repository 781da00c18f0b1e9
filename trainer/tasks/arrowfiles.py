"""Sources that are Arrow underneath: Parquet files, `datasets` folders and data sets of the hub.

Owns: slicing them into chunks that travel as Arrow IPC bytes, and loading through `datasets` without ever running
code that comes with the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.errors import DataError, nearest
from trainer.tasks.raw import CHUNK_ROWS, Chunk, ProblemChunk, RawRow, Source, hash_files

HUB = "hub:"
_HUB_URI = re.compile(r"hub:(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@:]+))?(@(?P<split>.+))?")
_HAS_CODE = "Dataset scripts are no longer supported"
"""How `datasets` begins its refusal of a data set that comes with code."""
_EXPORT = "refs/convert/parquet"
"""Branch on which the hub keeps its own copy of such a data set as Parquet: CONFIG/SPLIT/0000.parquet."""
_SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


@dataclass(frozen=True)
class ArrowChunk(Chunk):
    """Rows as one Arrow IPC stream: a slice of a table is sent without the rest of the table."""

    name: str
    first_row: int
    stream: bytes

    def rows(self) -> Iterator[RawRow]:
        table = pa.ipc.open_stream(self.stream).read_all()
        try:
            values = table.to_pylist()
        except (ValueError, OverflowError):  # one bad value (UTF-8, dates) fails the whole: find the rows it is in
            values = [_row_or_problem(table, i) for i in range(table.num_rows)]
        for i, value in enumerate(values):
            place = f"{self.name}:{self.first_row + i + 1}"
            data, problem = (None, value) if isinstance(value, str) else (value, None)
            yield RawRow(self.first_row + i, place, data, problem)


def _row_or_problem(table: Any, i: int) -> dict[str, Any] | str:
    try:
        row: dict[str, Any] = table.slice(i, 1).to_pylist()[0]
        return row
    except (ValueError, OverflowError) as error:
        return f"cannot be read: {error}"


def _chunk(name: str, first_row: int, table: Any) -> ArrowChunk:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write(table)
    return ArrowChunk(name, first_row, sink.getvalue().to_pybytes())


class ParquetFile(Source):
    """One Parquet file."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def fingerprint(self) -> str:
        return hash_files("parquet", [self.path])

    def chunks(self, size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        row = 0
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=size):
                    yield _chunk(self.path.name, row, batch)
                    row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            problem = f"the Parquet file is damaged or cut off ({error})"
            yield ProblemChunk(RawRow(row, f"{self.path.name}:{row + 1}", None, problem))


class DatasetSource(Source):
    """One split loaded by `datasets`, memory-mapped."""

    def __init__(self, uri: str, name: str, split: str, dataset: Any) -> None:
        super().__init__(uri)
        self.name = name
        self.split = split
        self.dataset = dataset.with_format("arrow")

    def fingerprint(self) -> str:
        # The Arrow files behind it, not datasets' own fingerprint: that depends on where the cache lies.
        files = [Path(entry["filename"]) for entry in self.dataset.cache_files]
        return hash_files(f"datasets {self.split} {len(self.dataset)}", files)

    def chunks(self, size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        for row in range(0, len(self.dataset), size):
            yield _chunk(self.name, row, self.dataset[row : row + size])


def _pick_split(uri: str, asked: str, available: list[str]) -> str:
    for name in _SPLIT_NAMES.get(asked, (asked,)):
        if name in available:
            return name
    raise DataError(f"{uri}: has no split '{asked}'{nearest(asked, available)}; it has {', '.join(available)}")


def open_folder(path: Path, split: str) -> Source:
    """A folder written by `save_to_disk`, or one laid out as on the hub."""
    import datasets

    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    try:
        if saved:
            data = datasets.load_from_disk(str(path), keep_in_memory=False)
        else:
            data = datasets.load_dataset(str(path), keep_in_memory=False)
    except Exception as error:  # whatever datasets and its readers raise is about the user's folder
        raise DataError(f"{path}: `datasets` cannot load this folder: {_first_line(error)}") from error
    if isinstance(data, dict):
        split = _pick_split(str(path), split, list(data))
        data = data[split]
    return DatasetSource(str(path), f"{path.name}@{split}", split, data)


def open_hub(uri: str, split: str) -> Source:
    """`hub:OWNER/NAME[:CONFIG][@SPLIT]`. Of a data set that comes with code the hub's Parquet copy is read: `datasets`
    itself refuses to run the code."""
    match = _HUB_URI.fullmatch(uri)
    if match is None:
        raise DataError(f"'{uri}': a hub source is written hub:OWNER/NAME[:CONFIG][@SPLIT]")
    import datasets

    name, config, chosen = match["name"], match["config"], match["split"]
    try:
        # Without a split all are returned, which costs nothing: `datasets` prepares all of them in any case.
        try:
            data = datasets.load_dataset(name, config, split=chosen, keep_in_memory=False)
        except RuntimeError as error:
            if not str(error).startswith(_HAS_CODE):
                raise
            data = datasets.load_dataset(name, data_dir=config, revision=_EXPORT, split=chosen, keep_in_memory=False)
    except Exception as error:  # network, missing names, scripts: every library below has exceptions of its own
        raise DataError(
            f"{uri}: cannot be loaded from the hub: {_first_line(error)}. Check the name and the connection, "
            "or download the data once and name its folder or files as the source"
        ) from error
    if chosen is None:
        chosen = _pick_split(uri, split, list(data))
        data = data[chosen]
    return DatasetSource(uri, f"{uri.partition('@')[0]}@{chosen}", chosen, data)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
