"""Stopping in order: a signal to any rank stops all ranks after the same window.

Owns: `StopFlag` and `end_rank`. The launcher forwards SIGTERM to one rank after another, so a rank must never act on
its own: the flag is part of what the ranks agree on every window.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn


class StopFlag:
    """Set by SIGTERM and SIGINT while entered; the handlers in place before are restored on exit."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: dict[int, signal.Handlers | object] = {}

    def __enter__(self) -> StopFlag:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the window
        self.raised = True


def end_rank(code: int = 0) -> NoReturn:
    """End this process with `code`, after exit handlers have run and output is flushed, without Python's finalization.

    A thread of gloo drops the tensors of a collective after its caller has gone on. When that was the last one before
    exit, the thread asks a finalizing interpreter for the GIL, is unwound through C++ frames, and `std::terminate`
    turns a finished rank into exit code -6 (seen about once in thirty exits on a busy machine).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
