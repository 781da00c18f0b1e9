"""Rows as they stand in a source, before anything is checked.

Owns: `RawRow` (one row or what is wrong with it, and where), `Chunk` (some rows, cheap to make and to send to a worker
process, which parses them), `Source`, and the fingerprint of files. The kinds of sources are `textfiles.py` and
`arrowfiles.py`; `sources.py` chooses between them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

CHUNK_ROWS = 1000
CHUNK_BYTES = 8 << 20
"""A chunk of long lines ends early, so that memory does not grow with the length of rows."""

FULL_HASH_BYTES = 256 << 20
"""Files up to this size are hashed whole; larger ones by size, time of change, head and tail."""
_EDGE_BYTES = 4 << 20


class RawRow(NamedTuple):
    """One row of a source: `data`, or the `problem` that keeps it from being read."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which no one calls
    """0-based row in the source."""
    place: str
    """Where a person finds it: `train.jsonl.gz:17` (1-based line; row for Parquet and `datasets`)."""
    data: dict[str, Any] | None
    problem: str | None


class Chunk(ABC):
    """Consecutive rows of a source. Picklable; what costs time happens in `rows`, in a worker."""

    @abstractmethod
    def rows(self) -> Iterator[RawRow]: ...


@dataclass(frozen=True)
class ProblemChunk(Chunk):
    """A stretch of a source that could not be read at all."""

    row: RawRow

    def rows(self) -> Iterator[RawRow]:
        yield self.row


class Source(ABC):
    """Where one split's rows come from. Reading it twice gives the same rows in the same order."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the rows do."""

    @abstractmethod
    def chunks(self, size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        """All rows, at most `size` a chunk, in order, with flat memory."""


def hash_files(kind: str, paths: Iterable[Path]) -> str:
    """Fingerprint of `paths` in the given order; `kind` is what the bytes are read as. Names don't count."""
    total = hashlib.blake2b(kind.encode(), digest_size=16)
    for path in paths:
        total.update(_hash_file(path))
    return total.hexdigest()


def _hash_file(path: Path) -> bytes:
    stat = path.stat()
    with path.open("rb") as file:
        if stat.st_size <= FULL_HASH_BYTES:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        edges = hashlib.blake2b(f"{stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=16)
        edges.update(file.read(_EDGE_BYTES))
        file.seek(-_EDGE_BYTES, 2)
        edges.update(file.read(_EDGE_BYTES))
        return edges.digest()
