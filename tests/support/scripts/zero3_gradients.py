"""ZeRO-3 gradients of two ranks' batches of different families, and a sharded checkpoint of each model.

    deepspeed --num_gpus 2 --no_local_rank zero3_gradients.py TOKENIZER CHECKPOINTS MODEL [MODEL ...]

A model is `minilm` or an architecture of `tiny_models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from support.ranks import rank_main
from tiny_models import TASKS, Batch, MultiTaskModel, batch_of, minilm, tiny_recipe
from transformers.integrations import HfDeepSpeedConfig

from trainer.config.schema import OptimizerConfig, Recipe
from trainer.model.backbone import model_kind
from trainer.model.multitask import build_model
from trainer.tasks.spec import Family

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "enable_sanity_checks": True},
}


def mixture(kind: str) -> tuple[list[Family], list[Family]]:
    """The families of rank 0's and rank 1's batch: neither holds what the other does."""
    lm = {"encoder": Family.MASKED_LM, "encoder-decoder": Family.SEQ2SEQ, "decoder": Family.CAUSAL_LM}[kind]
    return [Family.CLASSIFICATION, Family.SPAN], [lm, Family.MULTIPLE_CHOICE, Family.REGRESSION]


def recipe_of(model: str, tokenizer: Path) -> Recipe:
    if model == "minilm":
        return Recipe.model_validate({"tasks": ["x"], "seed": 7, "model": {"path": str(minilm()), "dropout": 0.0}})
    return tiny_recipe(model, tokenizer, dropout=0.0)


def build(recipe: Recipe, kind: str) -> MultiTaskModel:
    return build_model(recipe, [TASKS[f] for f in (*mixture(kind)[0], *mixture(kind)[1])])


def batches(model: MultiTaskModel) -> list[Batch]:
    """Rank 0's and rank 1's batch; of different sizes, as they are in a run."""
    first, second = mixture(model.backbone.kind)
    return [batch_of(model, first), batch_of(model, second, lengths=(12, 7))]


def facts(name: str, tokenizer: Path, checkpoint: Path) -> dict[str, Any]:
    """What the test compares with the plain model; the weights, not moved, are saved as `checkpoint`."""
    rank = dist.get_rank()
    recipe = recipe_of(name, tokenizer)
    alive = HfDeepSpeedConfig(CONFIG)
    model = build(recipe, model_kind(recipe.model))
    sharded = sum(hasattr(p, "ds_id") for p in model.backbone.parameters())
    groups = model.parameter_groups(OptimizerConfig())
    engine: Any = deepspeed.initialize(model=model, model_parameters=groups, config=CONFIG)[0]
    # Twice with the batches swapped: the second forward runs against the trace of the first.
    mine = batches(model)
    losses, grads = [], []
    for turn in (0, 1):
        loss = engine(mine[(rank + turn) % 2])["loss"]
        engine.backward(loss)
        grads.append({n: safe_get_full_grad(p) for n, p in model.named_parameters()})
        engine.optimizer.zero_grad()
        losses.append(loss.item())
    generated = None
    if model.backbone.kind != "encoder":
        engine.eval()
        generated = model.generate(mine[0].input_ids, mine[0].attention_mask, 3 + rank, synced_gpus=True)
    engine.save_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    del alive
    return {"losses": losses, "grads": grads, "sharded": sharded, "generated": generated}


def work(tokenizer: str, checkpoints: str, *names: str) -> dict[str, dict[str, Any]]:
    return {name: facts(name, Path(tokenizer), Path(checkpoints) / name) for name in names}


if __name__ == "__main__":
    rank_main(work)
