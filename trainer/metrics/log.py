"""The numbers of a run: `metrics.jsonl` and DeepSpeed's monitors.

Owns: the file's format: one JSON object a line with `step`, `time` (seconds since 1970) and flat keys such as
`train/loss` or `eval/<task>/<metric>`; NaN and infinities are null. Only rank 0 makes a `MetricsLog`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from trainer.errors import RunError

FILE_NAME = "metrics.jsonl"


class Monitor(Protocol):
    """What is used of DeepSpeed's `engine.monitor`."""

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None: ...


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl`, a whole line at a time, and forwards the same numbers to the monitor."""

    def __init__(self, run_dir: Path, monitor: Monitor | None):
        self.path = run_dir / FILE_NAME
        self._monitor = monitor
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._mend_last_line()
        self._file = self.path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line. It is in the file (not in a buffer of ours) when this returns."""
        numbers = {name: float(value) for name, value in values.items()}
        record: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        record |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        if self._monitor is not None:
            self._monitor.write_events([(name, value, step) for name, value in numbers.items()])

    def truncate_after(self, step: int) -> None:
        """Drop lines of later steps: a run resumed at `step` writes them again."""
        self._file.close()
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mend_last_line(self) -> None:
        """A killed process may leave half a line; the next one must not be glued to it."""
        content = self.path.read_bytes()
        if not content or content.endswith(b"\n"):
            return
        whole = content.rfind(b"\n") + 1
        with self.path.open("r+b") as file:
            if _parse(content[whole:]) is None:
                file.truncate(whole)
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in order. A half-written last line is skipped, any other bad line is an error."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; is this the folder of a run that has started training?") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            if number == len(lines):
                break
            raise RunError(f"{path}:{number}: not a line of metrics (a JSON object with 'step'); remove that line")
        records.append(record)
    return records


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
