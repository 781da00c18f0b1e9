"""DeepSpeed: sharding, precision, checkpoints and launch. We call it, we do not rebuild it."""

import os

import torch

if not torch.accelerator.is_available():
    # DeepSpeed would find out by itself, with a warning that reads like a problem.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
