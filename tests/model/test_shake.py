"""R3F's second pass: where the noise goes, what the divergence is, and whom its gradient reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch_of, families_of, tiny_model, tiny_recipe, write_tokenizer
from torch import Tensor, nn

from trainer.batch.batch import Batch
from trainer.config.schema import R3FConfig
from trainer.engine.schedule import shake_at
from trainer.errors import ModelError
from trainer.model.multitask import MultiTaskModel
from trainer.model.shake import Shake, shaken

ARCHITECTURES = ["bert", "bart", "t5", "llama"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def made(architecture: str, tokenizer: Path) -> tuple[MultiTaskModel, Batch]:
    """A model of all families that its kind has, without dropout, and a batch of all of them."""
    recipe = tiny_recipe(architecture, tokenizer)
    families = families_of(recipe)
    model = tiny_model(recipe, families).eval()
    return model, batch_of(model, families)


def shake(weight: float = 1.0, **config: Any) -> Shake:
    return Shake(R3FConfig.model_validate({"size": 0.2, **config}), weight, seed=5)


def apart(x: Tensor, y: Tensor) -> Tensor:
    """Symmetric KL of the rows of two tables of scores, as fairseq writes it."""
    p, q = F.log_softmax(x, -1), F.log_softmax(y, -1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1) + F.kl_div(
        p, q, reduction="none", log_target=True
    ).sum(-1)


def by_hand(model: MultiTaskModel, batch: Batch, what: Shake, detach: tuple[bool, bool]) -> Tensor:
    """The divergence from two plain passes, each a constant where `detach` says so."""
    passes = [model._see(batch)]
    with shaken(model.backbone.embeddings, what):
        passes.append(model._see(batch))
    assert model.head is not None
    tables = []
    for (hidden, features), constant in zip(passes, detach, strict=True):
        small = F.linear(features, model.head.weight, model.head.bias)
        words = None if model.vocabulary is None else model.vocabulary.logits(hidden[batch.lm_positions])
        tables.append(tuple(t.detach() if constant and t is not None else t for t in (small, words)))
    (x, xs), (y, ys) = tables
    total = x.new_zeros(())
    for g, (feature, features, row, rows) in enumerate(batch.segments.tolist()):
        part = (slice(feature, feature + features), slice(row, row + rows))
        total = total + batch.weight[g] * apart(x[part].flatten(), y[part].flatten())
    for n, (feature, row) in enumerate(batch.regression_scores.tolist()):
        total = total + batch.regression_weight[n] * (x[feature, row] - y[feature, row]) ** 2
    if xs is not None:
        total = total + (batch.lm_weight * apart(xs, ys)).sum()
    return what.weight * total


@pytest.mark.parametrize("gradient", ["both", "clean", "noisy"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_divergence_and_its_gradients(architecture: str, gradient: str, tokenizer: Path) -> None:
    model, batch = made(architecture, tokenizer)
    model.double()  # a tiny BART's decoder hardly looks at its encoder
    what = shake(3.0, gradient=gradient)
    plain = model(batch)
    found = model(batch, shake=what)
    expected = by_hand(model, batch, Shake(R3FConfig(size=0.2), 3.0, 5), (gradient == "noisy", gradient == "clean"))
    assert float(expected) > 1e-7
    assert float(found["r3f"]) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(found["loss"], plain["loss"] + found["r3f"])
    torch.testing.assert_close(found["by_task"], plain["by_task"])
    mine = flat_gradient(model, found["loss"]) - flat_gradient(model, plain["loss"])
    wanted = flat_gradient(model, expected)
    # Root-mean-square norms of T5 and Llama are in fp32 whatever the weights are.
    assert float((mine - wanted).norm()) < 1e-4 * float(wanted.norm())


def flat_gradient(model: MultiTaskModel, loss: Tensor) -> Tensor:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(p * 0 if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]).detach()


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise_is_on_the_embeddings_of_the_input(architecture: str, noise: str, tokenizer: Path) -> None:
    model, batch = made(architecture, tokenizer)
    seen: dict[str, list[Tensor]] = {}
    tables = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}

    def note(name: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(name, []).append(output.detach().clone())

    with torch.no_grad():
        model(batch)
        with shaken(model.backbone.embeddings, shake(noise=noise, size=0.01)):
            for name, table in tables.items():  # after the hook that adds noise
                table.register_forward_hook(note(name))
            model._see(batch)
        noisy = seen.copy()
        seen.clear()
        model._see(batch)
    gaps = {name: [(a - b).abs() for a, b in zip(noisy[name], seen[name], strict=True)] for name in noisy}
    touched = {(name, k) for name, calls in gaps.items() for k, gap in enumerate(calls) if gap.any()}
    table = next(name for name, m in tables.items() if m is model.backbone.embeddings)
    assert touched == {(table, 0)}, "the input's tokens, once; not those of the decoder, positions or types"
    gap = gaps[table][0]
    if noise == "uniform":
        assert 0.0095 < float(gap.max()) <= 0.0100001
        assert float(gap.mean()) == pytest.approx(0.005, rel=0.1)
    else:
        assert float(gap.square().mean().sqrt()) == pytest.approx(0.01, rel=0.1)


def test_dropout_is_shared_or_not(tokenizer: Path) -> None:
    """Next to no noise: what is apart is dropout's alone."""
    model, batch = made("bert", tokenizer)
    model.train()
    found = {}
    for dropout in ("shared", "independent"):
        torch.manual_seed(5)  # as training does for each micro-batch
        found[dropout] = float(model(batch, shake=shake(dropout=dropout, size=1e-6))["r3f"].detach())
    assert found["shared"] < 1e-6
    assert found["independent"] > 1e-4


def test_a_model_that_never_embeds_says_so() -> None:
    match = r"loss\.r3f: the model does not call its table of embeddings"
    with pytest.raises(ModelError, match=match), shaken(nn.Embedding(2, 2), shake()):
        pass


def test_schedule() -> None:
    config = R3FConfig(weight=2.0, every=3, warmup=6)
    found = [shake_at(step, 100, config) for step in range(12)]
    assert [None if one is None else one.weight for one in found] == [
        *(2.0 / 6, None, None), *(2.0 * 4 / 6, None, None), *(2.0, None, None), *(2.0, None, None),
    ]  # fmt: skip
    assert shake_at(0, 100, None) is None
    assert shake_at(0, 100, R3FConfig(weight=0.0)) is None
    share = shake_at(4, 100, R3FConfig(warmup=0.1))
    assert share is not None
    assert share.weight == 0.5
