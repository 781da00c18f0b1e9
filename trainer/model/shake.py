"""R3F's second pass: the same micro-batch with noise on its embeddings (arXiv 2008.03156).

Owns: `Shake`, what a second pass is to do, and `shaken`, the noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.schema import R3FConfig
from trainer.errors import ModelError
from trainer.losses.interface import Side

_SALT = 0x52334600
"""Keeps the noise's draws apart from dropout's, which have the same seed."""


@dataclass(frozen=True)
class Shake:
    """A second pass of a micro-batch."""

    config: R3FConfig
    weight: float
    """Of the divergence, in this window."""
    seed: int = 0
    """Of the micro-batch: dropout of the first pass was seeded by it."""

    @property
    def sides(self) -> Side:
        """Which passes get gradients, where x is the clean one."""
        sides: dict[str, Side] = {"both": "both", "clean": "x", "noisy": "y"}
        return sides[self.config.gradient]


@contextmanager
def shaken(embeddings: nn.Module, shake: Shake) -> Iterator[None]:
    """Add noise to what `embeddings` gives next, once: of an encoder-decoder, to the encoder's input (as fairseq does).

    The sum is made in fp32 and rounded to the embeddings' type.
    """
    if shake.config.dropout == "shared":
        torch.manual_seed(shake.seed)

    used = False

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        nonlocal used
        handle.remove()
        used = True
        generator = torch.Generator(output.device).manual_seed(shake.seed ^ _SALT)
        noise = torch.empty(output.shape, device=output.device)
        if shake.config.noise == "uniform":
            noise.uniform_(-1.0, 1.0, generator=generator)
        else:
            noise.normal_(generator=generator)
        return (output.float() + shake.config.size * noise).to(output.dtype)

    handle = embeddings.register_forward_hook(add)
    try:
        with torch.set_grad_enabled(shake.config.gradient != "clean"):
            yield
    finally:
        handle.remove()
    if not used:
        raise ModelError("loss.r3f: the model does not call its table of embeddings, so no noise can be added to it")
