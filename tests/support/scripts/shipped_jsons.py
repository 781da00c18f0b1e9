"""Train a small module for three windows under each DeepSpeed JSON; the result is the weights by name.

    deepspeed --num_gpus 2 --no_local_rank shipped_jsons.py '{"NAME": JSON or name of a shipped one, ...}'

`plain_pytorch` trains the same in one process without DeepSpeed.
"""

from __future__ import annotations

import json
from typing import Any

import deepspeed
import torch
from support.ranks import rank_main
from torch import Tensor, nn

from trainer.config.schema import Recipe
from trainer.engine.deepspeed_json import resolve, stage

WINDOWS, MICRO_BATCHES, ROWS = 3, 8, 5


class Tiny(nn.Module):
    """Two layers and a mean over the window's rows; the loss is computed inside `forward`, as in Sett."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self.head(torch.tanh(self.body(x)))
        return nn.functional.cross_entropy(scores.float(), y, reduction="sum") / (MICRO_BATCHES * ROWS)


def micro_batch(window: int, index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * window + index)
    return torch.randn(ROWS, 6, generator=generator), torch.randint(4, (ROWS,), generator=generator)


def recipe(deepspeed_json: str | dict[str, Any]) -> Recipe:
    # The clip is small enough to bind and the decay large enough to show.
    optimizer = {"lr": 1e-2, "weight_decay": 0.1, "clip": 0.2}
    sections: dict[str, Any] = {"optimizer": optimizer, "window": {"micro_batches": MICRO_BATCHES}}
    return Recipe(model={"path": "unused"}, tasks=["unused"], deepspeed=deepspeed_json, **sections)


def plain_pytorch() -> dict[str, Tensor]:
    model, settings = Tiny(), recipe({}).optimizer
    adamw = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    for window in range(WINDOWS):
        for index in range(MICRO_BATCHES):
            model(*micro_batch(window, index)).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), settings.clip) > settings.clip
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def train(deepspeed_json: str | dict[str, Any]) -> dict[str, Tensor]:
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    model = Tiny()
    config = resolve(recipe(deepspeed_json), world_size, hidden_size=12, device="cpu")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for window in range(WINDOWS):
        for step in range(config["gradient_accumulation_steps"]):
            loss = engine(*micro_batch(window, step * world_size + rank))
            # DeepSpeed averages over the ranks; the window's loss is a sum over them.
            engine.backward(loss * world_size, scale_wrt_gas=False)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage(config) == 3):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def work(jsons: str) -> dict[str, dict[str, Tensor]]:
    return {name: train(value) for name, value in json.loads(jsons).items()}


if __name__ == "__main__":
    rank_main(work)
