"""Run directories with everything a report reads, without training: the real log writer, recipe and table writers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import recipe_from, save_recipe
from trainer.metrics.log import MetricsLog
from trainer.metrics.table import TaskResult, write_results

TASKS = {
    "topic": ("classification", "accuracy"),
    "mood": ("classification", "macro_f1"),
    "score": ("regression", "pearson_spearman"),
    "text": ("masked_lm", "perplexity"),
}
MANY = {f"task_{i:03}": (("classification", "pair_classification", "span")[i % 3], "accuracy") for i in range(117)}


def write_run(
    run: Path,
    tasks: dict[str, tuple[str, str]] = TASKS,
    steps: int = 40,
    every: int = 10,
    seed: int = 0,
    evaluated: bool = True,
    finished: bool = True,
    meta: bool = False,
    **recipe: Any,
) -> Path:
    """A run of `steps` windows whose numbers follow from `seed`, evaluated `every` so many."""
    draw = random.Random(seed)
    run.mkdir(parents=True)
    values = {"name": run.name, "output": str(run.parent), "model": {"path": "package:any"}, "tasks": ["tasks/*"]}
    values |= {"meta": {"end_task": next(iter(tasks))}} if meta else {}
    save_recipe(recipe_from({**values, "training": {"steps": steps}, **recipe}), run / "recipe.yaml")
    first, last = scores(tasks, 0.2, draw), {}
    with MetricsLog(run, None) as log:
        if evaluated:
            log.write(0, flat(tasks, first))
        for step in range(1, steps + 1):
            log.write(step, window(tasks, step / steps, draw, meta))
            if evaluated and (step % every == 0 or step == steps):
                last = scores(tasks, 0.2 + 0.6 * step / steps, draw)
                log.write(step, flat(tasks, last))
    if finished:
        rows = [
            TaskResult(
                name, family, metric, 50, None if metric == "perplexity" else 0.25, first[name], last.get(name), 900
            )
            for name, (family, metric) in tasks.items()
        ]
        write_results(run / "results.json", rows)
        mark(run, steps, finished=True)
    return run


def mark(run: Path, step: int, finished: bool) -> None:
    """A checkpoint of which only the marker is there."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state = {"step": step, "world_size": 2, "zero_stage": 3, "group": 1, "finished": finished}
    (folder / "sett.json").write_text(json.dumps(state))


def scores(tasks: dict[str, tuple[str, str]], level: float, draw: random.Random) -> dict[str, float]:
    return {
        name: 200 * (1 - level) * draw.uniform(0.8, 1.2) if metric == "perplexity" else level + draw.uniform(-0.1, 0.1)
        for name, (_, metric) in tasks.items()
    }


def flat(tasks: dict[str, tuple[str, str]], values: dict[str, float]) -> dict[str, float]:
    found = {f"eval/{name}/{tasks[name][1]}": value for name, value in values.items()}
    found |= {f"eval/{name}/loss": 1.0 for name in values}
    fractions = [value for name, value in values.items() if tasks[name][1] != "perplexity"]
    return {**found, "eval/mean": sum(fractions) / len(fractions)} if fractions else found


def window(tasks: dict[str, tuple[str, str]], part: float, draw: random.Random, meta: bool) -> dict[str, float]:
    counts = [draw.randint(0, 9) for _ in tasks]
    values = {
        "train/loss": 0.4 + 0.6 * math.exp(-3 * part) + draw.gauss(0, 0.05),
        "train/grad_norm": draw.uniform(0.5, 2),
        "train/tokens_per_second": draw.uniform(900, 1100),
        "train/padding": draw.uniform(0.1, 0.2),
        "train/seconds_per_window": 2.0,
        "train/lr": 2e-4 * (1 - part),
        "train/lr_heads": 4e-3 * (1 - part),
        "memory/host_gib": 2.0 + part,
    }
    for index, (name, count) in enumerate(zip(tasks, counts, strict=True)):
        if count:
            values[f"train/loss/{name}"] = 0.3 + 0.7 * math.exp(-(2 + index % 5) * part) + draw.gauss(0, 0.06)
        values[f"share/{name}"] = count / (sum(counts) or 1)
    if meta:
        raw = [math.exp(part * math.sin(5 * index)) for index in range(len(tasks))]
        for index, name in enumerate(tasks):
            values[f"weight/{name}"] = raw[index] / sum(raw)
            values[f"alignment/{name}"] = 0.1 * math.sin(index) + draw.gauss(0, 0.01)
            values[f"alignment_error/{name}"] = 0.02 + 0.1 * (1 - part)
        values["meta/held_out_loss"] = 1 - part / 2
    return values


def append(run: Path, records: Sequence[dict[str, Any]]) -> None:
    """Lines of the log as they stand, for what the writer would not write."""
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
