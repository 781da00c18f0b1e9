"""Everything that happens before the first window and needs no process group.

Owns: `Job`: the tasks, their tokenised rows, the model's facts and the planner of a recipe. Preparing is idempotent:
`sett train` does it once before the ranks start, and each rank does it again against a warm cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from trainer.batch import Collator, TaskView
from trainer.batch.collate import ModelFacts
from trainer.batch.masking import MaskRule, masked_units
from trainer.cache.build import EncodeOptions, build_cache
from trainer.cache.store import CachedSplit
from trainer.cache.views import SplitView, cut_dev, cut_held_out, limit, without
from trainer.config.mixture import tasks_of
from trainer.config.schema import Heterogeneity, Recipe
from trainer.errors import ConfigError, ModelError, SettError, nearest, shortened
from trainer.export.huggingface import auto_class
from trainer.metrics.scores import check_metric
from trainer.model.backbone import load_config, load_tokenizer, materialise_random, model_kind, resolve_path
from trainer.model.heads import HeadTable
from trainer.tasks.spec import Family, TaskSpec, TextOf
from trainer.window import Planner, Pool
from trainer.window.mixture import example_shares

LM_FAMILIES = (Family.SEQ2SEQ, Family.MASKED_LM, Family.CAUSAL_LM)

_IMPOSSIBLE = {
    "encoder": {Family.SEQ2SEQ: "an encoder cannot generate", Family.CAUSAL_LM: "an encoder sees the next token"},
    "encoder-decoder": {
        Family.MASKED_LM: "an encoder-decoder has no masked-LM output layer",
        Family.CAUSAL_LM: "declare the text as a seq2seq task instead",
    },
    "decoder": {Family.MASKED_LM: "a decoder is causal; use causal_lm"},
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """A recipe with everything it names loaded."""

    recipe: Recipe
    tasks: list[TaskSpec]
    tokenizer: Any
    facts: ModelFacts
    train: list[SplitView]
    dev: list[SplitView]
    held_out: SplitView | None
    """Rows of `meta.end_task` that are neither trained on nor evaluated; None where nothing needs them."""
    heads: HeadTable
    hidden_size: int
    random_weights: Path | None

    @property
    def by_step(self) -> bool:
        return self.recipe.window.heterogeneity is Heterogeneity.STEP

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def only(self, names: Sequence[str]) -> Job:
        """The same job with the tasks of these names alone, for evaluation: the heads stay where they are.

        Raises:
            ConfigError: there is no task of a name.
        """
        for name in names:
            if name not in self.names:
                raise ConfigError(f"--task: the run has no task '{name}'{nearest(name, self.names)}")
        kept = [index for index, name in enumerate(self.names) if name in names]
        return replace(
            self,
            tasks=[self.tasks[index] for index in kept],
            train=[self.train[index] for index in kept],
            dev=[self.dev[index] for index in kept],
        )

    def views(self, splits: Sequence[SplitView]) -> list[TaskView]:
        """The tasks as collating sees them, over `splits`."""
        weights = self.recipe.loss.weights
        return [
            TaskView(task, split, self._first_row(task), weights.get(task.name, 1.0))
            for task, split in zip(self.tasks, splits, strict=True)
        ]

    def collator(self, splits: Sequence[SplitView]) -> Collator:
        return Collator(self.views(splits), self.facts, self.recipe.loss, self.recipe.seed)

    def _first_row(self, task: TaskSpec) -> int:
        return -1 if task.family in LM_FAMILIES else self.heads.first_row(task.name)

    @cached_property
    def shares(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[T] expected share of each task among the examples of a window."""
        return example_shares(self.names, np.array([len(s) for s in self.train]), self.recipe.sampling)

    def planner(self, group: int) -> Planner:
        """The run's planner; `group` is the world size of its first start (only `step` windows use it)."""
        together = self.recipe.meta is not None and self.recipe.meta.weights == "alignment"
        return Planner(self.pools(self.train), self.shares, self.recipe.window, self.recipe.seed, group, together)

    def pools(self, splits: Sequence[SplitView]) -> list[Pool]:
        return [
            Pool(task.name, split.column("length"), split.column("count"), self.units(task, split))
            for task, split in zip(self.tasks, splits, strict=True)
        ]

    def units(self, task: TaskSpec, split: SplitView) -> NDArray[np.int64]:
        """[n] what each row adds to its task's denominator: 1, or its predicted tokens."""
        units = split.column("units").astype(np.int64)
        return masked_units(units, self.recipe.loss.mask_probability) if task.family is Family.MASKED_LM else units


def prepare(recipe: Recipe, progress: Progress | None = None) -> Job:
    """Load tasks, tokenizer and cache, and check all that can be checked without starting a rank.

    Raises:
        ConfigError, DataError, ModelError: each names the thing, the place and the remedy.
    """
    tasks = tasks_of(recipe)
    _check_names(recipe, tasks)
    for task in tasks:
        check_metric(task)
    kind = model_kind(recipe.model)
    _check_families(tasks, kind)
    config = load_config(recipe.model)
    for task in tasks:
        if task.name in recipe.checkpoint.export:
            auto_class(task, config, kind)
    tokenizer = load_tokenizer(recipe.model)
    facts = _facts(recipe, tasks, kind, config, tokenizer)
    splits = _cached(recipe, tasks, kind, progress)
    train, dev = _train_and_dev(recipe, tasks, splits)
    train, held_out = _held_out(recipe, tasks, train)
    heads = HeadTable.of(tasks, recipe.heads)
    return Job(recipe, tasks, tokenizer, facts, train, dev, held_out, heads, config.hidden_size, _random(recipe))


def prepare_together(recipe: Recipe, rank: int) -> Job:
    """`prepare` on every rank: the first one fills the cache, the others then find it warm.

    Raises:
        SettError: on every rank alike, so that none waits for one that has gone.
    """
    job, problem = None, None
    if rank == 0:
        try:
            job = prepare(recipe)
        except SettError as error:
            problem = error
    problems: list[SettError | None] = [problem]
    dist.broadcast_object_list(problems, src=0)
    if problems[0] is not None:
        raise problems[0]
    return job or prepare(recipe)


def load_split(job: Job, split: str) -> list[SplitView]:
    """The rows of `split` of every task, for evaluation; `dev` and `train` are the run's own."""
    if split == "dev":
        return job.dev
    if split == "train":
        return job.train
    for task in job.tasks:
        if task.source(split) is None:
            raise ConfigError(f"task '{task.name}' has no {split} split; name those to evaluate with --task")
    recipe, kind = job.recipe, model_kind(job.recipe.model)
    paths = _build(recipe, [(task, split) for task in job.tasks], kind, None)
    return [SplitView(CachedSplit(paths[task.name, split], task), None) for task in job.tasks]


def cache_dir(recipe: Recipe) -> Path:
    """Where tokenised rows are kept: `cache` of the recipe, $SETT_CACHE, or ~/.cache/sett."""
    return recipe.cache or Path(os.environ.get("SETT_CACHE") or Path.home() / ".cache" / "sett")


def _check_names(recipe: Recipe, tasks: Sequence[TaskSpec]) -> None:
    names = [task.name for task in tasks]
    for name in recipe.loss.weights:
        if name not in names:
            raise ConfigError(f"loss.weights.{name}: no task of that name{nearest(name, names)}")
    for name in recipe.sampling.rows:
        if name not in names:
            raise ConfigError(f"sampling.rows.{name}: no task of that name{nearest(name, names)}")
    known = ["backbone", *names]
    for name in recipe.checkpoint.export:
        if name not in known:
            raise ConfigError(
                f"checkpoint.export: no task named '{name}'{nearest(name, known)}; name tasks, or backbone"
            )
    if recipe.meta is not None:
        for key, name in [("end_task", recipe.meta.end_task), *(("initial", name) for name in recipe.meta.initial)]:
            if name not in names:
                raise ConfigError(f"meta.{key}: no task named '{name}'{nearest(name, names)}")
    watch = recipe.early_stopping.watch
    if watch != "mean" and watch not in names:
        raise ConfigError(f"early_stopping.watch: no task named '{watch}'{nearest(watch, [*names, 'mean'])}")


def _check_families(tasks: Sequence[TaskSpec], kind: str) -> None:
    for family, reason in _IMPOSSIBLE[kind].items():
        if names := [task.name for task in tasks if task.family is family]:
            raise ConfigError(
                f"family {family.value} ({shortened(names)}) cannot be trained on this {kind}: {reason}. "
                f"Leave it out (exclude: ['family:{family.value}']) or use another model"
            )


def _facts(recipe: Recipe, tasks: Sequence[TaskSpec], kind: str, config: Any, tokenizer: Any) -> ModelFacts:
    vocabulary = int(config.vocab_size)
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"model.tokenizer: {len(tokenizer)} tokens, but the model has {vocabulary}; they do not belong together"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.model.max_length > _usable_positions(config):
        raise ConfigError(
            f"model.max_length: {recipe.model.max_length}, but the model has positions for {_usable_positions(config)}"
        )
    mask = None
    if any(task.family is Family.MASKED_LM for task in tasks):
        if tokenizer.mask_token_id is None:
            raise ModelError("masked LM: the tokenizer has no mask token")
        mask = MaskRule(
            recipe.loss.mask_probability, tokenizer.mask_token_id, vocabulary, tuple(tokenizer.all_special_ids)
        )
    start = getattr(config, "decoder_start_token_id", None)
    if kind == "encoder-decoder" and start is None:
        raise ModelError("model: an encoder-decoder needs decoder_start_token_id in its configuration")
    return ModelFacts(kind, tokenizer.pad_token_id, vocabulary, int(start or 0), mask)


def _usable_positions(config: Any) -> int:
    """RoBERTa counts positions from padding_idx + 1, so two of them are never used."""
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    return int(config.max_position_embeddings) - offset


def _random(recipe: Recipe) -> Path | None:
    if recipe.model.config is None:
        return None
    return materialise_random(recipe, cache_dir(recipe) / "random")


def _cached(
    recipe: Recipe, tasks: Sequence[TaskSpec], kind: str, progress: Progress | None
) -> dict[tuple[str, str], CachedSplit]:
    requests = [(task, "train") for task in tasks]
    # Where dev is cut from train, `build_cache` encodes train a second time with what the metric needs.
    requests += [(task, "dev") for task in tasks]
    specs = {task.name: task for task in tasks}
    paths = _build(recipe, requests, kind, progress)
    return {key: CachedSplit(path, specs[key[0]]) for key, path in paths.items()}


def _build(
    recipe: Recipe, requests: Sequence[tuple[TaskSpec, str]], kind: str, progress: Progress | None
) -> dict[tuple[str, str], Path]:
    model = recipe.model
    options = EncodeOptions(
        kind=kind,  # type: ignore[arg-type]
        max_length=model.max_length,
        max_target_length=model.max_target_length,
        span_stride=model.span_stride,
        span_windows=model.span_windows,
    )
    tokenizer = resolve_path(model.tokenizer or str(model.path))
    return build_cache(requests, tokenizer, options, cache_dir(recipe), recipe.workers, progress)


def _train_and_dev(
    recipe: Recipe, tasks: Sequence[TaskSpec], splits: dict[tuple[str, str], CachedSplit]
) -> tuple[list[SplitView], list[SplitView]]:
    train, dev = [], []
    for task in tasks:
        if task.dev is not None:
            whole, held_out = (SplitView(splits[task.name, name], None) for name in ("train", "dev"))
            # Of another task's text nothing is learnt that the other task is judged by, wherever else it stands.
            train.append(without(whole, held_out) if isinstance(task, TextOf) else whole)
            dev.append(held_out)
        else:  # the cut goes by the content of the rows: the same rows fall to the same side in both encodings
            cut = (recipe.evaluation.dev_share, recipe.evaluation.dev_rows, recipe.seed)
            train.append(cut_dev(splits[task.name, "train"], *cut)[0])
            dev.append(cut_dev(splits[task.name, "dev"], *cut)[1])
    shares = recipe.sampling.rows
    train = [
        limit(view, math.ceil(shares.get(task.name, 1.0) * len(view)), recipe.seed)
        for task, view in zip(tasks, train, strict=True)
    ]
    if most := recipe.evaluation.max_rows:
        dev = [limit(view, most, recipe.seed) for view in dev]
    return train, dev


_FEWEST_HELD_OUT = 8


def _held_out(
    recipe: Recipe, tasks: Sequence[TaskSpec], train: list[SplitView]
) -> tuple[list[SplitView], SplitView | None]:
    """What is trained on once the end task's held-out rows are cut off, and those rows."""
    meta = recipe.meta
    if meta is None or meta.weights != "alignment":
        return train, None
    end = [task.name for task in tasks].index(meta.end_task)
    kept, held_out = cut_held_out(train[end], meta.held_out.share, meta.held_out.rows, recipe.seed)
    if len(held_out) < _FEWEST_HELD_OUT:
        raise ConfigError(
            f"meta.held_out: {len(held_out)} of the {len(train[end])} training rows of '{meta.end_task}' are too few "
            f"to say what helps it (at least {_FEWEST_HELD_OUT}); raise meta.held_out.share, or set meta.weights=equal"
        )
    # Nor is their text: a body that knows it would find their gradient small.
    others = [without(v, held_out) if isinstance(t, TextOf) else v for t, v in zip(tasks, train, strict=True)]
    return [kept if t == end else view for t, view in enumerate(others)], held_out
