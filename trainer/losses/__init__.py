"""Losses: every one a softmax over a segment, except squared error.

Owns: the choice of who computes them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Literal

from trainer.losses import build, fused
from trainer.losses.build import KernelBuildError
from trainer.losses.interface import IGNORE, Divergence, HeadLoss, Losses, SegmentLoss, Side, VocabularyLoss
from trainer.losses.reference import ReferenceLosses

__all__ = [
    "IGNORE",
    "Divergence",
    "HeadLoss",
    "KernelBuildError",
    "Losses",
    "ReferenceLosses",
    "SegmentLoss",
    "Side",
    "VocabularyLoss",
    "choose",
    "compile_ahead",
]

Kernels = Literal["auto", "fused", "reference"]


def compile_ahead(kernels: Kernels, say: Callable[[str], None]) -> None:
    """Compile the kernels before ranks start, so that none of them has to.

    Args:
        kernels: of the recipe.
        say: gets a line when a build starts and one when it has ended.

    Raises:
        KernelBuildError: `fused` was asked for and cannot be compiled here. `auto` leaves the warning to `choose`.
    """
    if kernels == "reference":
        return
    try:
        build.library(say=say)
    except KernelBuildError:
        if kernels == "fused":
            raise


def choose(kernels: Kernels) -> Losses:
    """Who computes the losses: the fused kernels, compiled if need be, or plain PyTorch.

    Args:
        kernels: `auto` takes the fused ones wherever they can be compiled, else warns once a machine.

    Raises:
        KernelBuildError: `fused` was asked for and cannot be compiled here.
    """
    if kernels == "reference":
        return ReferenceLosses()
    try:
        fused.load(_say)
    except KernelBuildError as error:
        if kernels == "fused":
            raise
        _say(
            f"warning: the losses run in plain PyTorch, which is slower: {error}\n"
            "`sett kernels` tries again; `kernels: reference` in the recipe says that this is meant"
        )
        return ReferenceLosses()
    return fused.FusedLosses()


def _say(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
