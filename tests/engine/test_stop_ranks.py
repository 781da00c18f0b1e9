"""A signal to `run_ranks` reaches ranks that are started only after it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.engine.launch import Launch, run_ranks
from trainer.errors import RunError

LAUNCHER = """
import subprocess, sys, time
time.sleep(2)
open(sys.argv[1], "w").close()
rank = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(120)"
sys.exit(subprocess.run([sys.executable, "-c", rank, "trainer.worker"]).returncode)
"""


class SlowLaunch(Launch):
    """A launcher that takes two seconds to make its rank."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", LAUNCHER, *arguments]


def test_a_stop_before_there_are_ranks_is_not_lost(tmp_path: Path) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    with contextlib.suppress(RunError):  # a rank that is told before it listens ends with the signal
        run_ranks(SlowLaunch(num_gpus=1), [str(tmp_path / "started")])
    assert (tmp_path / "started").exists()
    assert 2 < time.monotonic() - began < 60
