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
    meta = {
        "end_task": END[kind],
        "signal": "cosine",
        "layers": None,
        "every": 2,
        "rate": 1.0,
        "floor": 0.05,
        "held_out": {"share": 0.3},
        **changes.pop("meta", {}),
    }
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
            # At the head's optimum this gradient is a difference of nearly equal parts.
            assert max(one["norms"]) < 5 * bound, (where, one["norms"])
            assert float(torch.cat(one["sizes"]).abs().max()) > 1e-3, f"{where}: all alignments are about 0"
            assert one["weights"][0] != one["weights"][-1], f"{where}: the weights did not move"
            assert one["weights"] == results[0][path]["weights"], f"{where}: ranks differ"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder", "decoder"])
def test_two_ranks_every_stage(tmp_path: Path, kind: str) -> None:
    """With dropout on: the dense model sees the same masks."""
    recipes = [written(tmp_path, f"{kind}-zero{stage}", kind, stage) for stage in (0, 1, 2, 3)]
    check(run_ranks("alignments.py", 2, tmp_path / "out", str(STEPS), *recipes))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 4])
def test_other_world_sizes(tmp_path: Path, world_size: int) -> None:
    recipes = [written(tmp_path, f"{kind}-zero3", kind, 3) for kind in ("encoder", "decoder")]
    recipes.append(written(tmp_path, "encoder-rank-zero1", "encoder", 1, heterogeneity="rank"))
    check(run_ranks("alignments.py", world_size, tmp_path / "out", str(STEPS), *recipes))


@pytest.mark.distributed
def test_end_tasks_of_every_family(tmp_path: Path) -> None:
    recipes = [
        written(tmp_path, f"encoder-{end}", "encoder", 3, meta={"end_task": end, "head": {"l2": 0.3}})
        for end in tiny.FAMILIES["encoder"]
    ]
    recipes.append(written(tmp_path, "decoder-rewrite", "decoder", 3, meta={"end_task": "rewrite"}))
    check(run_ranks("alignments.py", 2, tmp_path / "out", str(STEPS), *recipes))


@pytest.mark.distributed
def test_signals_and_levers(tmp_path: Path) -> None:
    """The Adam-scaled gradient, offload, recomputed activations, the last layer only, plain losses, no dropout."""
    recipes = [
        *(written(tmp_path, f"adam-zero{stage}", "encoder", stage, meta={"signal": "adam"}) for stage in (0, 2, 3)),
        written(tmp_path, "dot", "encoder", 3, meta={"signal": "dot"}),
        written(tmp_path, "offload-zero3", "encoder", 3, meta={"signal": "adam"}),
        written(tmp_path, "offload-zero2", "encoder", 2),
        written(tmp_path, "recompute", "encoder", 3, model={"gradient_checkpointing": True, "dropout": 0.0}),
        written(tmp_path, "last-layer", "encoder", 3, meta={"layers": 1, "read": "refresh"}),
        written(tmp_path, "plain-losses", "encoder", 3, kernels="reference"),
    ]
    check(run_ranks("alignments.py", 2, tmp_path / "out", str(STEPS), *recipes))


@pytest.mark.distributed
def test_bf16(tmp_path: Path) -> None:
    """Both sides round to bf16, whose half unit is 0.4 %; what differs is the order in which ranks add."""
    recipes = [
        written(tmp_path, f"bf16-zero{stage}", "encoder", stage, training={"precision": "bf16"}) for stage in (2, 3)
    ]
    check(run_ranks("alignments.py", 2, tmp_path / "out", str(STEPS), *recipes), bound=0.01)
