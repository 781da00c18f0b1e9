"""Sources that are text: JSON Lines, CSV, TSV and plain text, compressed or not.

Owns: reading lines with flat memory, and turning whatever a damaged file does (bad bytes, a cut-off archive, an endless
line) into a row with a problem and a place. Lines are decoded and parsed in `Chunk.rows`; only CSV is split here, as
where a record ends is known only by parsing it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from trainer.errors import DataError
from trainer.tasks.raw import CHUNK_BYTES, CHUNK_ROWS, Chunk, ProblemChunk, RawRow, Source, hash_files

MAX_LINE_BYTES = 16 << 20
"""A longer line (or CSV field) is a problem, not a row: most often the file is not what its name says."""

_BOM = b"\xef\xbb\xbf"
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)

Line = bytes | str
"""A line's bytes, or (str) the problem that stands in its place."""


def _open_zst(path: Path) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20))


_OPENERS: dict[str, Callable[[Path], BinaryIO]] = {
    "": lambda path: path.open("rb"),
    ".gz": lambda path: cast(BinaryIO, gzip.GzipFile(path, "rb")),
    ".bz2": lambda path: cast(BinaryIO, bz2.BZ2File(path, "rb")),
    ".xz": lambda path: cast(BinaryIO, lzma.LZMAFile(path, "rb")),  # noqa: SIM115 - read_lines closes it
    ".zst": _open_zst,
}
COMPRESSIONS = tuple(suffix for suffix in _OPENERS if suffix)


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file with their ends, the byte order mark dropped. Damage ends the file with a problem."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    try:
        with _OPENERS[compression](path) as file:
            first = True
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    yield f"line of {_skip_line(file, line)} bytes, the most is {MAX_LINE_BYTES}"
                else:
                    yield line.removeprefix(_BOM) if first else line
                first = False
    except _DAMAGE as error:
        what = "compressed data is damaged or cut off from here on" if compression else "the file cannot be read"
        yield f"{what} ({str(error) or type(error).__name__})"


def _skip_line(file: BinaryIO, line: bytes) -> int:
    length = len(line)
    while not line.endswith(b"\n"):
        line = file.readline(1 << 20)
        if not line:
            break
        length += len(line)
    return length


def _is_blank(line: Line) -> bool:
    bare = line.strip()
    if not bare or isinstance(bare, str):
        return not bare
    # Unicode has spaces of its own, which bytes.strip does not know.
    return bare[0] >= 0x80 and not bare.decode("utf-8", "replace").strip()


def _decode(line: bytes) -> tuple[str, str | None]:
    """The text and the problem, if any, of one line."""
    try:
        return line.decode("utf-8"), None
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        return line.decode("utf-8", "replace"), problem


def _parse_json(text: str) -> tuple[dict[str, Any] | None, str | None]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        return None, f"bad JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return None, f"bad JSON: {error}"
    if not isinstance(data, dict):
        return None, f"not a JSON object but a {type(data).__name__} (one object a line)"
    return data, None


@dataclass(frozen=True)
class LineChunk(Chunk):
    """Lines that are a row each: `json` objects, or paragraphs of plain text."""

    name: str
    json: bool
    first_row: int
    first_line: int
    lines: list[Line]

    def rows(self) -> Iterator[RawRow]:
        index = self.first_row - 1
        for number, line in enumerate(self.lines, self.first_line):
            if _is_blank(line):
                continue
            index += 1
            data: dict[str, Any] | None = None
            if isinstance(line, str):
                problem: str | None = line
            else:
                text, problem = _decode(line)
                if problem is None and self.json:
                    data, problem = _parse_json(text)
                elif problem is None:
                    data = {"text": text.strip()}
            yield RawRow(index, f"{self.name}:{number}", data, problem)


@dataclass(frozen=True)
class CsvChunk(Chunk):
    """Records already split into fields, each with its first line; a str is a problem in a record's place."""

    name: str
    header: list[str]
    first_row: int
    records: list[tuple[int, list[str] | str]]

    def rows(self) -> Iterator[RawRow]:
        width = len(self.header)
        for index, (line, fields) in enumerate(self.records, self.first_row):
            place = f"{self.name}:{line}"
            if isinstance(fields, str):
                yield RawRow(index, place, None, fields)
            elif len(fields) != width:
                yield RawRow(index, place, None, f"{len(fields)} fields where the header has {width} columns")
            else:
                yield RawRow(index, place, dict(zip(self.header, fields, strict=True)), None)


class TextFile(Source):
    """A file of which every non-blank line is a row: JSON Lines (`json`) or plain text."""

    def __init__(self, path: Path, json: bool) -> None:
        super().__init__(str(path))
        self.path = path
        self.json = json

    def fingerprint(self) -> str:
        return hash_files("json" if self.json else "text", [self.path])

    def chunks(self, size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        lines: list[Line] = []
        row = rows = nbytes = 0
        first_line = 1
        for line in read_lines(self.path):
            if self.json and first_line == 1 and not lines and line[:1] in (b"[", "["):
                self._refuse_array(line)
            lines.append(line)
            nbytes += len(line)
            rows += not _is_blank(line)
            if len(lines) >= size or nbytes >= CHUNK_BYTES:
                yield LineChunk(self.path.name, self.json, row, first_line, lines)
                row, first_line = row + rows, first_line + len(lines)
                lines, rows, nbytes = [], 0, 0
        if lines:
            yield LineChunk(self.path.name, self.json, row, first_line, lines)

    def _refuse_array(self, line: Line) -> None:
        if self.path.name.removesuffix(self.path.suffix if self.path.suffix in COMPRESSIONS else "").endswith(".json"):
            raise DataError(
                f"{self.path}:1: the file is one JSON array; a source has one object a line. "
                f"Convert it, for example with `jq -c '.[]' {self.path.name}`"
            )


class _Decoder:
    """The lines a csv reader is fed. Problems are kept aside: an exception here would end the reader."""

    def __init__(self, path: Path) -> None:
        self._lines = read_lines(path)
        self.problem: str | None = None

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            text, problem = _decode(line) if isinstance(line, bytes) else ("\n", line)
            self.problem = self.problem or problem
            yield text

    def take_problem(self) -> str | None:
        problem, self.problem = self.problem, None
        return problem


class CsvFile(Source):
    """A CSV or TSV file with a header; fields in double quotes may hold line ends."""

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(str(path))
        self.path = path
        self.delimiter = delimiter

    def fingerprint(self) -> str:
        return hash_files(f"csv{self.delimiter}", [self.path])

    def chunks(self, size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        records = self._records()
        line, header = next(records, (1, []))
        problem = header if isinstance(header, str) else _header_problem(header)
        if problem:
            yield ProblemChunk(RawRow(0, f"{self.path.name}:{line}", None, problem))
            return
        assert isinstance(header, list)
        pending: list[tuple[int, list[str] | str]] = []
        row = nbytes = 0
        for line, fields in records:
            pending.append((line, fields))
            nbytes += sum(map(len, fields))
            if len(pending) >= size or nbytes >= CHUNK_BYTES:
                yield CsvChunk(self.path.name, header, row, pending)
                row += len(pending)
                pending, nbytes = [], 0
        if pending:
            yield CsvChunk(self.path.name, header, row, pending)

    def _records(self) -> Iterator[tuple[int, list[str] | str]]:
        # Python's own limit of 128 KiB a field is process-wide; it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        decoder = _Decoder(self.path)
        # strict: a quote that never closes is an error, instead of one field that swallows the rest of the file.
        reader = csv.reader(iter(decoder), delimiter=self.delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            fields: list[str] | str
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fields = f'bad quoting: {error} (a quoted field writes " as "")'
            problem = decoder.take_problem()
            if problem or fields:
                yield line, problem or fields


def _header_problem(header: list[str]) -> str | None:
    if not header:
        return "the file is empty; the first line must name the columns"
    for name in header:
        if not name.strip():
            return "the header has a column without a name"
        if header.count(name) > 1:
            return f"the header names column '{name}' twice"
    return None
