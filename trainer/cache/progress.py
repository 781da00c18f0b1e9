"""What the user sees while rows are read, tokenised or evaluated.

Owns: `RowsBar`, a bar on a terminal and nothing elsewhere (the logs of ranks have no use for it).
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class RowsBar:
    """Context manager; call it with (text, done, total). It appears with the first call, so a warm cache shows none.

    Args:
        verb: what is being done to the rows.
    """

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self._bar: Progress | None = None

    def __enter__(self) -> RowsBar:
        return self

    def __call__(self, text: str, done: int, total: int) -> None:
        if self._bar is None:
            if not (console := Console()).is_terminal:
                return
            columns = (TextColumn(f"{self.verb} {{task.description}}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(text, total=total)
        self._bar.update(self._task, description=text, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
