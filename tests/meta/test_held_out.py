"""Which rows are held out, and the dev head that is fitted for them."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import tiny

from trainer.config import recipe_from
from trainer.engine.session import init_distributed
from trainer.errors import ConfigError
from trainer.losses import ReferenceLosses
from trainer.meta.dev_head import Frozen, fit_converged
from trainer.meta.held_out import Shard
from trainer.model.heads import Head
from trainer.run.prepare import Job, prepare


def job(folder: Path, end: str = "topic", dev: bool = True, **meta: object) -> Job:
    values = tiny.values(folder, meta={"end_task": end, "held_out": {"share": 0.25}, **meta})
    if not dev:
        values["tasks"] = [{k: v for k, v in task.items() if k != "dev"} for task in values["tasks"]]
    return prepare(recipe_from(values))


@pytest.mark.parametrize("dev", [True, False])
@pytest.mark.parametrize("end", ["topic", "same", "fill"])
def test_held_out_rows_are_neither_trained_on_nor_evaluated(tmp_path: Path, end: str, dev: bool) -> None:
    one = job(tmp_path, end, dev)
    assert one.held_out is not None
    index = one.names.index(end)
    parts = {"train": one.train[index], "held out": one.held_out, "dev": one.dev[index]}
    keys = {name: set(view.column("key").tolist()) for name, view in parts.items()}
    assert not keys["held out"] & keys["train"]
    assert not keys["held out"] & keys["dev"]
    assert 8 <= len(one.held_out) <= 15
    whole = prepare(recipe_from({**tiny.values(tmp_path), "tasks": [t.model_dump() for t in one.tasks]}))
    assert len(whole.train[index]) == len(one.train[index]) + len(one.held_out)
    again = job(tmp_path, end, dev)
    assert again.held_out is not None
    assert again.held_out.column("key").tolist() == one.held_out.column("key").tolist()
    pool = one.pools(one.train)[index]
    assert len(pool.lengths) == len(one.train[index]), "the sampler draws from more than the training rows"


def test_other_rules_keep_all_rows(tmp_path: Path) -> None:
    assert job(tmp_path, weights="equal").held_out is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end": "topik"}, "meta.end_task: no task named 'topik' (did you mean 'topic'?)"),
        ({"initial": {"some": 1}}, "meta.initial: no task named 'some'"),
        ({"held_out": {"share": 0.05}}, "meta.held_out: 3 of the 60 training rows of 'topic' are too few"),
    ],
)
def test_bad_input(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        job(tmp_path, **changes)  # type: ignore[arg-type]


def test_row_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"window.heterogeneity: 'row' mixes tasks .* meta needs 'rank' or 'step'"):
        tiny.recipe(tmp_path, meta={"end_task": "topic"}, window={"heterogeneity": "row"})


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("end", ["topic", "find", "fill", "score"])
def test_batches_of_all_ranks_are_a_mean_over_the_draw(tmp_path: Path, end: str, world_size: int) -> None:
    one = job(tmp_path, end)
    index, rows = one.names.index(end), one.held_out
    assert rows is not None
    shard = Shard(
        rows, one.units(one.tasks[index], rows), one.views(one.train), index, one.facts, one.recipe.loss, 0, 1
    )
    ranks = [shard.batches(9, 4, 100, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    weights = [
        torch.cat([batch.weight, batch.regression_weight, batch.lm_weight]).sum() for bs in ranks for batch in bs
    ]
    scale = one.recipe.loss.regression_scale if end == "score" else 1.0
    assert float(torch.stack(weights).sum()) == pytest.approx(scale, rel=1e-5)
    drawn = [shard.batches(9, number, 10**6, 0, 1)[0].input_ids.sum() for number in range(4)]
    assert len({int(d) for d in drawn}) > 1


def test_the_fitted_head_is_the_best_there_is(tmp_path: Path) -> None:
    """Its loss has no gradient left: the envelope theorem holds there and nowhere else."""
    init_distributed()
    one = job(tmp_path)
    rows = one.held_out
    assert rows is not None
    shard = Shard(rows, one.units(one.tasks[0], rows), one.views(one.train), 0, one.facts, one.recipe.loss, 0, 1)
    (batch,) = shard.batches(100, 0, 10**6, 0, 1)
    torch.manual_seed(0)
    features = torch.randn(len(batch.pooled), 32)
    first = one.heads.first_row("topic")
    head = fit_converged(
        [Frozen(features, batch)], ReferenceLosses(), Head("topic", first, 3, "classification", ()), 0.2
    )
    weight = head.weight.double().requires_grad_()
    bias = head.bias.double().requires_grad_()
    loss = F.cross_entropy(features.double() @ weight.T + bias, batch.target) + 0.1 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-6
    assert float(weight.detach().abs().max()) > 0.1


def test_the_text_of_held_out_rows_is_not_modelled_either(tmp_path: Path) -> None:
    values = tiny.values(tmp_path)
    topic = tmp_path / "tasks" / "topic"
    card = {key: value for key, value in values["tasks"][0].items() if key not in ("train", "dev")}
    (topic / "task.json").write_text(json.dumps(card))
    tasks = [str(topic), f"masked_lm:{topic}"]
    meta = {"end_task": "topic", "held_out": {"share": 0.25}}
    one = prepare(recipe_from({**values, "tasks": tasks, "meta": meta}))
    assert one.names == ["topic", "topic.masked_lm"]
    assert one.held_out is not None
    text, held_out = (set(view.column("key").tolist()) for view in (one.train[1], one.held_out))
    assert not text & held_out
    whole = prepare(recipe_from({**values, "tasks": tasks}))
    assert len(whole.train[1]) == len(one.train[1]) + len(one.held_out)
