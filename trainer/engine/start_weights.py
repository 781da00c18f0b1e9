"""Weights of one run as the start of another, under any ZeRO stage and on any number of ranks.

Owns: writing them into a model that is built and not yet handed to DeepSpeed. Only the first rank has them, in host
memory; each parameter goes to the other ranks, or to their shards, by itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.model.carry import HEAD, Carried
from trainer.model.multitask import MultiTaskModel


def write_weights(model: MultiTaskModel, what: Carried, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Overwrite what is taken over; every rank must call it.

    Args:
        model: ours, the same on every rank, perhaps sharded as it was loaded (ZeRO-3).
        what: which parameters, and which of the state's.
        state: theirs, under every name. Only the first rank's is read.
        device: where collectives run.
    """
    for name, parameter in model.named_parameters():
        if name in what.whole:
            _write(parameter, [(slice(None), state.get(what.whole[name]), slice(None))], device)
        elif name in HEAD and what.rows:
            rows = what.rows.values()
            theirs = state.get(name)
            parts = [(slice(r.ours, r.ours + r.size), theirs, slice(r.theirs, r.theirs + r.size)) for r in rows]
            _write(parameter, parts, device)


@torch.no_grad()
def _write(parameter: nn.Parameter, parts: list[tuple[slice, Tensor | None, slice]], device: torch.device) -> None:
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            _copy(parameter, parts)
        return
    _copy(parameter, parts)
    moved = parameter.data.to(device)
    dist.broadcast(moved, src=0)
    parameter.data.copy_(moved)


def _copy(parameter: nn.Parameter, parts: list[tuple[slice, Tensor | None, slice]]) -> None:
    if dist.get_rank() == 0:
        for mine, theirs, rows in parts:
            assert theirs is not None, "the state lacks what its own model has"
            parameter.data[mine].copy_(theirs[rows])
