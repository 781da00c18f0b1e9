"""What cases are made from: the device, who computes our losses, and the two ceilings.

Owns: `Setting`, and the facts of the machine that a result is worthless without.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_bench.measure import Contender
from trainer.losses import ReferenceLosses, fused
from trainer.losses.build import Toolchain
from trainer.losses.interface import Losses

ROOT = Path(__file__).resolve().parents[2]
_COPIED_BYTES = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}
_PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")


@dataclass(frozen=True)
class Setting:
    """Where a case runs, and whose kernels are ours."""

    device: torch.device
    losses: Losses
    fused: bool
    """False: the reference stands in for the kernels."""

    @classmethod
    def here(cls, kernels: str, say: Callable[[str], None]) -> Setting:
        """The GPU if there is one. Compiles the kernels if need be."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if kernels == "reference":
            return cls(device, ReferenceLosses(), False)
        fused.load(say)
        return cls(device, fused.FusedLosses(), True)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
        """Normal numbers; drawn in their own type, because a large buffer has no room for another."""
        drawn = torch.randn(*shape, dtype=dtype, device=self.device, generator=self.generator(seed))
        return drawn.mul_(scale)

    def randint(self, high: int, count: int, seed: int = 1) -> Tensor:
        return torch.randint(high, (count,), device=self.device, generator=self.generator(seed))


def copy_ceiling(setting: Setting) -> Contender:
    """A copy of a buffer that no cache holds, counted as one read and one write."""
    size = _COPIED_BYTES[setting.device.type]
    source = torch.ones(size // 4, device=setting.device)
    target = torch.empty_like(source)
    return Contender(f"copy of {size >> 20} MB", lambda: target.copy_(source), work=2 * size)


def product_ceiling(x: Tensor, weight: Tensor) -> Contender:
    """`x @ weight.T` by itself, as the case's own product."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    work = 2 * x.shape[0] * x.shape[1] * weight.shape[0]

    def product() -> Tensor:
        with torch.no_grad():
            return torch.mm(x, weight.t(), out=out)

    return Contender("torch.mm of the same shape", product, work=work)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` for one shape."""
    made: Callable[..., Any] = torch.compile(function, dynamic=False, options=options or None)
    return made


def machine(setting: Setting) -> dict[str, Any]:
    """What the numbers were taken on."""
    tools = Toolchain.find() if setting.fused else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if setting.cuda else cpu(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "kernels": "fused" if setting.fused else "reference",
        "isa": fused.isa() if setting.fused else None,
        "commit": _said(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]),
        "changed": bool(_said(["git", "-C", str(ROOT), "status", "--porcelain", "trainer/losses", "kernels"])),
        "compiler": _said([tools.cxx, "--version"]) if tools else None,
        "nvcc": _said([tools.nvcc, "--version"], line=-1) if tools and tools.nvcc else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": _said(["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"])
        if setting.cuda
        else None,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(command: list[str], line: int = 0) -> str | None:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[line] if lines else ""
