"""Where rows come from: one function that opens any source by its name.

Owns: which file ending is read how, and the errors for names that are no source. `cards.py` uses `check_source` to
refuse them before anything starts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.errors import DataError, nearest
from trainer.tasks.arrowfiles import HUB, ParquetFile, open_folder, open_hub
from trainer.tasks.raw import Chunk, RawRow, Source
from trainer.tasks.textfiles import COMPRESSIONS, CsvFile, TextFile

__all__ = ["Chunk", "RawRow", "Source", "check_source", "is_hub", "is_source_file", "open_source"]

_KINDS: dict[str, Callable[[Path], Source]] = {
    ".jsonl": lambda path: TextFile(path, json=True),
    ".json": lambda path: TextFile(path, json=True),
    ".csv": lambda path: CsvFile(path, ","),
    ".tsv": lambda path: CsvFile(path, "\t"),
    ".txt": lambda path: TextFile(path, json=False),
    ".parquet": ParquetFile,
}


def open_source(uri: str, split: str) -> Source:
    """The source named `uri`: a file, a folder of `datasets`, or `hub:OWNER/NAME[:CONFIG][@SPLIT]`.

    `split` (train, dev or test) picks the part of a folder or hub data set that has several.
    """
    check_source(uri)
    if is_hub(uri):
        return open_hub(uri, split)
    path = Path(uri)
    if path.is_dir():
        return open_folder(path, split)
    return _KINDS[_kind(path)](path)


def is_hub(uri: str) -> bool:
    """Whether `uri` names a data set of the hub rather than a path."""
    return uri.startswith(HUB)


def is_source_file(path: Path) -> bool:
    """Whether the file's ending is one that is read."""
    return _kind(path) in _KINDS


def check_source(uri: str) -> None:
    """Raise `DataError` when `uri` is a path that is not there or of no kind that is read. Opens nothing."""
    if is_hub(uri):
        return
    path = Path(uri)
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file or folder{nearest(path.name, beside)}")
    if not path.is_dir() and not is_source_file(path):
        raise DataError(
            f"{path}: not a kind of file that is read; name it {', '.join(_KINDS)} "
            f"(text kinds also compressed: {', '.join(COMPRESSIONS)})"
        )


def _kind(path: Path) -> str:
    if path.suffix in COMPRESSIONS:
        inner = path.with_suffix("").suffix
        return inner if inner != ".parquet" else ""
    return path.suffix
