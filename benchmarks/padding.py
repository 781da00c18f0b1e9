"""How much of a recipe's windows is padding, how full its micro-batches are, and how long ranks wait for each other's;
trains nothing.

Owns: the count. Real and padded tokens are those of the batches the collator makes; full is their share of
`window.tokens`; waiting is what the ranks of a micro-step would lose if time went by padded tokens.

    python benchmarks/padding.py recipes/quickstart.yaml [key.path=value ...] [--ranks 2] [--windows 64]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.config import load_recipe
from trainer.run.prepare import Job, prepare


def shares(job: Job, ranks: int, windows: int) -> tuple[float, float, float]:
    """Padding as a share of all tokens, tokens as a share of the budget, and waiting as a share of the time of all
    ranks, over the first `windows`."""
    planner, collator = job.planner(ranks if job.by_step else 1), job.collator(job.train)
    real = padded = slots = 0
    for step in range(windows):
        window = planner.window(step, ranks)
        weights = window.unit_weights()
        for micro_step in window.micro_steps:
            batches = [collator(m.tasks, m.rows, m.epochs, weights) for m in micro_step]
            real += sum(batch.real_tokens for batch in batches)
            padded += sum(batch.padded_tokens for batch in batches)
            slots += ranks * max(batch.padded_tokens for batch in batches)
    budget = windows * job.recipe.window.micro_batches * job.recipe.window.tokens
    return 1 - real / padded, padded / budget, 1 - padded / slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()
    job = prepare(load_recipe(options.recipe, options.overrides))
    padding, full, waiting = shares(job, options.ranks, options.windows)
    window = job.recipe.window
    what = f"{len(job.tasks)} tasks, {window.heterogeneity.value}, {window.micro_batches} x {window.tokens} tokens"
    print(f"{what}: padding {padding:.1%}, {full:.0%} full, waiting {waiting:.1%}")


if __name__ == "__main__":
    main()
