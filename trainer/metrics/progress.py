"""What a run prints while it trains.

Owns: the progress bar of a terminal and the plain lines of everything else (pipes, log files, batch systems).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

_QUIET_SECONDS = 30.0
"""Plain lines of an evaluation are at least this far apart."""


class Progress:
    """Progress of steps `start`..`total`; a context manager.

    Args:
        total: last step of the run.
        start: step the run (re)starts from.
        log_every: steps between two plain lines when standard output is no terminal; the last step always has one.
        enabled: False on ranks other than 0, which print nothing.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        log_every: int = 10,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._log_every = log_every
        self._enabled = enabled
        self._clock = clock
        self._began = clock()
        # The first step pays for compilation and allocation, so the rate is measured from its end.
        self._first: tuple[int, float] | None = None
        self._last_line = self._began
        self._bar = _make_bar() if enabled and _is_terminal() else None
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=total, completed=start, numbers="starting", times="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float, padding: float) -> None:
        """Report a finished step: mean loss, real tokens a second over all ranks, padding as a share of all tokens."""
        if not self._enabled:
            return
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        elapsed, left = duration(now - self._began), duration(self._seconds_left(step, now))
        if self._bar is not None:
            # Short enough that a bar is left over on a terminal of 80 characters.
            numbers = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  pad {100 * padding:.0f} %"
            self._bar.update(self._task, completed=step, numbers=numbers, times=f"{elapsed}, {left} left")
        elif step % self._log_every == 0 or step == self._total:
            width = len(str(self._total))
            numbers = f"loss {loss:7.4f}  {tokens_per_second:7,.0f} tokens/s  padding {100 * padding:4.1f} %"
            print(f"step {step:{width}}/{self._total}  {numbers}  elapsed {elapsed:>7}  left {left:>7}", flush=True)

    def evaluating(self, done: int, total: int) -> None:
        """Report the batches of an evaluation, of this rank; the first plain line comes when it turns out long."""
        if not self._enabled:
            return
        if done == 0:
            self._last_line = self._clock()
        text = f"evaluating, batch {done} of {total}"
        if self._bar is not None:
            self._bar.update(self._task, numbers=text)
        elif self._clock() - self._last_line >= _QUIET_SECONDS:
            self._last_line = self._clock()
            print(text, flush=True)

    def message(self, text: str) -> None:
        """Print a line of its own; a bar stays below it."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def _seconds_left(self, step: int, now: float) -> float | None:
        if step >= self._total:
            return 0.0
        if self._first is None or step <= self._first[0]:
            return None
        return (now - self._first[1]) / (step - self._first[0]) * (self._total - step)


def duration(seconds: float | None) -> str:
    """`1:02:03`, or `-:--:--` when not known."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


def _make_bar() -> RichProgress:
    return RichProgress(
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[times]}", markup=False, style="cyan"),
        console=Console(file=sys.stdout),
        expand=True,
    )
