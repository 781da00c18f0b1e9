"""What learned weights cost: windows with fixed weights, windows that are read, refreshes, the authors' way, in turns.

    python benchmarks/meta_step.py [--rounds 8] [--micro-batches 5] [--tokens 4096] [--out FILE]

MiniLM on citation_intent and four auxiliaries of ../shared/data, one process, ZeRO-3, a micro-batch a task. Per round,
on the same window:

- fixed: run_window with fixed weights;
- read: the same, each micro-step read against the held-out gradient;
- refresh: the dev head fitted anew and the held-out gradient made anew, on the whole shard, or on 64 rows of it;
- authors: one backward a task with a full copy of its gradient each, ten steps of a fresh head on 32 held-out rows and
  one held-out backward of 32 rows (TARTAN's code, in plain PyTorch on the same model).

Printed: medians, and what follows for a run: (read + refresh / interval) / fixed. Memory is what the method keeps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_bench.setting import cpu
from meta_signal import DATA, END, Bench

TASKS = (END, "scicite", "sciie_relation", "trec6", "sst2")


def authors_way(bench: Bench, model: Any, window: Any) -> None:
    """TARTAN's meta step: gradients a task, kept whole; a fresh head; a held-out batch; cosines; the weighted sum."""
    parameters = [p for n, p in model.named_parameters() if n.startswith("backbone") and "embeddings" not in n]
    weights = window.unit_weights()
    copies: dict[int, Any] = {}
    for (micro,) in window.micro_steps:
        batch = bench.collator(micro.tasks, micro.rows, micro.epochs, weights)
        found = gradients(model(batch)["loss"], parameters)
        task = int(micro.tasks[0])
        copies[task] = found if task not in copies else [a + b for a, b in zip(copies[task], found, strict=True)]
    (batch,) = held_out(bench).held_out.batches(32, 0, 10**9, 0, 1)
    head = torch.nn.Linear(bench.job.hidden_size, bench.job.tasks[0].classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    for _ in range(10):  # the body runs again in every step, as in their code
        with torch.no_grad():
            features = model(batch)["features"]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features), batch.target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    features = model._features(model.backbone(batch), batch)
    loss = torch.nn.functional.cross_entropy(head(features), batch.target)
    flat = torch.cat([g.flatten() for g in gradients(loss, parameters)])
    for found in copies.values():
        torch.cosine_similarity(torch.cat([g.flatten() for g in found]), flat, dim=0)
    for k, parameter in enumerate(parameters):
        parameter.grad = sum(found[k] for found in copies.values())


def gradients(loss: torch.Tensor, parameters: list[Any]) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def held_out(bench: Bench) -> Any:
    return bench.controller.held_out


def contenders(bench: Bench, model: Any) -> dict[str, Callable[[int], object]]:
    from trainer.engine.step import run_window

    session, controller = bench.session, bench.controller
    few = bench.another(held_out={"batch": 64}).held_out
    factors = np.ones(len(bench.job.tasks))

    def window(step: int, gradient: Any) -> None:
        planned = bench.planner.window(step, 1)
        totals, _ = run_window(session, planned, bench.collator, 0, 0.0, False, factors, gradient)
        if gradient is not None:
            controller.after_window(planned, factors, totals.task_loss, gradient)

    return {
        "fixed": lambda step: window(step, None),
        "read": lambda step: window(step, controller.gradient),
        "refresh": lambda step: held_out(bench).refresh(step, controller.gradient),
        "refresh, 64 rows": lambda step: few.refresh(step, controller.gradient),
        "fixed, plain PyTorch": lambda step: plain_window(bench, model, step),
        "authors": lambda step: authors_way(bench, model, bench.planner.window(step, 1)),
    }


def plain_window(bench: Bench, model: Any, step: int) -> None:
    window = bench.planner.window(step, 1)
    model.zero_grad(set_to_none=True)
    for (micro,) in window.micro_steps:
        model(bench.collator(micro.tasks, micro.rows, micro.epochs, window.unit_weights()))["loss"].backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"{DATA}: not here; this benchmark needs the pool of tasks")
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about names that DeepSpeed uses
    from trainer.engine.session import init_distributed
    from trainer.model.multitask import build_model

    with tempfile.TemporaryDirectory() as scratch:
        init_distributed()
        tasks = [str(DATA / name) for name in TASKS]
        window = {"micro_batches": args.micro_batches, "tokens": args.tokens}
        bench = Bench(Path(scratch), tasks, 0, 1000, window, stage=3)
        model = build_model(bench.recipe, bench.job.tasks, None)
        model.train()
        bench.controller.before_window(0)
        runs = contenders(bench, model)
        seconds: dict[str, list[float]] = defaultdict(list)
        for n in range(args.rounds + 1):
            for name, run in runs.items():
                began = time.perf_counter()
                run(n)
                if n:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
        report(bench, seconds, args)


def report(bench: Bench, seconds: dict[str, list[float]], args: argparse.Namespace) -> None:
    median = {name: statistics.median(found) for name, found in seconds.items()}
    every = bench.recipe.meta.every
    ratio = {
        f"run, a refresh every {every} windows": (median["read"] + median["refresh"] / every) / median["fixed"],
        "run, every window refreshes": (median["read"] + median["refresh"]) / median["fixed"],
        "run, every window refreshes, 64 rows": (median["read"] + median["refresh, 64 rows"]) / median["fixed"],
        "authors' way over a plain PyTorch window": median["authors"] / median["fixed, plain PyTorch"],
    }
    shard = sum(piece.numel() * piece.element_size() for piece in bench.controller.shards())
    buffer = bench.session.engine.optimizer.grad_partitions_flat_buffer
    memory = {
        "held-out gradient, MB": shard / 1e6,
        "DeepSpeed's gradients, MB": buffer.numel() * buffer.element_size() / 1e6,
    }
    rows = len(held_out(bench).held_out.rows)
    print(f"{args.micro_batches} x {args.tokens} tokens a window, {rows} held-out rows")
    for name, value in median.items():
        print(f"  {name:<24} {value:8.3f} s  ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})")
    for name, value in ratio.items():
        print(f"  {name:<44} {value:.3f} x")
    for name, value in memory.items():
        print(f"  {name:<44} {value:.1f}")
    if args.out:
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": cpu(),
            "torch": torch.__version__,
            "seconds": seconds,
            "ratio": ratio,
            "memory": memory,
            "held_out_rows": rows,
        }
        args.out.write_text(json.dumps({**found, "arguments": {**vars(args), "out": str(args.out)}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
