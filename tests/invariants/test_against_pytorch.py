"""DeepSpeed with fused losses against plain PyTorch: the same weights after every window, on 1, 2 and 4 ranks and
ZeRO 0 to 3.

This is the regression test of ZeRO-3's stale gradients: windows are so small that tasks, and with them heads, language
model heads and a decoder's vocabulary, are missing from some of them; a gradient left over from the window before would
move their weights and change the norm that clipping divides by.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.ranks import run_ranks

STEPS = 6


def written(folder: Path, name: str, kind: str, stage: int, **changes: Any) -> str:
    values = tiny.values(folder / kind, kind, **changes)
    values["deepspeed"] = {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "enable_sanity_checks": True,  # ranks that disagree about a collective fail instead of waiting
        },
        **({"zero_allow_untested_optimizer": True} if stage else {}),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return str(path)


def check(results: list[dict[str, Any]]) -> None:
    for result in results:
        for path, one in result.items():
            where = Path(path).stem
            assert max(one["differences"]) < 2e-5, (where, one)
            if "zero0" not in where:  # DeepSpeed does not keep the norm at stage 0
                assert max(one["norms"]) < 1e-5, (where, one)
            if "row" not in where:  # row windows hold every task
                assert one["absent"], f"{where}: every task was in every window, so nothing was tested"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder", "decoder"])
def test_two_ranks_every_stage(tmp_path: Path, kind: str) -> None:
    """LM heads and a decoder that a window did not touch, with dropout on: masks depend on the micro-batch alone."""
    recipes = [written(tmp_path, f"{kind}-zero{stage}", kind, stage) for stage in (0, 1, 2, 3)]
    recipes.append(written(tmp_path, f"{kind}-row", kind, 3, window={"heterogeneity": "row", "micro_batches": 2}))
    recipes.append(written(tmp_path, f"{kind}-step", kind, 3, window={"heterogeneity": "step"}))
    recipes.append(written(tmp_path, f"{kind}-plain-losses", kind, 3, kernels="reference"))
    check(run_ranks("against_pytorch.py", 2, tmp_path / "out", str(STEPS), *recipes))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder", "decoder"])
def test_r3f(tmp_path: Path, kind: str) -> None:
    """Two passes through sharded modules before one backward; in some windows only one."""
    noisy = {"size": 0.1, "weight": 2.0}
    ways = {
        "zero3": {"dropout": "shared"},
        "zero3-clean": {"gradient": "clean", "every": 2},
        "zero2-noisy": {"gradient": "noisy", "noise": "normal", "warmup": 0.5},
        "zero3-plain-losses": {"dropout": "independent"},
    }
    recipes = []
    for name, way in ways.items():
        changes = {"kernels": "reference"} if "plain" in name else {"heads": {"spectral": "clean" in name}}  # R4F
        loss = {"r3f": {**noisy, **way}}
        recipes.append(written(tmp_path, f"{kind}-{name}", kind, int(name[4]), loss=loss, **changes))
    recipes.append(
        written(
            tmp_path, f"{kind}-recompute-zero3", kind, 3, loss={"r3f": noisy}, model={"gradient_checkpointing": True}
        )
    )
    check(run_ranks("against_pytorch.py", 2, tmp_path / "out", str(STEPS), *recipes))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 4])
def test_other_world_sizes(tmp_path: Path, world_size: int) -> None:
    recipes = [written(tmp_path, f"{kind}-zero3", kind, 3) for kind in ("encoder", "encoder-decoder", "decoder")]
    check(run_ranks("against_pytorch.py", world_size, tmp_path / "out", str(STEPS), *recipes))


@pytest.mark.distributed
def test_gradient_checkpointing_and_weight_decay_on_heads(tmp_path: Path) -> None:
    """AdamW moves an absent task's head by momentum and by head_weight_decay, exactly as PyTorch's does."""
    changes = {"model": {"gradient_checkpointing": True}, "optimizer": {"head_weight_decay": 0.1, "clip": 0.05}}
    recipes = [written(tmp_path, "recompute", "encoder", 3, **changes)]
    check(run_ranks("against_pytorch.py", 2, tmp_path / "out", str(STEPS), *recipes))
