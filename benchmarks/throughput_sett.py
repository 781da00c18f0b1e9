"""Sett's side of `benchmarks/throughput.py`: the windows of a recipe, timed, and nothing else.

Owns: the clock around the real path: planner, collator, engine and update as `sett train` runs them, without
evaluation, checkpoints and logs. Planning and collating are inside the clock. By hand:

    deepspeed --num_gpus 2 benchmarks/throughput_sett.py --recipe FILE --steps 60

FILE is a recipe as JSON. The first rank prints one JSON line with the keys that `throughput_hf.py` prints.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.config import recipe_from
from trainer.engine.schedule import lr_factor
from trainer.engine.session import init_distributed, start
from trainer.engine.step import run_window
from trainer.engine.stop import end_rank
from trainer.run.prepare import prepare_together


def _now(device: torch.device) -> float:
    """The time at which every rank has finished what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    dist.barrier()
    return time.perf_counter()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train in this process (one rank of several) and return the counts of all ranks."""
    recipe = recipe_from(json.loads(options.recipe.read_text(encoding="utf-8")))
    rank, world, device = init_distributed()
    job = prepare_together(recipe, rank)
    session = start(recipe, job.tasks, None, job.random_weights)
    planner = job.planner(world if job.by_step else 1)
    collator = job.collator(job.train)
    last = options.warmup + options.steps
    real = padded = examples = 0
    began = 0.0
    for step in range(last):
        if step == options.warmup:
            began = _now(device)
        window = planner.window(step, world)
        factor = lr_factor(step, last, recipe.optimizer)
        totals, _ = run_window(session, window, collator, recipe.seed, factor, stop=False)
        if step >= options.warmup:
            real += totals.real_tokens
            padded += totals.padded_tokens
            examples += int(window.rows.sum())  # of all ranks: each of them plans the whole window
    seconds = _now(device) - began
    counts = session.all_sum(torch.tensor([real, padded], device=device))
    real, padded = counts.tolist()
    return {
        "real_tokens": real,
        "padded_tokens": padded,
        "examples": examples,
        "seconds": seconds,
        "tokens_per_second": real / seconds,
        "steps": options.steps,
        "world": world,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    return parser.parse_args()


def main() -> None:
    measured = measure(_parse())
    if dist.get_rank() == 0:
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
    end_rank()
