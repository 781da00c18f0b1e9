"""The weights that runs start with, whole, by the names of their models.

deepspeed --num_gpus N --no_local_rank start_weights.py RECIPE [RECIPE ...]
"""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
from support.ranks import rank_main

from trainer.config import load_recipe
from trainer.engine.session import init_distributed, start
from trainer.run.init_from import begin_from
from trainer.run.prepare import prepare_together


def weights(path: str) -> dict[str, torch.Tensor]:
    recipe = load_recipe(path)
    job = prepare_together(recipe, init_distributed()[0])
    session = start(recipe, job.tasks, Path(path).parent, job.random_weights, begin=begin_from(recipe))
    found = {}
    for name, parameter in session.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def work(*paths: str) -> dict[str, dict[str, torch.Tensor]]:
    return {path: weights(path) for path in paths}


if __name__ == "__main__":
    rank_main(work)
