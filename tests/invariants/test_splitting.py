"""The loss of a window and its gradient do not depend on padding, on row order inside a micro-batch, or on how rows are
split into micro-batches; and the loss is the mean over the window that is promised.

Real models, tokenised rows and collator, in one process and float64, where every leak is larger than rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import tiny
from torch import Tensor
from torch.nn.functional import pad

from trainer.batch import Batch, Collator
from trainer.config.schema import Heterogeneity
from trainer.model.multitask import MultiTaskModel, build_model
from trainer.run.prepare import Job, prepare
from trainer.window import MicroBatch, Window

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("encoder", {}),
    "bart": ("encoder-decoder", {}),
    "gpt2": ("decoder", {"config": GPT2}),
    "llama": ("decoder", {}),
}
SETUPS = [*MODELS, "bert, plain losses", "gpt2, plain losses"]
TOLERANCE = {"bert": 1e-11, "bart": 1e-11, "gpt2": 1e-11, "llama": 1e-5}
"""Of the largest gradient. Stock Llama computes norms, rotations and softmax in fp32 even when it is float64."""
FAMILIES = max(len(names) for names in tiny.FAMILIES.values())


@dataclass
class Subject:
    """A model without dropout, and rows for it."""

    job: Job
    model: MultiTaskModel
    collator: Collator


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    @cache
    def make(name: str) -> Subject:
        kernels = "reference" if name.endswith("plain losses") else "fused"
        kind, model = MODELS[name.split(",")[0]]
        # Weights and smoothing, so that no factor of the loss is 1.
        weights = dict(zip(tiny.FAMILIES[kind], (0.3, 2.0, 1.7, 0.6, 1.2, 0.9), strict=False))
        loss = {"weights": weights, "label_smoothing": 0.1}
        model = {"dropout": 0.0, **model}
        folder = tmp_path_factory.mktemp(name)
        job = prepare(tiny.recipe(folder, kind, model=model, heads={"dropout": 0.0}, loss=loss, kernels=kernels))
        built = build_model(job.recipe, job.tasks, job.random_weights).double().train()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in built.parameters():  # fresh weights are so small that attention hardly looks at anything
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return Subject(job, built, job.collator(job.train))

    return make


# --- a window of any rows, split in any way ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of a window, and the micro-batch it is put in."""

    task: int
    index: int
    epoch: int
    micro_batch: int


@dataclass(frozen=True)
class Split:
    """A window's rows in the order in which they are collated, and padding added to each micro-batch."""

    rows: tuple[Row, ...]
    padding: tuple[tuple[int, int], ...]
    """Columns added to the (encoder's, decoder's) input of each micro-batch."""


def rows_of(tasks: list[int]) -> st.SearchStrategy[tuple[Row, ...]]:
    row = st.builds(Row, st.sampled_from(tasks), st.integers(0, 10**6), st.integers(0, 2), st.integers(0, 3))
    return st.lists(row, min_size=1, max_size=14).map(tuple)


# Few tasks as often as many: a micro-batch of one task alone has shapes that others would hide.
TASKS = st.lists(st.integers(0, FAMILIES - 1), min_size=1, max_size=FAMILIES, unique=True)
PADDING = st.tuples(st.integers(0, 5), st.integers(0, 5))
SPLITS = st.builds(Split, TASKS.flatmap(rows_of), st.tuples(*[PADDING] * 4))
EVERY_TASK = Split(
    tuple(Row(i % FAMILIES, 3 + 2 * i, i % 2, (i // 2) % 4) for i in reversed(range(3 * FAMILIES))),
    ((0, 1), (2, 0), (3, 4), (0, 0)),
)
ONE_TASK = Split(tuple(Row(3, 5 * i, 0, i % 2) for i in reversed(range(6))), ((1, 2),) * 4)


def window_of(subject: Subject, split: Split) -> tuple[Window, Window]:
    """The rows in one micro-batch, sorted, and as the split says; both are the same window to its denominators."""
    pools = subject.job.pools(subject.job.train)
    keys = [(r.task % len(pools), r.index, r.epoch, r.micro_batch) for r in split.rows]
    keys = [(task, index % len(pools[task].units), epoch, batch) for task, index, epoch, batch in keys]
    rows, units = np.zeros(len(pools), np.int64), np.zeros(len(pools), np.int64)
    for task, index, *_ in keys:
        rows[task] += 1
        units[task] += pools[task].units[index]

    def window(micro_batches: list[list[tuple[int, ...]]]) -> Window:
        columns = [np.array(keys, np.int64).T for keys in micro_batches]
        micros = (MicroBatch(i, tasks, rows, epochs, 0) for i, (tasks, rows, epochs, *_) in enumerate(columns))
        return Window(0, tuple((micro,) for micro in micros), rows, units)

    parts = [list(part) for _, part in groupby(sorted(keys, key=lambda key: key[3]), key=lambda key: key[3])]
    return window([sorted(keys)]), window(parts)


def padded(batch: Batch, columns: int, decoder_columns: int, pad_id: int) -> Batch:
    """The same batch with more padding than its longest sequence needs."""
    is_pair = bool(batch.decoder_input_ids.numel())
    width = (batch.decoder_input_ids if is_pair else batch.input_ids).shape[1]
    added = decoder_columns if is_pair else columns
    changes = {name: pad(getattr(batch, name), (0, columns)) for name in ("attention_mask", "token_type_ids")}
    changes["input_ids"] = pad(batch.input_ids, (0, columns), value=pad_id)
    if is_pair:
        changes["decoder_input_ids"] = pad(batch.decoder_input_ids, (0, added), value=pad_id)
        changes["decoder_attention_mask"] = pad(batch.decoder_attention_mask, (0, added))
    for name in ("tokens", "lm_positions"):  # flat positions count the columns
        flat = getattr(batch, name)
        changes[name] = flat + flat // width * added
    return replace(batch, **changes)


def loss_and_gradients(
    subject: Subject, window: Window, padding: tuple[tuple[int, int], ...] = ()
) -> tuple[float, dict[str, Tensor]]:
    """What one optimizer step sees: losses and gradients of all micro-batches, summed."""
    subject.model.zero_grad()
    total = 0.0
    for (micro,) in window.micro_steps:
        batch = subject.collator(micro.tasks, micro.rows, micro.epochs, window.unit_weights())
        if padding:
            batch = padded(batch, *padding[micro.index], subject.collator.facts.pad_id)
        loss = subject.model(batch)["loss"]
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in subject.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SETUPS)
def test_splits_order_and_padding_change_nothing(name: str, subject_of: Callable[[str], Subject]) -> None:
    subject, tolerance = subject_of(name), TOLERANCE[name.split(",")[0]]

    @settings(max_examples=100, deadline=None)
    @given(SPLITS)
    @example(EVERY_TASK)
    @example(ONE_TASK)
    def check(split: Split) -> None:
        whole, parts = window_of(subject, split)
        loss, wanted = loss_and_gradients(subject, whole)
        again, found = loss_and_gradients(subject, parts, split.padding)
        assert again == pytest.approx(loss, rel=tolerance)
        assert wanted.keys() == found.keys() == dict(subject.model.named_parameters()).keys()
        # Some gradients are zero but for rounding (attention's key biases), so the largest of all sets the scale.
        largest = max(float(grad.abs().max()) for grad in wanted.values())
        assert largest > 1e-3
        wrong = {n: float((found[n] - grad).abs().max()) / largest for n, grad in wanted.items()}
        assert max(wrong.values()) < tolerance, max(wrong, key=lambda n: wrong[n])

    check()


@pytest.mark.parametrize("name", SETUPS)
def test_an_example_mixes_all_tasks_of_the_model(name: str, subject_of: Callable[[str], Subject]) -> None:
    subject = subject_of(name)
    whole, parts = window_of(subject, EVERY_TASK)
    assert set(whole.micro_steps[0][0].tasks.tolist()) == set(range(len(subject.job.tasks)))
    assert [len(set(micro.tasks.tolist())) > 1 for (micro,) in parts.micro_steps] == [True] * 4


# --- the denominators of real plans --------------------------------------------------------------------------------


def promised(subject: Subject, window: Window) -> float:
    """The loss of docs/sampling.md from its parts: every example counts alike; inside a task the loss is a mean over
    units (rows or predicted tokens), each divided by the log of its number of outputs; a task has a weight."""
    job, model = subject.job, subject.model
    total, units, examples = np.zeros((3, len(job.tasks)))
    for micro in (micro for step in window.micro_steps for micro in step):
        batch = subject.collator(micro.tasks, micro.rows, micro.epochs, np.ones(len(job.tasks)))
        with torch.no_grad():
            out = model(batch)
        outputs = batch.offsets.diff().clamp(min=2)  # of a single output the loss is 0 whatever it is divided by
        for tasks, losses in (
            (batch.segment_task, out["segment_loss"] / outputs.double().log()),
            (batch.regression_task, out["regression_loss"] * job.recipe.loss.regression_scale),
            (batch.lm_task, out["lm_loss"] / np.log(job.facts.vocabulary)),
        ):  # a span row is two units here, its start and its end: the mean over them is the same
            np.add.at(total, tasks.numpy(), losses.numpy())
            np.add.at(units, tasks.numpy(), 1)
        np.add.at(examples, micro.tasks, 1)
    weights = np.array([job.recipe.loss.weights.get(name, 1.0) for name in job.names])
    return float((weights * examples / examples.sum() * total / np.maximum(units, 1)).sum())


@pytest.mark.parametrize("heterogeneity", Heterogeneity)
@pytest.mark.parametrize("name", ["bert", "bart", "gpt2"])
def test_the_loss_is_the_promised_mean_on_any_number_of_ranks(
    name: str, heterogeneity: Heterogeneity, subject_of: Callable[[str], Subject]
) -> None:
    subject = subject_of(name)
    config = subject.job.recipe.window.model_copy(update={"heterogeneity": heterogeneity, "micro_batches": 4})
    job = replace(subject.job, recipe=subject.job.recipe.model_copy(update={"window": config}))
    planner = job.planner(group=2)
    for step in range(3):
        windows = [planner.window(step, ranks) for ranks in (1, 2)]
        # Weights of the batch are float32, hence the tolerance.
        wanted = pytest.approx(promised(subject, windows[0]), rel=1e-6)
        for window in windows:
            alone = [(micro,) for micros in window.micro_steps for micro in micros]
            assert loss_and_gradients(subject, replace(window, micro_steps=tuple(alone)))[0] == wanted
