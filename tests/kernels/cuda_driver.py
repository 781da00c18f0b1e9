"""The driver of the CUDA kernels on a CPU: how it is built, and how calls go to it and come back.

The .cu files are compiled by g++ against cuda_shim, where every CUDA thread is a real thread. Blocks of segment_losses
have 64 threads here instead of 256: 2048 bf16 scores are as many as a warp holds, 4096 a block, 32768 a cluster of 8.
"""

from __future__ import annotations

import os
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

SHIM = Path(__file__).parent / "cuda_shim"
CUDA = Path(__file__).parents[2] / "kernels" / "csrc" / "cuda"
STORAGES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FAULTS = ["none", "offsets", "target", "empty", "feature", "row", "shape", "task"]
IGNORE = -100


def real(storage: torch.dtype) -> torch.dtype:
    return torch.float64 if storage == torch.float64 else torch.float32


def build(folder: Path, *flags: str) -> Path:
    sources = [*sorted(CUDA.glob("*.cu")), SHIM / "driver.cpp"]

    def compile_one(source: Path) -> str:
        to = folder / f"{source.stem}.o"
        small = ["-DSETT_SEGMENT_THREADS=64", "-DSETT_SUM_THREADS=64"]
        strict = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        command = ["g++", "-std=c++17", "-pthread", *small, *strict, *flags, f"-I{SHIM}"]
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(to)], check=True)
        return str(to)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources))
    driver = folder / "driver"
    subprocess.run(["g++", "-pthread", *flags, *objects, "-o", str(driver)], check=True)
    return driver


@dataclass
class Call:
    """One call of a kernel: `arrays` come back as the kernel left them, those that share memory with the first one."""

    operation: int
    integers: list[int]
    reals: list[float] = field(default_factory=list)
    arrays: dict[str, Tensor | None] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    past: dict[str, int] = field(default_factory=dict)  # bytes past a 16-byte boundary
    capability: int = 9
    launches: list[tuple[int, int, int]] = field(default_factory=list)  # blocks, threads, blocks of a cluster

    def encode(self) -> bytes:
        names = list(self.arrays)
        head = [self.operation, self.capability, len(self.integers), *self.integers, len(self.reals)]
        parts = [struct.pack(f"{len(head)}q", *head), struct.pack(f"{len(self.reals)}d", *self.reals)]
        parts.append(struct.pack("q", len(names)))
        for name, array in self.arrays.items():
            size = -1 if array is None else array.numel() * array.element_size()
            shared = names.index(self.shares[name]) if name in self.shares else -1
            parts.append(struct.pack("3q", size, shared, self.past.get(name, 0)))
            if array is not None and shared < 0:
                parts.append(array.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return b"".join(parts)

    def decode(self, data: memoryview) -> memoryview:
        error, count = struct.unpack_from("2q", data)
        assert error == 0
        data = data[16:]
        self.launches = [struct.unpack_from("3q", data, 24 * i) for i in range(count)]
        data = data[24 * count :]
        for name, array in self.arrays.items():
            if array is not None and array.numel():
                size = array.numel() * array.element_size()
                back = torch.frombuffer(bytearray(data[:size]), dtype=array.dtype)
                self.arrays[name] = back.view(array.shape)
                data = data[size:]
        return data

    def __getitem__(self, name: str) -> Tensor:
        array = self.arrays[name]
        assert array is not None
        return array

    @property
    def fault(self) -> tuple[str, int, int]:
        kind, _ = self["fault"].view(torch.int32)[:2].tolist()
        return FAULTS[kind], int(self["fault"][1]), int(self["fault"][2])


def run(driver: Path, calls: list[Call], folder: Path) -> None:
    (folder / "calls").write_bytes(b"".join(call.encode() for call in calls))
    # Hundreds of threads that wait for each other: tests that run beside this one would hardly get a turn.
    command = ["nice", "-n", "19", str(driver), str(folder / "calls"), str(folder / "results")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr == ""
    data = memoryview((folder / "results").read_bytes())
    for call in calls:
        data = call.decode(data)
    assert len(data) == 0
