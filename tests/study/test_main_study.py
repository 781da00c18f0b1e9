"""`sett study` with real training: interrupted, continued, failing, reported."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study.small import write_study

from trainer.engine.checkpoint import Checkpoints
from trainer.metrics.log import read_metrics
from trainer.study.claim import FILE_NAME
from trainer.study.grid import Run, plan_runs
from trainer.study.process import processes_of
from trainer.study.runner import LOG
from trainer.study.schema import load_study

STEPS = 120
SETT = [sys.executable, "-m", "trainer.cli", "study"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def sett(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [*SETT, *arguments], capture_output=True, text=True, timeout=400, env=ENVIRONMENT, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def log_of(run: Run) -> str:
    path = run.directory / LOG
    return path.read_text() if path.exists() else ""


def trainings(run: Run) -> int:
    return len(re.findall(r"^\$ .* -m trainer\.cli train ", log_of(run), re.MULTILINE))


def nothing_runs(runs: list[Run]) -> bool:
    return not any(processes_of(run.directory) or (run.directory / FILE_NAME).exists() for run in runs)


def interrupt(path: Path, runs: list[Run]) -> str:
    """Start the study, and end it with SIGTERM once both of its first runs are training."""
    command = [*SETT, str(path), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 200
    for run in runs[:2]:
        log = run.directory / "metrics.jsonl"
        while not (log.exists() and any(record["step"] >= 2 for record in read_metrics(log))):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, log_of(run)
            time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    return printed


@pytest.mark.distributed
def test_an_interrupted_study_goes_on_with_nothing_lost_and_nothing_done_twice(tmp_path: Path) -> None:
    path = write_study(tmp_path, STEPS)
    runs = plan_runs(load_study(path))
    printed = interrupt(path, runs)
    assert "run the same command to go on" in printed
    assert nothing_runs(runs)
    stopped = [run for run in runs if "the next call goes on" in printed and f"stopped  {run.label};" in printed]
    assert stopped, printed
    saved = {run: Checkpoints(run.directory, 1, False).steps()[-1] for run in stopped}
    assert min(saved.values()) < STEPS  # the other may have been stopped between its last window and its outcome

    printed = sett(str(path), "--jobs", "2")
    assert "4 of 4 runs finished" in printed
    assert nothing_runs(runs)
    for run in runs:
        assert trainings(run) == (2 if run in stopped else 1), run.label
        assert log_of(run).count("-m trainer.cli eval ") == 1  # test is looked at once
        steps = [r["step"] for r in read_metrics(run.directory / "metrics.jsonl") if "train/loss" in r]
        assert steps == list(range(1, STEPS + 1)), run.label
    for run, step in saved.items():
        assert f"resuming at window {step}" in log_of(run)
    with (tmp_path / "out" / "small" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["task"], r["arm"], int(r["seed"])) for r in rows] == [(r.task, r.arm, r.seed) for r in runs]
    for row in rows:
        assert float(row["value"]) * 10 == pytest.approx(
            round(float(row["value"]) * 10)
        )  # ten test rows, twelve dev rows
        assert float(row["dev"]) * 12 == pytest.approx(round(float(row["dev"]) * 12))
        assert float(row["seconds"]) > 0
        assert float(row["peak_gib"]) > 0.05
        assert row["device"]
    names = {file.name for file in (tmp_path / "out" / "small").iterdir()}
    assert names == {"RESULTS.md", "results.csv", "summary.csv", "results.png", "topic"}

    before = [log_of(run) for run in runs]
    assert "4 of 4 runs are done" in sett(str(path))
    assert [log_of(run) for run in runs] == before


@pytest.mark.distributed
def test_a_run_that_fails_is_shown_with_its_reason(tmp_path: Path) -> None:
    arms = {
        "alone": {"recipe": "alone.yaml"},
        "both": {"recipe": "both.yaml", "overrides": ["model.tokenizer=none-{rate}"]},
    }
    path = write_study(tmp_path, 2, arms=arms, seeds=1, metric="dev")
    printed = sett(str(path), "--jobs", "2", code=5)
    assert "FAILED   topic/both/seed-0, exit code 4; the end of" in printed
    assert "none-0.002" in printed.partition("FAILED")[2]
    assert "1 of 2 runs failed (topic/both/seed-0)" in printed
    assert "1 of 2 runs finished" in printed
    assert "1 of 2 runs finished" in sett(str(path), "--report")


def test_a_wrong_study_starts_nothing(tmp_path: Path) -> None:
    path = write_study(tmp_path, baseline="none")
    assert "baseline: there is no arm 'none'" in sett(str(path), code=2)
    path = write_study(tmp_path, overrides=["window.micro_batches=none"])
    assert "arm 'alone', task 'topic', seed 0: " in sett(str(path), code=2)
    assert not (tmp_path / "out").exists()
