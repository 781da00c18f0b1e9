"""Reading a cached split: rows as numpy views of the memory-mapped file.

Owns: random access. Going through Arrow's offset and value buffers, a row costs microseconds and copies no tokens; the
file's pages come and go with the page cache, so a corpus may be larger than memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.cache.layout import schema_of
from trainer.errors import RunError
from trainer.tasks.spec import TaskSpec

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class _Lists:
    """A column of lists of int32: list i is `values[offsets[i]:offsets[i + 1]]`."""

    offsets: Int32
    values: Int32

    @classmethod
    def of(cls, array: pa.ListArray) -> _Lists:
        return cls(array.offsets.to_numpy(), array.values.to_numpy())

    def __getitem__(self, i: int) -> Int32:
        return self.values[self.offsets.item(i) : self.offsets.item(i + 1)]


@dataclass(frozen=True)
class _Nested:
    """A column of lists of lists of int32."""

    offsets: Int32
    lists: _Lists

    @classmethod
    def of(cls, array: pa.ListArray) -> _Nested:
        return cls(array.offsets.to_numpy(), _Lists.of(array.values))

    def __getitem__(self, i: int) -> list[Int32]:
        return [self.lists[j] for j in range(self.offsets.item(i), self.offsets.item(i + 1))]


class _Chunk:
    """One record batch, its columns opened when first asked for."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch

    @cached_property
    def scalars(self) -> list[tuple[str, NDArray[Any]]]:
        return [
            (f.name, self.batch.column(f.name).to_numpy(zero_copy_only=False))
            for f in self.batch.schema
            if pa.types.is_primitive(f.type)
        ]

    @cached_property
    def lists(self) -> list[tuple[str, _Lists | _Nested]]:
        return [
            (f.name, (_Nested if pa.types.is_list(f.type.value_type) else _Lists).of(self.batch.column(f.name)))
            for f in self.batch.schema
            if pa.types.is_list(f.type)
        ]

    def row(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = {name: values.item(i) for name, values in self.scalars}
        for name, lists in self.lists:
            row[name] = lists[i]
        return row


class CachedSplit:
    """One cached (task, split)."""

    def __init__(self, path: Path, spec: TaskSpec) -> None:
        self.path = path
        self.spec = spec
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._chunks = [_Chunk(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"{path}: the token cache of task '{spec.name}' cannot be read ({error}); "
                "delete the file and start again, and it is made anew"
            ) from error
        if not reader.schema.equals(schema_of(spec.family)):
            raise RunError(f"{path}: is no token cache of a {spec.family.value} task such as '{spec.name}'")
        self._ends = np.cumsum([chunk.batch.num_rows for chunk in self._chunks], dtype=np.int64)

    def __reduce__(self) -> tuple[type[CachedSplit], tuple[Path, TaskSpec]]:
        return CachedSplit, (self.path, self.spec)  # another process maps the file itself

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def column(self, name: str) -> NDArray[Any]:
        """All values of a column of numbers; a view of the file where it lies there in one piece."""
        parts = [chunk.batch.column(name).to_numpy(zero_copy_only=False) for chunk in self._chunks]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rows(self, indices: NDArray[np.int64]) -> list[dict[str, Any]]:
        """The rows' columns without `reference`: numbers as Python's, lists as read-only int32 arrays."""
        return [self._chunks[chunk].row(i) for chunk, i in self._places(indices)]

    def references(self, indices: NDArray[np.int64]) -> list[Any]:
        """What the metric compares with, parsed; None where nothing was kept."""
        texts = [self._chunks[chunk].batch.column("reference")[i].as_py() for chunk, i in self._places(indices)]
        return [json.loads(text) if text else None for text in texts]

    def _places(self, indices: NDArray[np.int64]) -> zip[tuple[int, int]]:
        """The record batch of each row, and its place there."""
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self.path}: row {wanted.min()} or {wanted.max()} is not among {len(self)} rows")
        chunks = np.searchsorted(self._ends, wanted, side="right")
        starts = np.concatenate([[0], self._ends])[chunks]
        return zip(chunks.tolist(), (wanted - starts).tolist(), strict=True)
