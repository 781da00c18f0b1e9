"""Stopping in order: a signal to any rank stops all ranks after the same window.

Owns: `StopFlag`. The launcher forwards SIGTERM to one rank after another, so a rank must never act on its own: the flag
is part of what the ranks agree on every window.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


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
