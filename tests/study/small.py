"""A tiny study: two arms on one task, in a folder of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml
from support import tiny


def write_study(folder: Path, steps: int = 4, **changes: Any) -> Path:
    """`folder/study.yaml`: arms `alone` and `both` (with a second task that has no test split) on the task `topic`."""
    topic = tiny.task("topic", folder / "tasks")
    draw = random.Random(1)
    topic["test"] = tiny.write_rows(
        folder / "tasks" / "topic" / "test.jsonl", [tiny.row_of("topic", draw) for _ in range(10)]
    )
    for arm, tasks in (("alone", [topic]), ("both", [topic, tiny.task("same", folder / "tasks")])):
        recipe = tiny.values(folder, tasks=tasks, training={"steps": steps}, window={"micro_batches": 2})
        del recipe["name"], recipe["output"]
        (folder / f"{arm}.yaml").write_text(yaml.safe_dump(recipe))
    study = {
        "name": "small",
        "output": "out",
        "metric": "test",
        "seeds": 2,
        "baseline": "alone",
        "tasks": {"topic": {"rate": 2e-3}},
        "arms": {
            "alone": {"recipe": "alone.yaml"},
            "both": {"recipe": "both.yaml", "overrides": ["optimizer.lr={rate}"]},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False))
    return path
