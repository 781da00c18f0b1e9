"""Reading every row of every task, to say what is there, what is wrong, and what stands on both sides of a split.

Owns: `check_tasks` and what it finds. Splits are read in parallel processes; of a row only hashes come back, so memory
is a few words a row whatever the rows hold. Showing it is `report.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError, RunError
from trainer.tasks.cards import SPLITS
from trainer.tasks.columns import BadRow, DroppedRow
from trainer.tasks.overlap import Keys, TrainIndex
from trainer.tasks.report import render_list, render_report
from trainer.tasks.rows import SEPARATOR, BadRows, bytes_key, check_row, dropped_text, input_fields, row_key
from trainer.tasks.sources import open_source
from trainer.tasks.spec import Row, TaskSpec

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CheckReport", "Overlap", "SplitFacts", "TaskFacts", "check_tasks", "render_list"]

SHARED_TEXT_CHARS = 24
"""Shorter texts ("yes", "What happened?") say nothing when two tasks share them."""

_PARALLEL_BYTES = 4 << 20
"""Less than this is read here: starting processes would take longer."""

_NOT_WORD = re.compile(r"[\W_]+")
_NOT_WORD_ASCII = bytes(code for code in range(128) if not chr(code).isalnum())


@dataclass
class SplitFacts:
    """What was found in one split."""

    task: str
    split: str
    bad: BadRows
    rows: int = 0
    """Good rows."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that the task's `drop` leaves out, by reason."""
    words: int = 0
    labels: set[int] = field(default_factory=set)
    """Labels that occur (multiple choice: numbers of choices that occur)."""
    inputs: Keys = field(default_factory=Keys.empty)
    """Hash of each row's whole input."""
    texts: Keys = field(default_factory=Keys.empty)
    """Hashes of each row's longer texts, case, spacing and punctuation left out."""


class Overlap(NamedTuple):
    """Rows of an evaluation split that training data of some task, or of the task itself, also holds."""

    train_task: str
    eval_task: str
    split: str
    inputs: int
    """Rows whose whole input is also a training input, character for character."""
    texts: int
    """Rows that share a text of at least `SHARED_TEXT_CHARS` characters, but for case, spacing and punctuation."""


@dataclass(frozen=True)
class TaskFacts:
    """What was found in one task."""

    spec: TaskSpec
    splits: dict[str, SplitFacts]
    train_duplicates: int
    """Training rows whose input stands in an earlier training row."""

    @property
    def bad(self) -> int:
        return sum(split.bad.total for split in self.splits.values())


@dataclass(frozen=True)
class CheckReport:
    """The tasks, and every pair of a train split and a dev or test split that share rows."""

    tasks: list[TaskFacts]
    overlaps: list[Overlap]

    @property
    def ok(self) -> bool:
        """No bad row anywhere. Duplicates are facts about the data, not errors."""
        return not any(task.bad for task in self.tasks)

    def overlap(self, train_task: str, eval_task: str, split: str) -> Overlap:
        """The pair's overlap, all zero when there is none."""
        for found in self.overlaps:
            if found[:3] == (train_task, eval_task, split):
                return found
        return Overlap(train_task, eval_task, split, 0, 0)

    def render(self, console: Console) -> None:
        """Print to a rich console."""
        render_report(self, console)


Progress = Callable[[str, int, int], None]


def check_tasks(specs: Sequence[TaskSpec], limit: int = 50, progress: Progress | None = None) -> CheckReport:
    """Read every row of `specs`. At most `limit` bad rows a split are listed; all are counted.

    `progress` is called with what was just read and the number of splits done and in all.
    """
    jobs = [(spec, split) for spec in specs for split in SPLITS if spec.source(split) is not None]
    found: dict[tuple[str, str], SplitFacts] = {}
    for facts in _read_all(jobs, limit):
        found[facts.task, facts.split] = facts
        if progress is not None:
            progress(f"{facts.task} {facts.split}", len(found), len(jobs))
    tasks = []
    for spec in specs:
        splits = {split: found[spec.name, split] for split in SPLITS if (spec.name, split) in found}
        train = splits["train"].inputs.values if "train" in splits else np.empty(0, np.uint64)
        tasks.append(TaskFacts(spec, splits, len(train) - len(np.unique(train))))
    return CheckReport(tasks, _overlaps(tasks))


def _overlaps(tasks: list[TaskFacts]) -> list[Overlap]:
    training = [(number, task.splits["train"]) for number, task in enumerate(tasks) if "train" in task.splits]
    inputs = TrainIndex([(number, train.inputs.values) for number, train in training], len(tasks))
    texts = TrainIndex([(number, train.texts.values) for number, train in training], len(tasks))
    overlaps = []
    for task in tasks:
        for split, facts in task.splits.items():
            if split == "train":
                continue
            by_input, by_text = inputs.count(facts.inputs), texts.count(facts.texts)
            for number in np.flatnonzero(by_input + by_text):
                pair = (tasks[number].spec.name, task.spec.name, split)
                overlaps.append(Overlap(*pair, int(by_input[number]), int(by_text[number])))
    return overlaps


def _read_all(jobs: list[tuple[TaskSpec, str]], limit: int) -> Iterator[SplitFacts]:
    sizes = [_bytes(spec.source(split)) for spec, split in jobs]
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    if workers < 2 or sum(sizes) < _PARALLEL_BYTES:
        yield from (read_split(spec, split, limit) for spec, split in jobs)
        return
    # Spawned, not forked: the caller may hold threads (torch, datasets) that a fork would leave in a broken state.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        largest_first = sorted(range(len(jobs)), key=lambda i: -sizes[i])
        for future in as_completed([pool.submit(read_split, *jobs[i], limit) for i in largest_first]):
            yield future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that reads rows ended early: out of memory, or this was called from a script that does "
            "not guard its main part with `if __name__ == '__main__':`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _bytes(uri: str | None) -> int:
    path = Path(uri or "")
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0


def read_split(spec: TaskSpec, split: str, limit: int) -> SplitFacts:
    """Read one split to its end (runs in a worker process)."""
    uri = spec.source(split)
    assert uri is not None
    facts = SplitFacts(spec.name, split, BadRows(limit))
    inputs, texts, owners = array("Q"), array("Q"), array("q")
    try:
        for row in _good_rows(spec, uri, split, facts):
            fields = [text for text in input_fields(spec, row) if text]
            inputs.append(row_key(SEPARATOR.join(fields)))
            facts.words += sum(len(text.split()) for text in fields)
            if "choices" in row:
                facts.labels.add(len(row["choices"]))
            elif "label" in row:
                facts.labels.add(row["label"])
            for key in _text_keys(fields):
                texts.append(key)
                owners.append(facts.rows)
            facts.rows += 1
    except DataError as error:
        facts.bad.add(Path(uri).name, str(error))
    if not facts.rows and not facts.bad.total:
        facts.bad.add(Path(uri).name, "no rows" + (f" but the {dropped_text(facts.dropped)}" if facts.dropped else ""))
    facts.inputs = Keys(_uint64(inputs), np.arange(len(inputs)))
    facts.texts = Keys(_uint64(texts), np.frombuffer(owners, np.int64)) if texts else Keys.empty()
    if split == "train":  # only which texts there are matters: contexts that many rows share are sent once
        values = np.unique(facts.texts.values)
        facts.texts = Keys(values, np.zeros(len(values), np.int64))
    return facts


def _good_rows(spec: TaskSpec, uri: str, split: str, facts: SplitFacts) -> Iterator[Row]:
    for chunk in open_source(uri, split).chunks():
        for raw in chunk.rows():
            if raw.data is None:
                facts.bad.add(raw.place, raw.problem or "cannot be read")
                continue
            try:
                yield check_row(spec, raw.data)
            except BadRow as reason:
                facts.bad.add(raw.place, str(reason))
            except DroppedRow as reason:
                facts.dropped[str(reason)] += 1


def _text_keys(fields: Iterable[str]) -> set[int]:
    return {bytes_key(_letters(text)) for text in fields if len(text) >= SHARED_TEXT_CHARS}


def _letters(text: str) -> bytes:
    """The text without case, spacing and punctuation. ASCII, which most is, takes a way ten times as fast."""
    if text.isascii():
        return text.lower().encode().translate(None, _NOT_WORD_ASCII)
    return _NOT_WORD.sub("", text.lower()).encode()


def _uint64(values: array[int]) -> NDArray[np.uint64]:
    return np.array(np.frombuffer(values, np.uint64)) if values else np.empty(0, np.uint64)
