"""The learning-rate schedule as a pure function of the step: it has no state to save or to restore.

Owns: warm-up and decay (MUPPET: linear warm-up, polynomial decay).
"""

from __future__ import annotations

import math

from trainer.config.schema import OptimizerConfig


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Windows of warm-up: `warmup` is a share of `steps` below 1, else a number."""
    return round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)


def lr_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak learning rates for optimizer step `step` (from 0) of `steps`."""
    warm = warmup_steps(config, steps)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warm) / max(1, steps - warm))
    match config.schedule:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "polynomial":
            return float((1.0 - done) ** config.power)
        case _:
            return 1.0 - done
