"""Who computes the losses under test: plain PyTorch, and the kernels compiled from this checkout."""

import os
import shutil

import pytest
import torch

from trainer.losses import choose
from trainer.losses.interface import Losses


@pytest.fixture(scope="session")
def fused() -> Losses:
    if shutil.which(os.environ.get("CXX") or "c++") is None:
        pytest.skip("NO C++ COMPILER: the loss kernels are not tested at all")
    return choose("fused")


@pytest.fixture(params=["reference", "fused"])
def losses(request: pytest.FixtureRequest) -> Losses:
    """Each implementation in turn."""
    return request.getfixturevalue("fused") if request.param == "fused" else choose("reference")


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """More than one, to split work; few, because test processes share the machine."""
    torch.set_num_threads(2)
