import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.metrics.progress import Progress, duration

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
from trainer.metrics.progress import Progress
with Progress(1200, 100) as progress:
    progress.message("evaluating [mrpc]")
    for step in range(101, 141):
        progress.update(step, 1.5 - step / 1000, 3412.3, 0.042)
    progress.message("checkpoint saved")
"""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_pipe_gets_plain_lines():
    # A real pipe, as under the launcher. FORCE_COLOR and a good TERM must not bring the bar back.
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    lines = result.stdout.splitlines()
    assert lines[0] == "evaluating [mrpc]"
    assert lines[-1] == "checkpoint saved"
    assert len(lines) == 6
    assert re.fullmatch(
        r"step  110/1200  loss  1\.3900    3,412 tokens/s  padding  4\.2 %  elapsed 0:00:0\d  left 0:00:\d\d", lines[1]
    )
    assert len({len(line) for line in lines[1:-1]}) == 1  # columns stay under each other
    assert result.stderr == ""


def test_a_long_evaluation_says_so_now_and_then(capsys):
    clock = Clock()
    progress = Progress(10, clock=clock)
    for batch in range(8):
        clock.now = 12.0 * batch
        progress.evaluating(batch, 8)
    assert capsys.readouterr().out.splitlines() == ["evaluating, batch 3 of 8", "evaluating, batch 6 of 8"]


def test_a_terminal_gets_a_bar():
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=follower, env=environment)
    os.close(follower)
    output = b""
    try:
        while block := os.read(leader, 4096):
            output += block
    except OSError:  # how a Linux terminal says that the other side has closed it
        pass
    assert process.wait(timeout=60) == 0
    os.close(leader)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    assert "evaluating [mrpc]" in shown
    last = [line for line in re.split(r"[\r\n]+", shown) if "tokens/s" in line][-1]
    assert "140/1200" in last
    assert "loss 1.3600  3,412 tokens/s  pad 4 %" in last
    assert last.rstrip().endswith(" left")
    assert "━" in last
    assert len(last) <= 80


def run(updates, capsys, **arguments):
    clock = Clock()
    with Progress(clock=clock, **arguments) as progress:
        for step, now in updates:
            clock.now = now
            progress.update(step, 1.0, 1000.0, 0.0)
        progress.message("end")
    return capsys.readouterr().out.splitlines()


def test_time_left_is_measured_from_the_end_of_the_first_step(capsys):
    # The first step took 100 s, the others 2 s each: 6 steps left are 12 s.
    lines = run([(1, 100), (2, 102), (3, 104), (4, 106)], capsys, total=10, log_every=4)
    assert lines[0].endswith("elapsed 0:01:46  left 0:00:12")


def test_time_left_after_a_resume_counts_only_this_runs_steps(capsys):
    lines = run([(901, 1), (902, 11)], capsys, total=904, start=900, log_every=902)
    assert lines[0].endswith("left 0:00:20")


def test_the_first_step_cannot_tell_and_the_last_step_is_always_printed(capsys):
    lines = run([(1, 1), (2, 3), (3, 5)], capsys, total=3, log_every=1)
    assert [line.split("left ")[-1] for line in lines[:3]] == ["-:--:--", "0:00:02", "0:00:00"]
    assert [line.split()[1] for line in run([(6, 1), (7, 2)], capsys, total=7)[:-1]] == ["7/7"]


def test_other_ranks_print_nothing(capsys):
    assert run([(1, 1), (2, 2)], capsys, total=2, log_every=1, enabled=False) == []


def test_plain_lines_go_where_stdout_points_when_printed(capsys, monkeypatch):
    with Progress(1) as progress:
        monkeypatch.setattr(sys, "stdout", other := io.StringIO())
        progress.message("hello")
    assert other.getvalue() == "hello\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (360000, "100:00:00"), (None, "-:--:--")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
