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
from tiny_models import write_tokenizer

from trainer.model.backbone import model_kind


def launch(name: str, tokenizer: Path, out: Path) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--no_local_rank",
        "--master_port",
        str(port),
    ]
    command += [zero3_worker.__file__, name, str(tokenizer), str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    result: dict[str, Any] = torch.load(out)
    return result


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["minilm", "t5", "bart", "llama"])
def test_two_ranks_without_a_family_in_common_match_the_plain_model(name: str, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    recipe = zero3_worker.recipe_of(name, tokenizer)
    plain = zero3_worker.build(recipe, model_kind(recipe.model)).train()
    expected = [plain(batch)["loss"] for batch in zero3_worker.batches(plain)]
    (sum(expected) / 2).backward()
    result = launch(name, tokenizer, tmp_path / "result.pt")

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
