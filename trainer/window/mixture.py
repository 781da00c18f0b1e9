"""How often each task is drawn: sampling rules as shares of examples.

Owns: the rules (proportional: MUPPET section 2; temperature and cap: T5, SeqIO; equal; fixed). What a share of
examples means in micro-batches is the planner's business.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.config.schema import SamplingConfig, SamplingRule
from trainer.errors import ConfigError, nearest


def example_shares(names: list[str], sizes: NDArray[np.int64], config: SamplingConfig) -> NDArray[np.float64]:
    """[T] expected share of each task among the examples of a window; sums to 1.

    Args:
        names: task names, for `fixed` rates.
        sizes: [T] training rows of each task.

    Raises:
        ConfigError: a rate is missing, names an unknown task, or all are zero.
    """
    n = sizes.astype(np.float64)
    if config.cap is not None:
        n = np.minimum(n, config.cap)
    match config.rule:
        case SamplingRule.PROPORTIONAL:
            rates = sizes.astype(np.float64)
        case SamplingRule.CAPPED:
            rates = n
        case SamplingRule.TEMPERATURE:
            rates = n ** (1.0 / config.temperature)
        case SamplingRule.EQUAL:
            rates = np.ones_like(n)
        case SamplingRule.FIXED:
            rates = _fixed(names, config.rates)
    return np.asarray(rates / rates.sum(), np.float64)


def _fixed(names: list[str], given: dict[str, float]) -> NDArray[np.float64]:
    for name in given:
        if name not in names:
            raise ConfigError(f"sampling.rates.{name}: no task of that name{nearest(name, names)}")
    if missing := [name for name in names if name not in given]:
        raise ConfigError(f"sampling.rates: no rate for task '{missing[0]}' (0 leaves a task out)")
    rates = np.array([given[name] for name in names], np.float64)
    if not rates.sum() > 0:
        raise ConfigError("sampling.rates: all rates are 0")
    return rates
