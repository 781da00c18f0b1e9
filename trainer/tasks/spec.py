"""What a task is: a declaration, nothing else.

Owns: `Family`, `TaskSpec`, `TextOf` and the table of what each family needs. Reading rows is `sources.py`, checking
them is `rows.py`, finding declarations on disk is `cards.py`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from trainer.errors import nearest
from trainer.tasks.columns import ColumnSource, problem_with


class Family(StrEnum):
    """The eight kinds of task. A family fixes columns, head, loss and the metrics that make sense."""

    CLASSIFICATION = "classification"
    PAIR_CLASSIFICATION = "pair_classification"
    REGRESSION = "regression"
    MULTIPLE_CHOICE = "multiple_choice"
    SPAN = "span"
    SEQ2SEQ = "seq2seq"
    MASKED_LM = "masked_lm"
    CAUSAL_LM = "causal_lm"


class FamilyFacts(NamedTuple):
    """What a family fixes. `columns` are the canonical names that `TaskSpec.columns` maps from a file's own."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    metrics: tuple[str, ...]  # the first is the default
    has_classes: bool = False


FAMILIES: dict[Family, FamilyFacts] = {
    Family.CLASSIFICATION: FamilyFacts(
        ("text", "label"),
        (),
        ("accuracy", "macro_f1", "micro_f1", "weighted_f1", "f1", "f1_positive", "mcc"),
        has_classes=True,
    ),
    Family.PAIR_CLASSIFICATION: FamilyFacts(
        ("text_a", "text_b", "label"),
        (),
        ("accuracy", "macro_f1", "micro_f1", "weighted_f1", "f1", "f1_positive", "mcc", "map_mrr"),
        has_classes=True,
    ),
    Family.REGRESSION: FamilyFacts(("text_a", "score"), ("text_b",), ("pearson_spearman",)),
    Family.MULTIPLE_CHOICE: FamilyFacts(("context", "choices", "label"), (), ("accuracy", "recall@1")),
    Family.SPAN: FamilyFacts(("context", "question", "answers"), (), ("squad_f1_em", "squad_v2_f1_em")),
    Family.SEQ2SEQ: FamilyFacts(
        ("source", "target"), ("references",), ("rouge_l", "rouge", "bleu", "gleu", "sari", "exact_match", "perplexity")
    ),
    Family.MASKED_LM: FamilyFacts(("text",), (), ("perplexity",)),
    Family.CAUSAL_LM: FamilyFacts(("text",), (), ("perplexity",)),
}

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+-]{0,99}$")]


class TaskSpec(BaseModel):
    """One task: name, family, labels, metric, where its rows come from, which columns mean what.

    The same model reads an inline entry of a recipe and a `task.json` card (`cards.py` drops a card's bookkeeping).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: TaskName
    """Unique name; metrics, heads and weights are filed under it."""
    family: Family
    """One of the eight families."""
    labels: tuple[str, ...] | None = None
    """Class names; `label` in a row is an index into them, or one of them."""
    num_labels: int | None = Field(default=None, ge=2)
    """Number of classes, when the classes have no names."""
    metric: str = ""
    """Metric reported and used to choose checkpoints; empty means the family's first."""
    columns: dict[str, ColumnSource] = Field(default_factory=dict)
    """Canonical column -> the file's own column where they differ, or a field in it, a template, a list of these, or
    matches of a pattern (docs/tasks.md)."""
    drop: dict[str, tuple[str | int | float | bool | None, ...]] = Field(default_factory=dict)
    """Column -> values whose rows are left out, counted and reported. null stands for no value: null, empty text, an
    empty list, and of a span's answers none that stands in the context."""
    train: str | None = None
    """Source of training rows: a file, a folder saved by `datasets`, or `hub:OWNER/NAME[:CONFIG][@SPLIT]`."""
    dev: str | None = None
    """Source of dev rows. Without it, rows are cut from train by content hash and never trained on."""
    test: str | None = None
    """Source of test rows (only `sett eval --split test` reads them)."""
    score_range: tuple[float, float] | None = None
    """Range of a regression score; scores are scaled to [0, 1] by it for the loss and back for the metric."""
    licence: str = "unstated"
    """Licence of the data as its home states it; goes into model cards."""
    citation: str = ""
    """Who to cite; goes into model cards."""

    @property
    def facts(self) -> FamilyFacts:
        return FAMILIES[self.family]

    @property
    def classes(self) -> int:
        """Number of classes of a classification task; 0 for the other families."""
        if not self.facts.has_classes:
            return 0
        return len(self.labels) if self.labels is not None else int(self.num_labels or 0)

    @property
    def primary_metric(self) -> str:
        return self.metric or self.facts.metrics[0]

    def source(self, split: str) -> str | None:
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]

    @model_validator(mode="after")
    def _consistent(self) -> TaskSpec:
        facts = self.facts
        if facts.has_classes and self.labels is None and self.num_labels is None:
            raise ValueError(f"task '{self.name}': a {self.family.value} task needs `labels` (or `num_labels`)")
        if self.labels is not None and self.num_labels is not None and len(self.labels) != self.num_labels:
            raise ValueError(f"task '{self.name}': {len(self.labels)} labels but num_labels={self.num_labels}")
        if facts.has_classes and self.classes < 2:
            raise ValueError(f"task '{self.name}': needs at least 2 classes")
        if self.metric and self.metric not in facts.metrics:
            raise ValueError(
                f"task '{self.name}': metric '{self.metric}' does not fit family {self.family.value}; "
                f"choose one of {', '.join(facts.metrics)}"
            )
        self._check_columns(facts.columns + facts.optional)
        if self.score_range is not None and not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"task '{self.name}': score_range must be [low, high] with low < high")
        return self

    def _check_columns(self, known: tuple[str, ...]) -> None:
        for column, source in self.columns.items():
            if column not in known:
                raise ValueError(
                    f"task '{self.name}': columns.{column} is not a column of family {self.family.value}"
                    f"{nearest(column, known)} ({', '.join(known)})"
                )
            if problem := problem_with(column, source):
                raise ValueError(f"task '{self.name}': columns.{column}: {problem}")
        empty = next((column for column, values in self.drop.items() if not values), None)
        if empty is not None:
            raise ValueError(f"task '{self.name}': drop.{empty} names no value; list those whose rows are left out")


class TextOf(TaskSpec):
    """Language modelling on the input texts of another task. Nobody writes one: `derived.py` makes it of an entry such
    as `masked_lm:FOLDER`. Its rows are the other task's: checked as those, known by the same key."""

    of: TaskSpec
    """The other task."""


Row = dict[str, Any]
"""A checked row under canonical column names; `label` is an int, `score` a float, `answers` a list of {text, start}. A
row of a `TextOf` has `texts`, a list."""
