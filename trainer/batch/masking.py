"""Dynamic masking for masked language modelling (BERT section 3.1, RoBERTa section 4.1).

Owns: which tokens are masked and what stands in their place, as a pure function of (seed, task, epoch, row): a row is
masked anew every epoch and identically after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.window.hashing import mix

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class MaskRule:
    """What masking needs to know of the tokenizer."""

    probability: float
    mask_id: int
    vocabulary: int
    special_ids: tuple[int, ...]


def masked_units(maskable: NDArray[np.int64], probability: float) -> NDArray[np.int64]:
    """How many of `maskable` tokens are masked: known without drawing them, so that denominators are exact."""
    wanted = np.maximum(1, np.rint(maskable * probability))
    return np.asarray(np.minimum(wanted, np.maximum(maskable, 1)), np.int64)


def mask_tokens(ids: Ids, rule: MaskRule, *key: int) -> tuple[Ids, NDArray[np.int64]]:
    """Mask a sequence; `key` is (seed, task, epoch, row).

    Returns:
        The ids with 80 % of the chosen positions masked, 10 % replaced by a random token and 10 % kept, and the chosen
        positions in ascending order.
    """
    maskable = np.flatnonzero(~np.isin(ids, rule.special_ids))
    if not len(maskable):  # nothing but special tokens: predict the first one, so that the row has its one unit
        return ids, np.zeros(1, np.int64)
    count = int(masked_units(np.array([len(maskable)]), rule.probability)[0])
    chosen = np.sort(maskable[np.argsort(mix(*key, 0, maskable))[:count]])
    fate = mix(*key, 1, chosen).astype(np.float64) / 2**64
    random_ids = (mix(*key, 2, chosen) % np.uint64(rule.vocabulary)).astype(np.int32)
    out = ids.copy()
    out[chosen] = np.where(fate < 0.8, rule.mask_id, np.where(fate < 0.9, random_ids, ids[chosen]))
    return out, chosen
