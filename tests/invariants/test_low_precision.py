"""bf16 under ZeRO trains as fp32 does, to bf16's precision, and updates fp32 weights.

fp16 is refused on a CPU (`tests/engine/test_deepspeed_json.py::test_fp16_on_a_cpu`), so it is not run here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.ranks import run_ranks
from torch import Tensor

STEPS = 12
STAGES = (1, 3)
KINDS = ("encoder", "encoder-decoder", "decoder")


def written(folder: Path, kind: str, precision: str, stage: int) -> str:
    # Without dropout, whose masks need not be the same in two types.
    values = tiny.values(folder / kind, kind, model={"dropout": 0.0}, heads={"dropout": 0.0})
    values["training"] |= {"precision": precision}
    values["deepspeed"] = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    path = folder / f"{kind}-{precision}-zero{stage}.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the first of two ranks found in each run, in one launch."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = [written(folder, kind, "fp32", 3) for kind in KINDS]
    recipes += [written(folder, kind, "bf16", stage) for kind in KINDS for stage in STAGES]
    found: dict[str, dict[str, Any]] = run_ranks("low_precision.py", 2, folder / "out", str(STEPS), *recipes)[0]
    return found


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights.values()])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_follows_fp32(kind: str, stage: int, runs: dict[str, dict[str, Any]]) -> None:
    low, full = runs[f"{kind}-bf16-zero{stage}"], runs[f"{kind}-fp32-zero3"]
    assert full["types"] == {"weights": ["torch.float32"], "master": ["torch.float32"], "moments": ["torch.float32"]}
    assert low["types"] == {**full["types"], "weights": ["torch.bfloat16"]}
    assert len(low["losses"]) == STEPS
    assert all(math.isfinite(loss) for loss in low["losses"])
    # bf16 keeps 8 bits: rounding once is off by 2e-3 at most, and the errors of a window's tokens cancel.
    assert low["losses"] == pytest.approx(full["losses"], rel=2e-3)
    assert low["losses"] != full["losses"]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_updates_fp32_weights(kind: str, stage: int, runs: dict[str, dict[str, Any]]) -> None:
    low, full = runs[f"{kind}-bf16-zero{stage}"], runs[f"{kind}-fp32-zero3"]
    assert low["after"].keys() == full["after"].keys()
    for name, start in low["before"].items():
        assert not torch.equal(low["after"][name], start), f"{name} did not move"
    ours = flat(low["after"]) - flat(low["before"])
    theirs = flat(full["after"]) - flat(full["before"])
    assert float((ours - theirs).norm() / theirs.norm()) < 0.06
    after = flat(low["after"])
    kept = after != after.bfloat16().float()
    assert float(kept.float().mean()) > 0.99, "weights that are updated have no more digits than bf16"
