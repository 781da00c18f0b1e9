"""A rank ends with the code it was given, its output flushed and its exit handlers run."""

from __future__ import annotations

import subprocess
import sys

import pytest

LINGERING_THREAD = """
import atexit, sys, threading, time
from trainer.engine.stop import end_rank
atexit.register(print, "handler")
threading.Thread(target=time.sleep, args=(60,)).start()
print("output")
print("problem", file=sys.stderr)
end_rank({code})
"""


@pytest.mark.parametrize("code", [0, 5])
def test_end_rank_waits_for_no_thread_and_loses_no_output(code: int) -> None:
    command = [sys.executable, "-c", LINGERING_THREAD.format(code=code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "output\nhandler\n", "problem\n")
