"""Starting from another run: its weights to the bit, under every ZeRO stage, on one rank and two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import tiny
from support.ranks import run_ranks

from trainer.config import Recipe, load_recipe
from trainer.engine.checkpoint import Checkpoints, load_weights
from trainer.engine.launch import Launch
from trainer.model.multitask import build_model
from trainer.run.job import train
from trainer.run.prepare import prepare

CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "language model": (["fill", "same", "topic", "score"], {}),
    "no language model": (["same", "topic", "score"], {}),
    "heads": (["same", "topic", "score"], {"heads": True}),
    "last": (["same", "topic", "score"], {"checkpoint": "last"}),
}
STAGES = {0: {"stage": 0}, 2: {"stage": 2}, 3: {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run whose best checkpoint is not its last."""
    folder = tmp_path_factory.mktemp("init_from")
    tasks = [tiny.task(name, folder / "tasks") for name in ("fill", "topic", "score")]
    checkpoint = {"every": 1, "keep_last": 9}
    recipe = tiny.recipe(folder, name="source", tasks=tasks, training={"steps": 4}, checkpoint=checkpoint)
    train(recipe, Launch(num_gpus=1))
    marker = Checkpoints(recipe.run_dir, 1, True).path(4) / "sett.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "best_step": 2}))
    return recipe


def recipe_files(source: Recipe) -> dict[str, Path]:
    """A recipe for each case and ZeRO stage, by `case, stage`."""
    folder, files = source.output.parent, {}
    for case, (names, start) in CASES.items():
        for stage, zero in STAGES.items():
            path = folder / f"{case}-{stage}".replace(" ", "-") / "recipe.yaml"
            path.parent.mkdir(exist_ok=True)
            changes = {"tasks": [tiny.task(name, folder / "tasks") for name in names], "training": {"steps": 4}}
            start = {"run": str(source.run_dir), **start}
            values = tiny.values(folder, init_from=start, deepspeed={"zero_optimization": zero}, **changes)
            path.write_text(yaml.safe_dump(values))
            files[f"{case}, {stage}"] = path
    return files


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def started(source: Recipe, request: pytest.FixtureRequest) -> dict[str, list[dict[str, torch.Tensor]]]:
    """`case, stage` -> the weights that each rank started with."""
    files = recipe_files(source)
    out = source.output.parent / f"ranks-{request.param}"
    found = run_ranks("start_weights.py", request.param, out, *(str(path) for path in files.values()))
    return {name: [rank[str(path)] for rank in found] for name, path in files.items()}


def expected(case: str, source: Recipe) -> dict[str, torch.Tensor]:
    """A fresh model with what is taken over written out by hand."""
    recipe = load_recipe(recipe_files(source)[f"{case}, 0"])
    fresh = build_model(recipe, prepare(recipe).tasks)
    weights = {name: parameter.detach().clone() for name, parameter in fresh.named_parameters()}
    step = 4 if case == "last" else 2
    state = load_weights(Checkpoints(source.run_dir, 1, True).path(step))
    for name in weights:
        theirs = name if case == "language model" else name.replace("backbone.body.", "backbone.body.bert.")
        if not name.startswith("head."):
            assert theirs in state, theirs
            weights[name] = state[theirs]
    if case == "heads":  # score and topic (3 classes) lie behind `same` (2 classes) now
        for name in ("head.weight", "head.bias"):
            weights[name][2:6] = state[name][0:4]
    return weights


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_every_rank_starts_with_the_weights_of_the_checkpoint(
    case: str, stage: int, source: Recipe, started: dict[str, list[dict[str, torch.Tensor]]]
) -> None:
    wanted = expected(case, source)
    for weights in started[f"{case}, {stage}"]:
        assert weights.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(weights[name], wanted[name])] == []


@pytest.mark.distributed
def test_the_checkpoints_differ_in_everything_that_is_carried(source: Recipe) -> None:
    """Else the tests above would pass on a model that takes over nothing, or the wrong checkpoint."""
    fresh, best, last = (expected(case, source) for case in ("no language model", "heads", "last"))
    assert not torch.equal(fresh["head.weight"], best["head.weight"])
    name = "backbone.body.encoder.layer.0.output.dense.weight"
    assert not torch.equal(best[name], last[name])
    recipe = load_recipe(recipe_files(source)["last, 0"])
    plain = dict(build_model(recipe, prepare(recipe).tasks).named_parameters())
    assert not torch.equal(plain[name].detach(), best[name])
    assert not torch.equal(plain["trunk.dense.weight"].detach(), best["trunk.dense.weight"])
