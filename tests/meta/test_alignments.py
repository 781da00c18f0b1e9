"""Alignments under DeepSpeed equal those of dense gradients in plain PyTorch, on 1, 2 and 4 ranks and ZeRO 0 to 3."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.ranks import run_ranks

STEPS = 4
END = {"encoder": "topic", "encoder-decoder": "choose", "decoder": "find"}


def written(folder: Path, name: str, kind: str, stage: int, **changes: Any) -> str:
    meta = {"end_task": END[kind], "every": 2, "floor": 0.05, "held_out": {"share": 0.3}, **changes.pop("meta", {})}
    heterogeneity = changes.pop("heterogeneity", "step")
    values = tiny.values(
        folder / kind, kind, meta=meta, window={"heterogeneity": heterogeneity, "micro_batches": 8}, **changes
    )
    values["deepspeed"] = {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "enable_sanity_checks": True,
            **({"offload_optimizer": {"device": "cpu"}} if "offload" in name else {}),
        },
        **({"zero_allow_untested_optimizer": True} if stage else {}),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return str(path)


def check(results: list[dict[str, Any]], bound: float = 1e-5) -> None:
    """`bound` is relative to the product of the lengths of both gradients."""
    for result in results:
        for path, one in result.items():
            where = Path(path).stem
            assert one["gaps"], f"{where}: nothing was read"
            assert max(float(gap.max()) for gap in one["gaps"]) < bound, (where, one["gaps"])
            assert max(one["norms"]) < bound, (where, one["norms"])
            assert float(torch.cat(one["sizes"]).abs().max()) > 0.01, f"{where}: all alignments are about 0"
            assert one["weights"][0] != one["weights"][-1], f"{where}: the weights did not move"
            assert one["weights"] == results[0][path]["weights"], f"{where}: ranks differ"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder", "decoder"])
def test_two_ranks_every_stage(tmp_path: Path, kind: str) -> None:
    """With dropout on: the dense model sees the same masks."""
    recipes = [written(tmp_path, f"{kind}-zero{stage}", kind, stage) for stage in (0, 1, 2, 3)]
    check(run_ranks("alignments.py", 2, tmp_path / "out", str(STEPS), *recipes))
