"""What a run's directory says: what is still to do, and, when nothing is, its result.

Owns: `test.json` (the judged task on test) and `study.json` (where and when the run came to its end). All else is what
any run leaves. There is no other state: a directory copied to another machine is a run done there.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from trainer.errors import RunError
from trainer.metrics.log import FILE_NAME as METRICS
from trainer.metrics.log import read_metrics
from trainer.metrics.table import TaskResult
from trainer.run.environment import commit, device_name
from trainer.run.evaluate_run import result_path
from trainer.run.outcome import RESULTS, chosen_step, read_results
from trainer.study.grid import Run

TEST, PROVENANCE = "test.json", "study.json"


class Action(StrEnum):
    """What a run needs next."""

    TRAIN = "train"
    TEST = "test"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Result:
    """A finished run. Scores are fractions (perplexity as it is), None where the run has no finite number."""

    task: str
    arm: str
    seed: int
    metric: str
    value: float | None
    dev: float | None
    seconds: float | None
    """Training of all stages, without evaluation and start-up, over all the times it was continued."""
    peak_gib: float | None
    """Most memory of the first rank: of the GPU where there is one, else of the host."""
    device: str
    date: str
    commit: str


def next_action(run: Run, split: str) -> Action:
    """What is left to do for a run, from its files alone."""
    if not (run.directory / RESULTS).is_file():
        return Action.TRAIN
    if run.judged and split == "test" and not (run.directory / TEST).is_file():
        return Action.TEST
    return Action.NOTHING


def read_result(run: Run, split: str) -> Result | None:
    """The result of a run; None while it is not finished, and for what is not judged.

    Raises:
        RunError: its files do not belong to this study.
    """
    if not run.judged or next_action(run, split) is not Action.NOTHING:
        return None
    dev = _row(read_results(run.directory / RESULTS), run)
    judged = _row([_read_test(run)], run) if split == "test" else dev
    logs = [read_metrics(stage.run_dir / METRICS) for stage in run.stages if (stage.run_dir / METRICS).is_file()]
    records = logs[-1]
    where = _provenance(run.directory)
    ended = datetime.fromtimestamp(records[-1]["time"], UTC).isoformat(timespec="seconds") if records else ""
    return Result(
        task=run.task,
        arm=run.arm,
        seed=run.seed,
        metric=judged.metric,
        value=_finite(judged.after),
        dev=_finite(dev.after),
        seconds=sum(training_seconds(log) or 0.0 for log in logs) or None,
        peak_gib=max((peak_memory(log) or 0.0 for log in logs), default=0.0) or None,
        device=where.get("device", ""),
        date=where.get("date", ended),
        commit=where.get("commit", ""),
    )


def store_test(run: Run) -> None:
    """Keep the judged task's line of the evaluation that `sett eval --split test --task TASK` has just written."""
    step = chosen_step(run.directory)
    row = _row(read_results(result_path(run.directory, "test", step, [run.task])), run)
    _write(run.directory / TEST, {"step": step, **asdict(row)})


def store_provenance(directory: Path) -> None:
    """Note that the run has come to its end here and now."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    _write(directory / PROVENANCE, {"device": device_name(), "date": date, "commit": commit()})


def training_seconds(records: list[dict[str, Any]]) -> float | None:
    """Seconds of all windows: each line of the log holds the mean of those since the line before."""
    total, last = 0.0, 0
    for record in records:
        if (seconds := record.get("train/seconds_per_window")) is not None:
            total += seconds * (record["step"] - last)
            last = record["step"]
    return total if last else None


def peak_memory(records: list[dict[str, Any]]) -> float | None:
    """GiB: the most that the log has of the GPU, or of the host where there is none."""
    for key in ("memory/gpu_peak_gib", "memory/host_gib"):
        if values := [record[key] for record in records if record.get(key) is not None]:
            return float(max(values))
    return None


def _row(rows: list[TaskResult], run: Run) -> TaskResult:
    for row in rows:
        if row.task == run.task:
            return row
    raise RunError(f"{run.directory}: has no result of the task '{run.task}'; delete it to run it anew")


def _read_test(run: Run) -> TaskResult:
    values = json.loads((run.directory / TEST).read_text())
    return TaskResult(**{key: values[key] for key in TaskResult.__dataclass_fields__})


def _provenance(directory: Path) -> dict[str, str]:
    path = directory / PROVENANCE
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _write(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(temporary, path)
