"""The processes of a run: started in a session of their own, stopped in order, and none left behind.

Owns: `Child`. Every process of a run carries the run's directory in its environment, so that ranks are found even when
the processes between them and the study are gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

MARK = "SETT_STUDY_RUN"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Child:
    """A command of a run, its output appended to a log."""

    def __init__(self, command: Sequence[str], directory: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.directory = directory
        self.log = log
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            self._log_start = file.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, MARK: str(directory)},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def poll(self) -> int | None:
        """The exit code once it has ended; whatever it leaves behind is ended, too."""
        code = self._process.poll()
        if code is not None:
            kill_all(self.directory)
        return code

    def stop(self) -> None:
        """Ask it to save a checkpoint and end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and all that it started, now."""
        kill_all(self.directory)
        self._process.wait()

    def last_lines(self, most: int) -> list[str]:
        """The end of what this command printed."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            text = file.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-most:]


def processes_of(directory: Path) -> list[psutil.Process]:
    """The processes of a run on this machine, whoever their parents are."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_all(directory: Path) -> None:
    """SIGKILL to every process of a run, and to those they have started since, for no longer than half a minute."""
    deadline = time.monotonic() + 30
    while (left := processes_of(directory)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)  # not psutil's wait: it would take the exit code of our child


def _end_with_parent() -> None:
    """In the child: be told to stop when the study dies, however it dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
