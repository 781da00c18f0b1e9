"""A trained model as a plain Hugging Face folder with one task's head.

Owns: `export_task`. The stock class that goes with the task's family is laid out without memory, its weights are taken
from the trained state by name (`trainer.model.stock` says which is which), and the folder appears whole or not at all.
"""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from trainer.config.schema import Recipe
from trainer.errors import ModelError, RunError, nearest
from trainer.export.card import model_card
from trainer.model.backbone import LM_CLASSES, load_config, load_tokenizer, resolve_path
from trainer.model.carry import untied
from trainer.model.heads import HeadTable, spectral_facts
from trainer.model.multitask import MultiTaskModel, skeleton
from trainer.model.source import Kind, quiet
from trainer.model.spectral import normalised
from trainer.model.stock import STOCK, Stock, stock_of
from trainer.tasks.spec import Family, TaskSpec

_CLASSES: dict[Family, Any] = {
    Family.CLASSIFICATION: AutoModelForSequenceClassification,
    Family.PAIR_CLASSIFICATION: AutoModelForSequenceClassification,
    Family.REGRESSION: AutoModelForSequenceClassification,
    Family.MULTIPLE_CHOICE: AutoModelForMultipleChoice,
    Family.SPAN: AutoModelForQuestionAnswering,
}
"""Of the families with a head; the others export the language model of the model's kind."""


def export_task(
    model_state: Mapping[str, Tensor],
    recipe: Recipe,
    tasks: Sequence[TaskSpec],
    task: str | None,
    out: Path,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write a `save_pretrained` folder that a stock `AutoModel...` class loads.

    Args:
        model_state: the full state of the `MultiTaskModel` in fp32, parameters and persistent buffers; of tied
            parameters any one name will do.
        recipe: the run's.
        tasks: the run's, all of them.
        task: whose head to export; None exports the body alone, for `AutoModel`.
        out: the folder to write; an existing one is replaced, in one step.
        results: the content of the run's `results.json`, for the model card.

    In a process group only the first rank may call it: transformers writes weights on that one alone.

    Raises:
        ModelError: transformers has no class for this head on this architecture; the message says what it has.
    """
    spec = _find(tasks, task)
    config = load_config(recipe.model)
    model = skeleton(recipe, tasks)
    stock = stock_of(config, model.backbone.kind)
    auto = auto_class(spec, config, model.backbone.kind)
    _describe(config, spec)
    exported = _lay_out(auto, config, model)
    names = _names(exported, model, stock, spec)
    weights = _pick(exported, names, untied(model_state, model))
    if spec is not None and spec.name in model.table.by_task:
        weights |= _head_rows(_heads_as_used(model_state, recipe, model.table), model, stock, spec, exported)
    _check_complete(exported, weights, auto, config)
    with quiet():
        exported.load_state_dict(weights, strict=True, assign=True)
        exported.tie_weights()
    _generation_settings(exported, recipe, config)
    _write(exported, recipe, out, model_card(recipe, tasks, spec, auto.__name__, results))


def _find(tasks: Sequence[TaskSpec], task: str | None) -> TaskSpec | None:
    if task is None:
        return None
    specs = {spec.name: spec for spec in tasks}
    if task not in specs:
        raise ModelError(
            f"export: the run has no task '{task}'{nearest(task, specs)}; it has {', '.join(sorted(specs))}"
        )
    return specs[task]


def auto_class(spec: TaskSpec | None, config: Any, kind: Kind) -> Any:
    """The `AutoModel...` class a task's export is for; `AutoModel` for the backbone alone.

    Raises:
        ModelError: transformers has no class that computes what is trained.
    """
    if spec is None:
        return AutoModel
    auto = _CLASSES.get(spec.family, LM_CLASSES[kind])
    exact = spec.family not in _CLASSES or kind == "decoder" or config.model_type in STOCK
    if type(config) in auto._model_mapping and exact:
        return auto
    others = {family: cls for family, cls in _CLASSES.items() if exact and type(config) in cls._model_mapping}
    possible = ", ".join(family.value for family in others) or "none of the families with a head"
    raise ModelError(
        f"export of task '{spec.name}': transformers has no {spec.family.value} class that computes what was trained "
        f"on a '{config.model_type}' model. What it has: {possible}; without a task the body exports for AutoModel"
    )


def _describe(config: Any, spec: TaskSpec | None) -> None:
    """Write into the config what the task's labels and scores mean."""
    config.dtype = torch.float32
    if spec is None:
        return
    config.sett_task = spec.name
    if spec.family is Family.REGRESSION:
        config.num_labels = 1
        config.problem_type = "regression"
        config.sett_score_range = list(spec.score_range or (0.0, 1.0))
    elif spec.classes:
        # Not transformers' own LABEL_0, LABEL_1: it leaves those out of the file, and BART then reads three classes.
        labels = spec.labels or tuple(str(i) for i in range(spec.classes))
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    elif spec.family is Family.SPAN:
        config.num_labels = 2


def _lay_out(auto: Any, config: Any, model: MultiTaskModel) -> Any:
    """The stock model on the meta device; the base model has its pooler only where the trunk is one."""
    cls = auto._model_mapping[type(config)]
    stock = stock_of(config, model.backbone.kind)
    extra: dict[str, Any] = {}
    if auto is AutoModel and "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        extra["add_pooling_layer"] = model.trunk is not None and stock.base_trunk is not None
    with torch.device("meta"), quiet():
        return cls(config, **extra)


def _names(exported: Any, model: MultiTaskModel, stock: Stock, spec: TaskSpec | None) -> dict[str, str]:
    """Name in the exported model -> name in the trained one, for body and trunk."""
    base = model.backbone.base
    if spec is not None and spec.family not in _CLASSES:
        return {name: f"backbone.body.{name}" for name in exported.state_dict()}
    ours = _prefix_of(base, model)
    theirs = _prefix_of(exported.base_model, exported)
    wanted = set(exported.base_model.state_dict()) & set(base.state_dict())
    names = {theirs + name: ours + name for name in wanted}
    trunk = _trunk_prefix(exported, stock, spec)
    if trunk is not None and model.trunk is not None:
        names |= {f"{trunk}.{part}": f"trunk.dense.{part}" for part, _ in model.trunk.dense.named_parameters()}
        if stock.norm:
            names |= {f"{stock.norm}.{part}": f"trunk.norm.{part}" for part, _ in model.trunk.norm.named_parameters()}
    return names


def _trunk_prefix(exported: Any, stock: Stock, spec: TaskSpec | None) -> str | None:
    if spec is None:
        return stock.base_trunk if getattr(exported, "pooler", None) is not None else None
    if spec.family is Family.SPAN:
        return stock.trunk if stock.span_trunk else None
    prefix = stock.trunk
    if spec.family is Family.MULTIPLE_CHOICE and stock.choice_trunk is not None:
        prefix = stock.choice_trunk
    return None if prefix is None else prefix.format(base=exported.base_model_prefix)


def _prefix_of(part: Any, whole: Any) -> str:
    name = next(name for name, module in whole.named_modules() if module is part)
    return f"{name}." if name else ""


def _pick(exported: Any, names: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shapes = {name: tensor.shape for name, tensor in exported.state_dict().items()}
    weights = {}
    for theirs, ours in names.items():
        if ours not in state:
            raise RunError(
                f"export: the trained state has no '{ours}'; it does not belong to this recipe and its tasks"
            )
        if state[ours].shape != shapes[theirs]:
            raise RunError(
                f"export: '{ours}' has shape {tuple(state[ours].shape)} in the trained state but "
                f"{tuple(shapes[theirs])} in the recipe's model; they do not belong together"
            )
        weights[theirs] = state[ours].detach().float().contiguous()
    return weights


def _heads_as_used(state: Mapping[str, Tensor], recipe: Recipe, table: HeadTable) -> Mapping[str, Tensor]:
    """The state with its heads divided by their largest singular values, where training does that."""
    if not recipe.heads.spectral:
        return state
    return {**state, "head.weight": normalised(state["head.weight"], *spectral_facts(table, recipe.seed))}


def _head_rows(
    state: Mapping[str, Tensor], model: MultiTaskModel, stock: Stock, spec: TaskSpec, exported: Any
) -> dict[str, Tensor]:
    """The task's rows of the packed head as the stock class's last linear layer."""
    head = model.table.head(spec.name)
    output = {Family.SPAN: stock.span_output, Family.MULTIPLE_CHOICE: stock.choice_output}.get(
        spec.family, stock.output
    )
    rows = slice(head.first, head.first + head.size)
    weights = {f"{output}.weight": state["head.weight"][rows].float().clone()}
    if f"{output}.bias" in exported.state_dict():  # a decoder's span class has one, though none was trained
        weights[f"{output}.bias"] = (
            state["head.bias"][rows].float().clone() if stock.output_bias else torch.zeros(head.size)
        )
    return weights


def _check_complete(exported: Any, weights: Mapping[str, Tensor], auto: Any, config: Any) -> None:
    wanted = set(exported.state_dict())
    if wanted != set(weights):
        names = ", ".join(sorted(wanted ^ set(weights))[:3])
        raise ModelError(
            f"export: {auto.__name__} of '{config.model_type}' has other parts than were trained ({names}); "
            "without a task the body exports for AutoModel"
        )


def _generation_settings(exported: Any, recipe: Recipe, config: Any) -> None:
    """Keep the generation settings of the model's home; a random model gets those of its config."""
    if not exported.can_generate():
        return
    exported.generation_config = GenerationConfig.from_model_config(config)
    if recipe.model.path is not None:
        folder = Path(resolve_path(recipe.model.path, weights=False))
        if (folder / "generation_config.json").is_file():
            exported.generation_config = GenerationConfig.from_pretrained(folder)


def _write(exported: Any, recipe: Recipe, out: Path, card: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    fresh, old = aside / "new", aside / "old"
    try:
        with quiet():
            exported.save_pretrained(fresh)
        load_tokenizer(recipe.model).save_pretrained(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            os.replace(out, old)
        os.replace(fresh, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
