"""What a metrics file says about a run, as arrays ready to draw.

Owns: reading `metrics.jsonl`'s flat keys back into series, smoothing, and each task's first and last evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import RunError
from trainer.metrics.log import read_metrics

Floats = NDArray[np.float64]


class Series(NamedTuple):
    """A number over the steps at which it was logged and finite."""

    steps: Floats
    values: Floats


class Evaluation(NamedTuple):
    """A task's first and last value of its main metric (the first one its evaluation logs)."""

    task: str
    metric: str
    before: float | None
    after: float


@dataclass(frozen=True)
class RunCurves:
    """A whole metrics file."""

    loss: Series
    lr: Series
    head_lr: Series
    task_loss: dict[str, Series]
    evaluations: list[Evaluation]
    last_step: int


def load_curves(path: Path) -> RunCurves:
    """Read a metrics file; a `RunError` when there is nothing in it to draw."""
    records = read_metrics(path)
    prefix = "train/loss/"
    tasks = sorted({key.removeprefix(prefix) for record in records for key in record if key.startswith(prefix)})
    curves = RunCurves(
        loss=_series(records, "train/loss"),
        lr=_series(records, "train/lr"),
        head_lr=_series(records, "train/lr_heads"),
        task_loss={task: _series(records, prefix + task) for task in tasks},
        evaluations=_evaluations(records),
        last_step=max((record["step"] for record in records), default=0),
    )
    if not len(curves.loss.steps) and not curves.evaluations:
        raise RunError(f"{path}: neither training losses nor evaluations to draw; train for at least one step first")
    return curves


def smooth(series: Series) -> Series:
    """Exponential moving average over a twentieth of the run (at least 3 points), without bias towards the start.

    The average decays with the distance in steps, so that tasks drawn rarely are smoothed over as many steps as others.
    """
    steps, values = series
    if len(steps) < 3:
        return series
    span = max((steps[-1] - steps[0]) / 20, 3 * float(np.median(np.diff(steps))))
    mean = weight = 0.0
    smoothed = np.empty_like(values)
    for i, value in enumerate(values):
        decay = np.exp(-(steps[i] - steps[i - 1]) / span) if i else 0.0
        mean, weight = decay * mean + value, decay * weight + 1.0
        smoothed[i] = mean / weight
    return Series(steps, smoothed)


def _series(records: list[dict[str, Any]], key: str) -> Series:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return Series(steps, values)


def _evaluations(records: list[dict[str, Any]]) -> list[Evaluation]:
    metric_of: dict[str, str] = {}
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            kind, _, rest = key.partition("/")
            task, _, metric = rest.partition("/")
            if kind == "eval" and metric and metric_of.setdefault(task, metric) == metric and value is not None:
                found.setdefault(task, []).append((record["step"], value))
    evaluations = []
    for task, points in sorted(found.items()):
        (first, before), (_, after) = points[0], points[-1]
        # Without an evaluation at step 0 nothing is known about the model before training.
        evaluations.append(Evaluation(task, metric_of[task], before if first == 0 and len(points) > 1 else None, after))
    return evaluations
