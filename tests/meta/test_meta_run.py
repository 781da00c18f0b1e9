"""Whole runs with learned weights: what they log, and that going on from a checkpoint changes nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import tiny

from trainer.engine.checkpoint import Checkpoints, load_weights
from trainer.metrics.log import read_metrics

NAMES = tiny.FAMILIES["encoder"]
COSINE = {"signal": "cosine", "layers": None}  # bounded: a rate of 100 makes one task the first, whatever the model


def train(folder: Path, name: str, **changes: Any) -> Path:
    meta = {"end_task": "topic", "every": 4, "held_out": {"share": 0.25}, **changes.pop("meta", {})}
    values = tiny.values(
        folder,
        name=name,
        meta=meta,
        window={"heterogeneity": "step", "micro_batches": 8},
        sampling={"rule": "equal"},
        training={"steps": 12},
        checkpoint={"every": 3, "keep_last": 10, "keep_best": False},
        **changes,
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return again(folder, name)


def again(folder: Path, name: str) -> Path:
    command = [sys.executable, "-m", "trainer.cli", "train", str(folder / f"{name}.yaml"), "--num-gpus", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "meta"),
    [
        ("loss", {"head": {"fit": "steps", "rows": "train"}, "held_out": {"share": 0.25, "batch": 8}, "rate": 0.5}),
        ("sampling", {"action": "sampling", "importance": True, "rate": 2.0}),
        ("famo", {"weights": "famo"}),
    ],
)
def test_going_on_in_the_middle_of_an_interval_changes_nothing(tmp_path: Path, name: str, meta: dict[str, Any]) -> None:
    run = train(tmp_path, name, meta=meta)
    whole = load_weights(Checkpoints(run, 1, False).path(12))
    log = [r for r in read_metrics(run / "metrics.jsonl") if "weight/topic" in r]
    assert [r["step"] for r in log] == list(range(1, 13))
    assert sum(log[-1][f"weight/{n}"] for n in NAMES) == pytest.approx(1.0)
    assert log[0]["weight/topic"] == pytest.approx(1 / len(NAMES))
    assert log[-1]["weight/topic"] != log[0]["weight/topic"]
    if name != "famo":
        assert {f"alignment/{n}" for n in NAMES} <= set(log[-1])
        assert log[-1]["meta/held_out_loss"] > 0
        assert 0 <= log[-1]["meta/dev_head_accuracy"] <= 1
    for step in (9, 12):  # six windows in: half of the second interval is done
        shutil.rmtree(Checkpoints(run, 1, False).path(step))
    for name_of in ("results.json", "export"):
        shutil.rmtree(run / name_of, ignore_errors=True)
    again(tmp_path, name)
    other = load_weights(Checkpoints(run, 1, False).path(12))
    assert all(torch.equal(other[key], whole[key]) for key in whole)
    same = [r for r in read_metrics(run / "metrics.jsonl") if "weight/topic" in r]
    for key in ("weight/topic", "weight/fill", "alignment/same", "train/loss"):
        assert [r.get(key) for r in same] == [r.get(key) for r in log], key


@pytest.mark.distributed
def test_sampling_draws_what_it_has_learned(tmp_path: Path) -> None:
    run = train(tmp_path, "drawn", meta={"action": "sampling", "rate": 100.0, "every": 2, "floor": 0.3, **COSINE})
    last = [r for r in read_metrics(run / "metrics.jsonl") if "weight/topic" in r][-1]
    drawn = {n: last[f"share/{n}"] for n in NAMES}
    best = max(NAMES, key=lambda n: last[f"weight/{n}"])
    assert last[f"weight/{best}"] > 0.4
    assert drawn[best] > 0.25
