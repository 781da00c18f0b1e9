"""Per-task metrics of the current weights, sharded over the ranks, each row counted once.

Owns: dealing rows to ranks, turning scores into predictions, gathering them, and the mean over tasks. What a metric
means is `trainer.metrics.scores`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batch import Batch, Collator
from trainer.cache.views import SplitView
from trainer.engine.session import Session
from trainer.metrics.scores import PRIMARY, compute, higher_is_better, mean_score
from trainer.metrics.spans import best_span
from trainer.run.prepare import Job
from trainer.tasks.spec import Family, TaskSpec
from trainer.window.dealing import deal, length_batches

Scores = dict[str, float]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of every task at one step."""

    scores: dict[str, Scores]
    """Task -> metric -> value; `loss` is the mean unscaled loss of a row (of a token for language modelling)."""
    metrics: dict[str, str]
    """Task -> its primary metric."""

    def primary(self, task: str) -> float:
        return self.scores[task][PRIMARY[self.metrics[task]]]

    def key(self, task: str) -> str:
        """The log's key of a task's primary metric."""
        return f"eval/{task}/{PRIMARY[self.metrics[task]]}"

    def mean(self) -> float | None:
        """Mean of the primary metrics, perplexities left out; None when there is nothing but perplexities."""
        return mean_score((self.metrics[task], self.primary(task)) for task in self.scores)

    def watched(self, watch: str) -> float:
        """The number that chooses checkpoints, larger is better."""
        if watch == "mean":
            mean = self.mean()
            if mean is not None:
                return mean
            return -float(np.mean([self.scores[task]["loss"] for task in self.scores]))
        value = self.primary(watch)
        return value if higher_is_better(self.metrics[watch]) else -value

    def flat(self) -> dict[str, float]:
        """`eval/<task>/<metric>` and `eval/mean`, for the log."""
        values = {f"eval/{task}/{name}": v for task, scores in self.scores.items() for name, v in scores.items()}
        mean = self.mean()
        return values if mean is None else {**values, "eval/mean": mean}


@dataclass
class _Found:
    """What one rank found out about one row."""

    row: int
    prediction: Any
    loss: float
    units: int


def primary_metric(task: TaskSpec, generate: bool) -> str:
    """The metric a task is judged by; generation tasks are judged by perplexity when nothing is decoded."""
    return "perplexity" if task.family is Family.SEQ2SEQ and not generate else task.primary_metric


def evaluate(
    session: Session, job: Job, splits: Sequence[SplitView], progress: Callable[[int, int], None] = lambda *_: None
) -> Evaluation:
    """Evaluate all tasks on `splits`. Every rank must call it, and every rank gets the result.

    `progress` is called before each of this rank's batches, with its number and how many there are.
    """
    config = job.recipe.evaluation
    budget = config.tokens or 2 * job.recipe.window.tokens
    collator = job.collator(splits)
    found: dict[int, list[_Found]] = defaultdict(list)
    dealt = _deal(splits, budget, session)
    session.engine.eval()
    with torch.no_grad():
        for number, (task, rows, counts) in enumerate(dealt):
            progress(number, len(dealt))
            batch = _collate(collator, task, rows)
            output = session.engine(batch.to(session.device))
            texts = None
            if collator.views[task].spec.family is Family.SEQ2SEQ and config.generate and any_generates(job, task):
                texts = _generate(session, job, splits[task], rows)
            if counts:
                found[task] += _read(collator, task, rows, batch, output, texts)
    session.engine.train()
    return _score(session, job, splits, found)


def any_generates(job: Job, task: int) -> bool:
    """Whether the task's metric needs decoded text (perplexity does not)."""
    return primary_metric(job.tasks[task], job.recipe.evaluation.generate) != "perplexity"


def _deal(splits: Sequence[SplitView], budget: int, session: Session) -> list[tuple[int, Rows, bool]]:
    """This rank's batches of each task, and whether each counts. Task by task: all ranks decode the same at a time."""
    mine = []
    for task, split in enumerate(splits):
        batches = length_batches(
            split.column("length").astype(np.int64), split.column("count").astype(np.int64), budget
        )
        mine += [(task, rows, counts) for rows, counts in deal(batches, session.rank, session.world_size)]
    return mine


def _collate(collator: Collator, task: int, rows: Rows) -> Batch:
    ones = np.ones(len(collator.views))
    return collator(np.full(len(rows), task, np.int64), rows, np.zeros(len(rows), np.int64), ones)


def _generate(session: Session, job: Job, split: SplitView, rows: Rows) -> list[str]:
    """Greedy decoding of a batch."""
    tokenizer = job.tokenizer
    prompts = []
    for row in split.rows(rows):
        ids = row["sequences"][0]
        prompts.append(ids if job.facts.kind == "encoder-decoder" else ids[: len(ids) - len(row["targets"])])
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), job.facts.pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for i, prompt in enumerate(prompts):  # a decoder goes on from the last token, so its prompts end together
        place = slice(0, len(prompt)) if job.facts.kind == "encoder-decoder" else slice(width - len(prompt), width)
        ids[i, place] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, place] = 1
    out = session.model.generate(
        ids.to(session.device),
        mask.to(session.device),
        max_new_tokens=job.recipe.model.max_target_length,
        synced_gpus=session.stage == 3 and session.world_size > 1,
    )
    return list(tokenizer.batch_decode(out, skip_special_tokens=True))


def _read(
    collator: Collator, task: int, rows: Rows, batch: Batch, output: dict[str, Tensor], texts: list[str] | None
) -> list[_Found]:
    """Predictions and losses of a batch's rows."""
    spec = collator.views[task].spec
    values = {name: output[name].float().cpu().numpy() for name in output if name not in ("loss", "features")}
    if spec.family is Family.REGRESSION:
        low, high = spec.score_range or (0.0, 1.0)
        losses = values["regression_loss"]
        return [
            _Found(int(r), float(low + (high - low) * p), float(loss), 1)
            for r, p, loss in zip(rows, values["regression"], losses, strict=True)
        ]
    if spec.family is Family.SPAN:
        return _read_spans(collator, task, rows, batch, values)
    if len(batch.lm_target):
        return _read_lm(collator, task, rows, batch, values["lm_loss"], texts)
    offsets = batch.offsets.numpy()
    segments = [values["scores"][offsets[g] : offsets[g + 1]] for g in range(len(rows))]
    return [
        _Found(int(r), _softmax(s), float(loss), 1)
        for r, s, loss in zip(rows, segments, values["segment_loss"], strict=True)
    ]


def _read_spans(
    collator: Collator, task: int, rows: Rows, batch: Batch, values: dict[str, NDArray[np.float32]]
) -> list[_Found]:
    view, offsets = collator.views[task], batch.offsets.numpy()
    references = view.rows.references(rows)  # type: ignore[attr-defined]
    allow_empty = view.spec.primary_metric == "squad_v2_f1_em"
    found = []
    for i, (row, cached, reference) in enumerate(zip(rows, view.rows.rows(rows), references, strict=True)):
        start, end = (values["scores"][offsets[g] : offsets[g + 1]] for g in (2 * i, 2 * i + 1))
        text = best_span(start, end, cached["offsets"].reshape(-1, 2), reference["context"], no_answer=allow_empty)
        loss = values["segment_loss"][2 * i : 2 * i + 2].mean()
        found.append(_Found(int(row), text, float(loss), 1))
    return found


def _read_lm(
    collator: Collator, task: int, rows: Rows, batch: Batch, losses: NDArray[np.float32], texts: list[str] | None
) -> list[_Found]:
    """Token losses come row after row: sum each row's."""
    width = batch.decoder_input_ids.shape[1] or batch.input_ids.shape[1]
    row_of = batch.lm_positions.numpy() // width
    sums = np.bincount(row_of, weights=losses, minlength=len(rows))
    counts = np.bincount(row_of, minlength=len(rows))
    found = []
    for i, row in enumerate(rows):
        prediction = texts[i] if texts is not None else (float(sums[i]), int(counts[i]))
        found.append(_Found(int(row), prediction, float(sums[i]), int(counts[i])))
    return found


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = np.exp(scores - scores.max())
    return np.asarray(shifted / shifted.sum(), np.float32)


def _score(session: Session, job: Job, splits: Sequence[SplitView], found: dict[int, list[_Found]]) -> Evaluation:
    """Metrics are computed once, on the first rank, and handed to the others."""
    metrics = {task.name: primary_metric(task, job.recipe.evaluation.generate) for task in job.tasks}
    gathered = session.gather(dict(found))
    scores: dict[str, Scores] = {}
    if session.is_first:
        for index, (task, split) in enumerate(zip(job.tasks, splits, strict=True)):
            rows = sorted((f for part in gathered for f in part.get(index, [])), key=lambda f: f.row)
            assert [f.row for f in rows] == list(range(len(split))), f"{task.name}: rows evaluated twice or never"
            references = references_of(task, split)
            values = compute(metrics[task.name], [f.prediction for f in rows], references, task)
            loss = sum(f.loss for f in rows) / sum(f.units for f in rows)
            scores[task.name] = {**values, "loss": loss}
    return Evaluation(session.gather(scores)[0], metrics)


def references_of(task: TaskSpec, split: SplitView) -> list[Any]:
    """What predictions are compared with, in the form `trainer.metrics.scores` documents."""
    indices = np.arange(len(split))
    if task.family in (Family.SPAN, Family.SEQ2SEQ):
        return split.references(indices)
    if task.family is Family.REGRESSION:
        low, high = task.score_range or (0.0, 1.0)
        return [{"score": low + (high - low) * s} for s in split.column("score").tolist()]
    if task.family in (Family.MASKED_LM, Family.CAUSAL_LM):
        return [None] * len(split)
    labels = split.column("label").tolist()
    if task.primary_metric == "map_mrr":
        return [{**r, "label": label} for r, label in zip(split.references(indices), labels, strict=True)]
    return list(labels)
