"""What a metric's name means: predictions and references in, numbers out.

Owns: the table of metrics, their primary numbers and the baselines they are compared with. Text, span and ranking
metrics are computed in `text.py`, `squad.py` and `ranking.py`.

Every number is a fraction in [0, 1] (correlations and MCC in [-1, 1]); only perplexity is not. What goes in, by family:

| family              | prediction                                   | reference                                   |
|---------------------|----------------------------------------------|---------------------------------------------|
| (pair) classification | probabilities (or scores) of the classes   | label index; `{"group", "label"}` for map_mrr |
| regression          | score in the task's own range                | `{"score"}`                                 |
| multiple choice     | scores of the row's choices, any number      | index of the right choice                   |
| span                | text, empty for no answer                    | `{"answers": [text, ...], "context"}`       |
| seq2seq             | text                                         | `{"references": [text, ...], "source"}`     |
| any, for perplexity | `(summed negative log-likelihood, tokens)`   | not looked at                               |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

from trainer.errors import DataError, nearest
from trainer.metrics import ranking, squad, text
from trainer.tasks.spec import Family, TaskSpec

Scores = dict[str, float]

PRIMARY: dict[str, str] = {
    "accuracy": "accuracy",
    "macro_f1": "macro_f1",
    "micro_f1": "micro_f1",
    "weighted_f1": "weighted_f1",
    "f1": "f1",
    "f1_positive": "f1_positive",
    "mcc": "mcc",
    "pearson_spearman": "pearson_spearman",
    "map_mrr": "map",
    "recall@1": "recall@1",
    "squad_f1_em": "f1",
    "squad_v2_f1_em": "f1",
    "rouge": "rougeL",
    "rouge_l": "rouge_l",
    "bleu": "bleu",
    "gleu": "gleu",
    "sari": "sari",
    "exact_match": "exact_match",
    "perplexity": "perplexity",
}
"""Metric -> the key of its result that stands for it in tables, means and checkpoint selection."""

BINARY = ("f1", "f1_positive", "map_mrr")
"""Metrics about class 1 against class 0."""


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the primary number is the better one."""
    return metric != "perplexity"


def check_metric(spec: TaskSpec) -> None:
    """Raise `DataError` when the task's metric cannot be computed on its classes."""
    if spec.primary_metric in BINARY and spec.classes != 2:
        raise DataError(
            f"task '{spec.name}': metric '{spec.primary_metric}' is for two classes (class 1 is the positive one), but "
            f"the task has {spec.classes}; use macro_f1, micro_f1, weighted_f1, accuracy or mcc"
        )


def compute(metric: str, predictions: Sequence[Any], references: Sequence[Any], spec: TaskSpec) -> Scores:
    """All numbers of `metric`, the primary one first (`PRIMARY[metric]`). Formats: the table above."""
    if metric not in _METRICS:
        raise DataError(f"task '{spec.name}': unknown metric '{metric}'{nearest(metric, _METRICS)}")
    if len(predictions) == 0:
        raise DataError(f"task '{spec.name}': no rows to compute '{metric}' on; give the task dev rows")
    if len(references) != len(predictions):
        raise ValueError(f"task '{spec.name}': {len(predictions)} predictions for {len(references)} references")
    return _METRICS[metric](predictions, references, spec)


def majority(metric: str, spec: TaskSpec, train_labels: Sequence[int], references: Sequence[Any]) -> float | None:
    """The primary number of an answer that has not looked at the input; None where there is no such thing.

    - classification: the most frequent class of the training rows, always (f1 is 0 when that is class 0); for
      map_mrr the mean over all orders of the candidates;
    - multiple choice: the position that is most often right in training, always;
    - regression: any constant; its correlation is 0 by definition;
    - span: the better of never answering and answering with the whole context;
    - seq2seq and language models, or no training labels: None.
    """
    family = spec.family
    if metric == "perplexity" or family in (Family.SEQ2SEQ, Family.MASKED_LM, Family.CAUSAL_LM):
        return None
    if family is Family.REGRESSION:
        return 0.0
    if family is Family.SPAN:
        constant = ([""] * len(references), [reference["context"] for reference in references])
        return max(compute(metric, answers, references, spec)[PRIMARY[metric]] for answers in constant)
    if len(train_labels) == 0:
        return None
    counts = Counter(int(label) for label in train_labels)
    best = min(counts, key=lambda label: (-counts[label], label))
    if family is Family.MULTIPLE_CHOICE:
        return float(np.mean([int(reference) == best for reference in references]))
    one_hot = np.eye(max(spec.classes, best + 1))[best]
    return compute(metric, [one_hot] * len(references), references, spec)[PRIMARY[metric]]


def mean_score(scores: Iterable[tuple[str, float]]) -> float | None:
    """Mean of (metric, primary number) pairs over tasks. Perplexities live on another scale and are left out."""
    values = [value for metric, value in scores if higher_is_better(metric)]
    return math.fsum(values) / len(values) if values else None


def _classification(key: str, score: Callable[[Any, Any], float]) -> Callable[..., Scores]:
    """Metric of predicted against true labels; accuracy comes along as the second number."""

    def run(predictions: Sequence[Any], references: Sequence[int], spec: TaskSpec) -> Scores:
        if key in BINARY:
            check_metric(spec)
        guessed = np.array([int(np.argmax(scores)) for scores in predictions])
        true = np.asarray(references, dtype=np.int64)
        return {key: float(score(true, guessed)), "accuracy": float(np.mean(true == guessed))}

    return run


def _f1(average: str) -> Callable[[Any, Any], float]:
    # scikit-learn's own choice of classes: those that occur among the references or the predictions.
    def score(true: Any, guessed: Any) -> float:
        return float(sklearn_metrics.f1_score(true, guessed, average=average, zero_division=0.0))

    return score


def _recall_at_1(predictions: Sequence[Any], references: Sequence[int], spec: TaskSpec) -> Scores:
    hits = [int(np.argmax(scores)) == int(true) for scores, true in zip(predictions, references, strict=True)]
    return {"recall@1": float(np.mean(hits))}


def _map_mrr(predictions: Sequence[Any], references: Sequence[dict[str, Any]], spec: TaskSpec) -> Scores:
    check_metric(spec)
    return ranking.map_mrr(
        np.array([float(scores[1]) for scores in predictions]),
        np.array([int(reference["label"]) == 1 for reference in references]),
        [reference["group"] for reference in references],
    )


def _pearson_spearman(predictions: Sequence[float], references: Sequence[dict[str, float]], spec: TaskSpec) -> Scores:
    """A constant (or not finite) side has no correlation; 0.0 is reported so that means stay numbers."""
    x = np.asarray(predictions, dtype=np.float64)
    y = np.asarray([reference["score"] for reference in references], dtype=np.float64)
    pearson = spearman = 0.0
    if len(x) > 1 and np.isfinite(x).all() and np.ptp(x) > 0 and np.ptp(y) > 0:
        # Scaling first: squares of very small or large differences must not under- or overflow.
        pearson = float(stats.pearsonr((x - x.mean()) / np.ptp(x), (y - y.mean()) / np.ptp(y)).statistic)
        spearman = float(stats.spearmanr(x, y).statistic)
    return {"pearson_spearman": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}


def _perplexity(predictions: Sequence[tuple[float, int]], references: Sequence[Any], spec: TaskSpec) -> Scores:
    """exp of the mean over all tokens, each token counted once however the rows were batched."""
    tokens = sum(int(count) for _, count in predictions)
    if tokens == 0:
        raise DataError(f"task '{spec.name}': no target tokens to compute perplexity on")
    nll = math.fsum(float(total) for total, _ in predictions) / tokens
    return {"perplexity": math.exp(nll) if nll < 700 else math.inf, "nll_per_token": nll}


def _accuracy(predictions: Sequence[Any], references: Sequence[int], spec: TaskSpec) -> Scores:
    return {"accuracy": _recall_at_1(predictions, references, spec)["recall@1"]}


def _squad(version_2: bool) -> Callable[..., Scores]:
    def run(predictions: Sequence[str], references: Sequence[dict[str, Any]], spec: TaskSpec) -> Scores:
        return squad.squad_scores(predictions, [reference["answers"] for reference in references], version_2)

    return run


def _text(score: Callable[[Sequence[str], list[list[str]], list[str]], Scores]) -> Callable[..., Scores]:
    def run(predictions: Sequence[str], references: Sequence[dict[str, Any]], spec: TaskSpec) -> Scores:
        return score(predictions, [r["references"] for r in references], [r["source"] for r in references])

    return run


_METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any], TaskSpec], Scores]] = {
    "accuracy": _accuracy,
    "macro_f1": _classification("macro_f1", _f1("macro")),
    "micro_f1": _classification("micro_f1", _f1("micro")),
    "weighted_f1": _classification("weighted_f1", _f1("weighted")),
    "f1": _classification("f1", _f1("binary")),
    "f1_positive": _classification("f1_positive", _f1("binary")),
    "mcc": _classification("mcc", sklearn_metrics.matthews_corrcoef),
    "pearson_spearman": _pearson_spearman,
    "map_mrr": _map_mrr,
    "recall@1": _recall_at_1,
    "squad_f1_em": _squad(version_2=False),
    "squad_v2_f1_em": _squad(version_2=True),
    "rouge": _text(text.rouge),
    "rouge_l": _text(text.rouge_l),
    "bleu": _text(text.bleu),
    "gleu": _text(text.gleu),
    "sari": _text(text.sari),
    "exact_match": _text(text.exact_match),
    "perplexity": _perplexity,
}
