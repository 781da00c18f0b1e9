"""The main job through the command line: train, look at what it leaves, stop, resume, evaluate, export."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoModelForSequenceClassification

from trainer.engine.checkpoint import Checkpoints, load_weights
from trainer.metrics.log import read_metrics

SETT = [sys.executable, "-m", "trainer.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def sett(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [*SETT, *arguments], capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def recipe_file(folder: Path, **changes: Any) -> Path:
    path = folder / f"{changes.get('name', 'tiny')}.yaml"
    path.write_text(yaml.safe_dump(tiny.values(folder, **changes)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A finished run of all encoder families on two ranks, its recipe, and what it printed."""
    folder = tmp_path_factory.mktemp("job")
    path = recipe_file(
        folder,
        training={"steps": 40},
        evaluation={"every": 20},
        checkpoint={"export": ["backbone", "topic"], "keep_last": 1},
    )
    return folder / "runs" / "tiny", path, sett("train", str(path), "--num-gpus", "2")


@pytest.mark.distributed
def test_a_run_leaves_everything_it_promises(finished: tuple[Path, Path, str]) -> None:
    run, _, printed = finished
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["hosts"] == 1
    assert environment["packages"]["torch"] == metadata.version("torch")
    assert environment["device"]
    for name in ("recipe.yaml", "metrics.jsonl", "results.json", "results.md", "curves.png", "tensorboard"):
        assert (run / name).exists(), name
        assert name in ("recipe.yaml", "results.json") or name in printed
    results = json.loads((run / "results.json").read_text())
    assert {row["task"] for row in results["tasks"]} == set(tiny.FAMILIES["encoder"])
    assert all(row["before"] is not None and row["after"] is not None for row in results["tasks"])
    assert "Next:" in printed
    assert AutoModel.from_pretrained(run / "export" / "backbone") is not None
    model = AutoModelForSequenceClassification.from_pretrained(run / "export" / "topic")
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}


@pytest.mark.distributed
def test_metrics_are_the_same_in_both_logs(finished: tuple[Path, Path, str]) -> None:
    run, _, _ = finished
    records = [r for r in read_metrics(run / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in records] == list(range(1, 41))
    names = {key for record in records for key in record}
    expected = {"train/lr", "train/lr_heads", "train/grad_norm", "train/tokens_per_second", "train/padding"}
    expected |= {f"train/loss/{task}" for task in tiny.FAMILIES["encoder"]}
    expected |= {f"share/{task}" for task in tiny.FAMILIES["encoder"]}
    assert expected <= names
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    board = {e.step: e.value for e in events.Scalars("train/loss")}
    assert board == pytest.approx({r["step"]: r["train/loss"] for r in records}, rel=1e-6)
    assert "eval/topic/accuracy" in events.Tags()["scalars"]
    for record in records:  # the loss is the sum of the tasks' losses by their shares
        parts = [
            record[f"share/{t}"] * record[f"train/loss/{t}"]
            for t in tiny.FAMILIES["encoder"]
            if f"train/loss/{t}" in record
        ]
        assert sum(parts) == pytest.approx(record["train/loss"], rel=1e-5)


@pytest.mark.distributed
def test_it_learns(finished: tuple[Path, Path, str]) -> None:
    """Dev losses of tasks that a model of two layers learns in forty windows; the others stay at chance."""
    run, _, _ = finished
    before, *_, after = (r for r in read_metrics(run / "metrics.jsonl") if "eval/mean" in r)
    for task in ("topic", "score", "find", "fill"):
        assert after[f"eval/{task}/loss"] < before[f"eval/{task}/loss"], task


@pytest.mark.distributed
def test_a_finished_run_is_not_trained_again(finished: tuple[Path, Path, str]) -> None:
    run, path, _ = finished
    before = (run / "metrics.jsonl").read_bytes()
    began = time.monotonic()
    assert "Dev metrics" in sett("train", str(path), "--num-gpus", "2")
    assert time.monotonic() - began < 60
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.distributed
def test_a_run_killed_before_its_outcome_was_written_writes_it(finished: tuple[Path, Path, str]) -> None:
    run, path, _ = finished
    log, results = (run / "metrics.jsonl").read_bytes(), (run / "results.json").read_bytes()
    (run / "results.json").unlink()
    sett("train", str(path), "--num-gpus", "2")
    assert (run / "results.json").read_bytes() == results
    assert (run / "metrics.jsonl").read_bytes() == log


@pytest.mark.distributed
def test_a_started_run_refuses_another_recipe(finished: tuple[Path, Path, str]) -> None:
    _, path, _ = finished
    message = sett("train", str(path), "--num-gpus", "2", "optimizer.lr=0.5", code=2)
    assert "optimizer.lr: 0.002 -> 0.5" in message
    assert "name=" in message


@pytest.mark.distributed
def test_evaluating_on_another_number_of_ranks_gives_the_logged_metrics(finished: tuple[Path, Path, str]) -> None:
    run, _, _ = finished
    sett("eval", str(run), "--step", "last", "--num-gpus", "1")
    evaluated = json.loads((run / "eval-dev-40.json").read_text())
    logged = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] == 40 and "eval/mean" in r][-1]
    assert evaluated["mean"]["after"] == pytest.approx(logged["eval/mean"], abs=1e-6)
    sett("eval", str(run), "--step", "last", "--num-gpus", "1", "--task", "score", "--task", "fill")
    some = json.loads((run / "eval-dev-40-score-fill.json").read_text())["tasks"]
    expected = {row["task"]: row for row in evaluated["tasks"]}
    assert {row["task"] for row in some} == {"score", "fill"}
    for row in some:  # batches are the same, for each is of one task
        assert row["after"] == pytest.approx(expected[row["task"]]["after"], rel=1e-6)
        assert row["rows"] == expected[row["task"]]["rows"]


@pytest.mark.distributed
def test_stop_and_resume_is_bit_exact(finished: tuple[Path, Path, str]) -> None:
    """SIGTERM after a few windows, the same command again: the weights of the run that was never stopped."""
    run, path, _ = finished
    name = "stopped"
    values = {**yaml.safe_load(path.read_text()), "name": name}
    stopped_recipe = path.with_name("stopped.yaml")
    stopped_recipe.write_text(yaml.safe_dump(values))
    stopped = run.with_name(name)
    command = [*SETT, "train", str(stopped_recipe), "--num-gpus", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    log = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and any(r["step"] >= 3 for r in read_metrics(log))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "run the same command to go on" in printed
    steps = Checkpoints(stopped, 1, False).steps()
    assert steps, printed
    assert 3 <= steps[-1] < 40, printed
    sett("train", str(stopped_recipe), "--num-gpus", "2")
    ours, theirs = (load_weights(Checkpoints(r, 1, False).path(40)) for r in (stopped, run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    losses = [
        [(r["step"], r["train/loss"]) for r in read_metrics(r / "metrics.jsonl") if "train/loss" in r]
        for r in (stopped, run)
    ]
    assert losses[0] == losses[1]


@pytest.mark.distributed
def test_data_errors_end_before_any_process_starts(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    rows = tmp_path / "tasks" / "topic" / "train.jsonl"
    rows.write_text(rows.read_text() + '{"text": "fine", "label": 9}\n{broken\n')
    message = sett("train", str(path), code=3)
    assert "train.jsonl:61" in message
    assert "train.jsonl:62" in message
    assert not list((tmp_path / "cache").rglob("topic/train-*"))


def test_usage_errors_have_exit_code_2(tmp_path: Path) -> None:
    assert "No such file" in sett("train", str(tmp_path / "none.yaml"), code=2)
    path = recipe_file(tmp_path)
    assert "did you mean 'tokens'" in sett("train", str(path), "window.tokenz=3", code=2)
