"""The model under real ZeRO-3 on two gloo ranks whose batches hold different families."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zero3_worker
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tiny_models import TASKS, write_tokenizer

from trainer.export.huggingface import export_task
from trainer.model.backbone import LM_CLASSES, model_kind

NAMES = ["minilm", "t5", "bart", "llama"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sharded(tokenizer: Path) -> dict[str, dict[str, Any]]:
    """What two ranks found for each model, in one launch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tokenizer / "result.pt"
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--no_local_rank"]
    command += ["--master_port", str(port), zero3_worker.__file__, ",".join(NAMES), str(tokenizer), str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    result: dict[str, dict[str, Any]] = torch.load(out)
    return result


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_without_a_family_in_common_match_the_plain_model(
    name: str, sharded: dict[str, dict[str, Any]], tokenizer: Path
) -> None:
    recipe = zero3_worker.recipe_of(name, tokenizer)
    plain = zero3_worker.build(recipe, model_kind(recipe.model)).train()
    expected = [plain(batch)["loss"] for batch in zero3_worker.batches(plain)]
    (sum(expected) / 2).backward()
    result = sharded[name]

    assert result["sharded"] == len(list(plain.backbone.parameters()))
    first, second = (loss.item() for loss in expected)
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor([[first, second], [second, first]]))
    for turn, grads in enumerate(result["grads"]):
        wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
        assert grads.keys() == wanted.keys(), turn
        for parameter, grad in wanted.items():
            torch.testing.assert_close(grads[parameter], grad, atol=1e-6, rtol=1e-4)
    if result["generated"] is not None:
        plain.eval()
        batch = zero3_worker.batches(plain)[0]
        assert torch.equal(result["generated"], plain.generate(batch.input_ids, batch.attention_mask, 3))


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_checkpoint_exports_with_ties_and_buffers(
    name: str, sharded: dict[str, dict[str, Any]], tokenizer: Path, tmp_path: Path
) -> None:
    assert name in sharded
    recipe = zero3_worker.recipe_of(name, tokenizer)
    kind = model_kind(recipe.model)
    plain = zero3_worker.build(recipe, kind)
    state = get_fp32_state_dict_from_zero_checkpoint(str(tokenizer), tag=name)
    families = [family for side in zero3_worker.mixture(kind) for family in side]
    tasks = [TASKS[family] for family in families]
    export_task(state, recipe, tasks, TASKS[families[2]].name, tmp_path / "out")
    stock = LM_CLASSES[kind].from_pretrained(tmp_path / "out").state_dict()
    ours = plain.backbone.body.state_dict()
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[parameter], ours[parameter]) for parameter in ours)
