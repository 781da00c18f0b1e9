"""The model card of an exported model.

Owns: `model_card`. The card says what the model was trained on, how, with what result, and under which
licences its data came; what is not known is left out rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.config.schema import Recipe
from trainer.tasks.spec import Family, TaskSpec

_PIPELINES = {
    Family.CLASSIFICATION: "text-classification",
    Family.PAIR_CLASSIFICATION: "text-classification",
    Family.REGRESSION: "text-classification",
    Family.MULTIPLE_CHOICE: "multiple-choice",
    Family.SPAN: "question-answering",
    Family.SEQ2SEQ: "text-generation",
    Family.MASKED_LM: "fill-mask",
    Family.CAUSAL_LM: "text-generation",
}


def model_card(
    recipe: Recipe,
    tasks: Sequence[TaskSpec],
    task: TaskSpec | None,
    auto_class: str,
    results: Mapping[str, Any] | None,
) -> str:
    """The README.md of an export.

    Args:
        recipe: the run's.
        tasks: all tasks trained on.
        task: the exported one; None for the body alone.
        auto_class: the class of transformers that loads the folder.
        results: the content of the run's `results.json`: under `tasks` a mapping a task with `task`, `metric`,
            `before`, `after`, `majority`, `rows` (of dev) and `train_rows`; what is missing or null shows as a dash.
    """
    ordered = sorted(tasks, key=lambda t: t.name)
    sections = [
        _front_matter(recipe, ordered, task),
        _what(recipe, ordered, task, auto_class),
        _task_table(ordered, {row["task"]: row for row in (results or {}).get("tasks", [])}),
        _training(recipe),
        _sources(ordered),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(recipe: Recipe, tasks: Sequence[TaskSpec], task: TaskSpec | None) -> str:
    pipeline = "feature-extraction" if task is None else _PIPELINES[task.family]
    # The card of a model trained on data of several licences cannot name one: the table below names each.
    facts = {
        "library_name": "transformers",
        "license": "other",
        "license_name": "see-the-table-of-tasks",
        "pipeline_tag": pipeline,
        "tags": ["sett", "multi-task", "pre-finetuning", "deepspeed"],
        "datasets": sorted({name for t in tasks if (name := _hub_dataset(t))}),
        "base_model": _hub_model(recipe),
    }
    return "---\n" + yaml.safe_dump({k: v for k, v in facts.items() if v}, sort_keys=False, width=120).strip() + "\n---"


def _hub_dataset(task: TaskSpec) -> str | None:
    """Only what came from the hub by name has an entry there to link to."""
    if task.train is None or not task.train.startswith("hub:"):
        return None
    return task.train.removeprefix("hub:").split("@")[0].split(":")[0]


def _hub_model(recipe: Recipe) -> str | None:
    path = recipe.model.path
    is_hub = path is not None and not path.startswith("package:") and not Path(path).expanduser().is_dir()
    return path if is_hub else None


def _what(recipe: Recipe, tasks: Sequence[TaskSpec], task: TaskSpec | None, auto_class: str) -> str:
    origin = f"a random `{(recipe.model.config or {}).get('model_type')}` model"
    if recipe.model.path is not None:
        # A path of somebody's disk says nothing to a reader and more than its owner may want to.
        origin = f"`{_hub_model(recipe) or recipe.model.path.rstrip('/').rpartition('/')[2]}`"
    count = f"{len(tasks)} task{'s' if len(tasks) != 1 else ''}"
    text = f"# {recipe.name}{'' if task is None else f': {task.name}'}\n\nTrained from {origin} on {count} at once."
    load = f"```python\nfrom transformers import {auto_class}, AutoTokenizer\n\n"
    load += f'model = {auto_class}.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```'
    if task is not None and task.family is Family.REGRESSION:
        low, high = task.score_range or (0.0, 1.0)
        load += f"\n\nThe one logit is the score scaled to [0, 1]: `score = {low:g} + logit * {high - low:g}`."
    return f"{text}\n\n{load}"


def _task_table(tasks: Sequence[TaskSpec], results: Mapping[str, Mapping[str, Any]]) -> str:
    head = "| task | family | metric | before | after | majority | train rows | dev rows | licence |"
    lines = ["## Tasks", "", head, "|---|---|---|---:|---:|---:|---:|---:|---|"]
    for task in tasks:
        result = results.get(task.name, {})
        numbers = [_number(result.get(key)) for key in ("before", "after", "majority")]
        rows = [_number(result.get(key)) for key in ("train_rows", "rows")]
        metric = str(result.get("metric") or task.primary_metric)
        cells = [task.name, task.family.value, metric, *numbers, *rows, task.licence]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _training(recipe: Recipe) -> str:
    optimizer, window = recipe.optimizer, recipe.window
    head_lr = optimizer.lr if optimizer.head_lr is None else optimizer.head_lr
    facts = [
        f"{recipe.training.steps} optimizer steps of {window.micro_batches} micro-batches of at most {window.tokens} "
        f"tokens, seed {recipe.seed}",
        f"tasks drawn by rule `{recipe.sampling.rule.value}`, mixed by `{window.heterogeneity.value}`",
        f"AdamW, learning rate {optimizer.lr:g} (heads {head_lr:g}), {optimizer.schedule} schedule",
        f"loss scale `{recipe.loss.scale}`, sequences of at most {recipe.model.max_length} tokens",
    ]
    return "\n".join(["## Training", "", *(f"- {fact}" for fact in facts)])


def _sources(tasks: Sequence[TaskSpec]) -> str:
    lines = [f"- **{task.name}**: {' '.join(task.citation.split())}" for task in tasks if task.citation]
    return "\n".join(["## Citations", "", *(lines or ["The tasks' declarations name none."])])
