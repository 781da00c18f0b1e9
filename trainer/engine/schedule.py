"""What changes with the step alone, as pure functions of it: nothing to save or to restore.

Owns: the learning rate's warm-up and decay (MUPPET: linear warm-up, polynomial decay), and when and how much of R3F.
"""

from __future__ import annotations

import math

from trainer.config.schema import OptimizerConfig, R3FConfig
from trainer.model.shake import Shake


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Windows of warm-up: `warmup` is a share of `steps` below 1, else a number."""
    return _windows(config.warmup, steps)


def shake_at(step: int, steps: int, config: R3FConfig | None) -> Shake | None:
    """The second pass of window `step` of `steps`; None where it has none."""
    if config is None or step % config.every or not config.weight:
        return None
    return Shake(config, config.weight * min(1.0, (step + 1) / max(1, _windows(config.warmup, steps))))


def _windows(number: float, steps: int) -> int:
    return round(number * steps) if number < 1 else int(number)


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
