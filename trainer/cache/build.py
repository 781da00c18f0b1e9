"""Filling the cache: every (task, split) tokenised once, in parallel, with flat memory.

Owns: which files are there already, the worker processes, and the collecting of bad rows. Chunks of raw lines go to
the workers, record batches come back and are written in order, so the file is the same whatever the number of workers.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from trainer.cache.arrow_file import ArrowFile, remove_leftovers
from trainer.cache.encode import encode_rows
from trainer.cache.keys import Fingerprints, cache_key, load_tokenizer, tokenizer_hash
from trainer.cache.layout import schema_of
from trainer.cache.text import EncodeOptions
from trainer.errors import DataError, RunError
from trainer.tasks.columns import BadRow, DroppedRow
from trainer.tasks.rows import BadRows, check_row, dropped_text
from trainer.tasks.sources import Chunk, is_hub, open_source
from trainer.tasks.spec import TaskSpec
from trainer.tasks.textfiles import COMPRESSIONS

__all__ = ["EncodeOptions", "build_cache"]

Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)

_POOL_BYTES = 16 << 20
"""Less data than this is tokenised faster in this process than the worker processes start."""


@dataclass(frozen=True)
class _Job:
    """One file to make."""

    spec: TaskSpec
    split: str
    uri: str
    source_split: str
    evaluation: bool
    path: Path


@dataclass(frozen=True)
class _Done:
    """What became of a chunk."""

    batch: pa.RecordBatch | None
    bad: list[tuple[str, str]]
    dropped: Counter[str]
    """Rows that the task's `drop` left out, by reason."""


def build_cache(
    requests: Sequence[tuple[TaskSpec, str]],
    tokenizer_path: str,
    options: EncodeOptions,
    cache_dir: Path,
    workers: int = 0,
    progress: Progress | None = None,
) -> dict[tuple[str, str], Path]:
    """Make sure that every requested (task, split) is tokenised, and say where.

    All splits but `train` keep what metrics need. `dev` of a task without a dev source is its train source read that
    way: `cut_dev` of either file cuts the same rows.

    Args:
        requests: Tasks with the name of a split.
        tokenizer_path: Folder or hub name of the tokenizer.
        options: Kind of model and lengths.
        cache_dir: Where cached files are kept.
        workers: Processes that tokenise; 0 is one a core.
        progress: Called with (text, finished splits, splits to do) while there is something to do.

    Returns:
        (task name, split) -> file for `CachedSplit`.

    Raises:
        DataError: bad rows, all splits' at once (50 a split are listed); a source that is missing or has no rows.
        ModelError: the tokenizer cannot be loaded, or cannot do what a family needs.
        RunError: the cache cannot be written.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        fingerprints = Fingerprints(cache_dir)
        jobs = _jobs(requests, tokenizer_hash(tokenizer_path), options, cache_dir, fingerprints)
        fingerprints.save()
    except OSError as error:
        raise RunError(f"the token cache {cache_dir} cannot be used: {error}") from error
    missing = {job.path: job for job in jobs if not job.path.is_file()}
    if missing:
        _Build(list(missing.values()), progress).run(_runner(missing.values(), tokenizer_path, options, workers))
    return {(job.spec.name, job.split): job.path for job in jobs}


def _jobs(
    requests: Sequence[tuple[TaskSpec, str]],
    tokenizer: str,
    options: EncodeOptions,
    cache_dir: Path,
    fingerprints: Fingerprints,
) -> list[_Job]:
    jobs = []
    for spec, split in requests:
        source_split = "train" if split == "dev" and spec.dev is None else split
        uri = spec.source(source_split)
        if uri is None:
            raise DataError(f"task '{spec.name}': has no {split} source; add `{source_split}` to its declaration")
        evaluation = split != "train"
        key = cache_key(spec, evaluation, fingerprints.of(uri, source_split), tokenizer, options)
        jobs.append(
            _Job(spec, split, uri, source_split, evaluation, cache_dir / spec.name / f"{source_split}-{key}.arrow")
        )
    return jobs


class _Runner(Protocol):
    """Where chunks are tokenised."""

    depth: int
    """Chunks under way at a time: what bounds the memory."""

    def submit(self, job: _Job, chunk: Chunk, check_only: bool) -> Future[_Done]: ...

    def close(self) -> None: ...


@dataclass
class _Build:
    """The making of some files."""

    jobs: list[_Job]
    progress: Progress | None
    problems: list[str] = field(default_factory=list)
    failed: set[Path] = field(default_factory=set)
    """Files that will not be made; the rest of their rows is checked, but not tokenised."""
    finished: int = 0

    def run(self, runner: _Runner) -> None:
        """Make all files; raise one error with everything that is wrong with the data."""
        for folder in {job.path.parent for job in self.jobs}:
            remove_leftovers(folder)
        try:
            for job, results in groupby(self._results(runner), key=lambda pair: pair[0]):
                self._write(job, (result for _, result in results))
        except BrokenProcessPool as error:
            raise RunError(
                "a process that tokenises ended, most often for want of memory: try fewer (workers=2). "
                "A script of your own must call this under `if __name__ == '__main__':`"
            ) from error
        finally:
            runner.close()
        if self.problems:
            raise DataError("\n".join(self.problems))

    def _results(self, runner: _Runner) -> Iterator[tuple[_Job, _Done | None]]:
        """Results in the order of the jobs and of their chunks; each job ends with None."""
        pending: deque[tuple[_Job, Future[_Done] | None]] = deque()
        for job in self.jobs:
            try:
                for chunk in open_source(job.uri, job.source_split).chunks():
                    pending.append((job, runner.submit(job, chunk, job.path in self.failed)))
                    while len(pending) >= runner.depth:
                        yield _resolved(*pending.popleft())
            except DataError as error:  # the source as a whole
                self.failed.add(job.path)
                self.problems.append(str(error))
            pending.append((job, None))
        while pending:
            yield _resolved(*pending.popleft())

    def _write(self, job: _Job, results: Iterator[_Done | None]) -> None:
        bad, dropped = BadRows(), Counter[str]()
        with ArrowFile(job.path, schema_of(job.spec.family)) as file:
            for done in results:
                if done is None:
                    break
                dropped += done.dropped
                for place, reason in done.bad:
                    bad.add(place, reason)
                    self.failed.add(job.path)
                if done.batch is not None and job.path not in self.failed:
                    file.add(done.batch)
                self._report(job, file.rows)
            self._judge(job, bad, dropped, file.rows)
            if job.path not in self.failed:
                file.commit()
        self.finished += 1
        self._report(job, file.rows)

    def _judge(self, job: _Job, bad: BadRows, dropped: Counter[str], rows: int) -> None:
        left_out = dropped_text(dropped) if dropped else ""
        if left_out:  # said where the cache is made, and by `sett tasks check` at any time
            logger.warning("task '%s', %s: %s", job.spec.name, job.source_split, left_out)
        try:
            bad.raise_if_any(job.spec.name, job.source_split)
            if not rows and job.path not in self.failed:
                but = f" but the {left_out}" if left_out else ""
                raise DataError(f"task '{job.spec.name}', {job.source_split}: {job.uri} has no rows{but}")
        except DataError as error:
            self.failed.add(job.path)
            self.problems.append(str(error))

    def _report(self, job: _Job, rows: int) -> None:
        if self.progress is not None:
            self.progress(f"{job.spec.name}/{job.source_split}: {rows:,} rows", self.finished, len(self.jobs))


def _resolved(job: _Job, future: Future[_Done] | None) -> tuple[_Job, _Done | None]:
    return job, None if future is None else future.result()


def _encode(tokenizer: Any, options: EncodeOptions, job: _Job, chunk: Chunk, check_only: bool) -> _Done:
    rows, bad, dropped = [], [], Counter[str]()
    for raw in chunk.rows():
        if raw.data is None:
            bad.append((raw.place, raw.problem or "cannot be read"))
            continue
        try:
            rows.append((raw.index, check_row(job.spec, raw.data)))
        except BadRow as error:
            bad.append((raw.place, str(error)))
        except DroppedRow as reason:
            dropped[str(reason)] += 1
    if bad or check_only or not rows:
        return _Done(None, bad, dropped)
    return _Done(encode_rows(job.spec, rows, tokenizer, options, job.evaluation), bad, dropped)


class _Here:
    """Tokenises in this process."""

    depth = 1

    def __init__(self, tokenizer: Any, options: EncodeOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options

    def submit(self, job: _Job, chunk: Chunk, check_only: bool) -> Future[_Done]:
        future: Future[_Done] = Future()
        future.set_result(_encode(self.tokenizer, self.options, job, chunk, check_only))
        return future

    def close(self) -> None:
        """Nothing to end."""


class _Pool:
    """Tokenises in worker processes, which do not inherit this process's threads."""

    def __init__(self, tokenizer_path: str, options: EncodeOptions, workers: int) -> None:
        self.depth = 2 * workers + 2
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trainer.cache.encode", "transformers.models.auto.tokenization_auto"])
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_path, options))

    def submit(self, job: _Job, chunk: Chunk, check_only: bool) -> Future[_Done]:
        return self._pool.submit(_work, job, chunk, check_only)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


_worker: tuple[Any, EncodeOptions]
"""A worker process's tokenizer, loaded once."""


def _start_worker(tokenizer_path: str, options: EncodeOptions) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = load_tokenizer(tokenizer_path), options


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and a pool's workers wait for it forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: _Job, chunk: Chunk, check_only: bool) -> _Done:
    return _encode(*_worker, job, chunk, check_only)


def _runner(jobs: Collection[_Job], tokenizer_path: str, options: EncodeOptions, workers: int) -> _Runner:
    # Loaded here in any case: a tokenizer that does not load must be one clear error, not a broken pool.
    here = _Here(load_tokenizer(tokenizer_path), options)
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1 or sum(_bytes(job.uri) for job in jobs) < _POOL_BYTES:
        return here
    return _Pool(tokenizer_path, options, workers)


def _bytes(uri: str) -> int:
    """About how much text a source has."""
    path = Path(uri)
    if is_hub(uri):
        return _POOL_BYTES
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size * (4 if path.suffix in COMPRESSIONS else 1)
