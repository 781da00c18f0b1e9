"""Which parameters are the layers of the backbone, by their names alone.

Owns: `layer_parameters`. Embeddings, heads, poolers and output layers are in no layer: they are read by some tasks and
not by others, so that gradients by them say little about how tasks get on.
"""

from __future__ import annotations

import re
from collections import defaultdict

from torch import nn

from trainer.errors import ModelError

_LAYER = re.compile(r"^(backbone\..*?)\.(\d+)\.")


def layer_parameters(model: nn.Module, last: int | None = None) -> dict[str, nn.Parameter]:
    """Trained parameters of the backbone's layers, by name.

    Args:
        model: a `MultiTaskModel`.
        last: how many layers of each stack (an encoder-decoder has two) from the end; None for all.

    Raises:
        ModelError: there are none.
    """
    stacks: dict[str, dict[str, int]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (found := _LAYER.match(name)):
            stacks[found[1]][name] = int(found[2])
    chosen = set()
    for layers in stacks.values():
        first = 0 if last is None else max(layers.values()) + 1 - last
        chosen |= {name for name, number in layers.items() if number >= first}
    if not chosen:
        raise ModelError("meta.layers: no numbered layers among the backbone's parameters")
    return {name: parameter for name, parameter in model.named_parameters() if name in chosen}
