"""Writing one cached split so that the file is there whole or not at all.

Owns: the temporary file beside the final one, its lock, and the removal of what a killed build left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import pyarrow as pa

from trainer.errors import RunError

_BATCH_BYTES = 8 << 20
"""Record batches of this size: few enough to open a large corpus quickly, small enough to hold in memory."""

_SUFFIX = ".tmp"


class ArrowFile:
    """An Arrow IPC file under construction. Unless `commit` is called, leaving the context removes it."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.rows = 0
        self._pending: list[pa.RecordBatch] = []
        self._committed = False

    def __enter__(self) -> ArrowFile:
        with _explained(self.path):
            self._file = _create_locked(self.path)
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), self.schema)
        return self

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        self.rows += batch.num_rows
        self._pending.append(batch)
        if sum(b.nbytes for b in self._pending) >= _BATCH_BYTES:
            self._flush()

    def commit(self) -> None:
        """Finish the file and put it in its place, over one that another run finished in the meantime."""
        self._flush()
        with _explained(self.path):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._file.name, self.path)
        self._committed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            with contextlib.suppress(OSError):
                os.unlink(self._file.name)
        with contextlib.suppress(OSError):  # what could not be written was reported by the write itself
            self._file.close()

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending, self.schema).combine_chunks()
            self._pending = []
            with _explained(self.path):
                self._writer.write_table(table)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files whose writer is gone: a writer's lock ends with its process, however that ends."""
    for path in folder.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _create_locked(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=_SUFFIX)
        os.fchmod(handle, 0o644)
        os.close(handle)
        file = open(name, "wb")  # noqa: SIM115 - the caller closes it
        with contextlib.suppress(OSError):  # a file system without locks has no removal of leftovers either
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:  # else another run took it for a leftover before it was locked
            return file
        file.close()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the token cache {path} cannot be written: {error.strerror or error}; "
            "set `cache` in the recipe, or SETT_CACHE, to a folder with room"
        ) from error
