"""The CUDA kernels compile for every architecture we ship, without warnings and without losing registers to memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from trainer.losses.build import STABLE_ABI

CUDA = Path(__file__).parents[2] / "kernels" / "csrc" / "cuda"
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100"]


def find_nvcc() -> Path | None:
    in_packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    candidates = [*sorted(in_packages.glob("cu*/bin/nvcc")), *sorted(in_packages.glob("cuda_nvcc/bin/nvcc"))]
    if home := os.environ.get("CUDA_HOME"):
        candidates.insert(0, Path(home) / "bin" / "nvcc")
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    return next((nvcc for nvcc in candidates if nvcc.exists()), None)


def compile_one(nvcc: Path, source: Path, architecture: str, folder: Path) -> list[str]:
    """What is wrong with the source on the architecture."""
    flags = ["-std=c++17", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    to = folder / f"{source.stem}.{architecture}.cubin"
    command = [str(nvcc), f"-arch={architecture}", *flags, str(source), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    where = f"{source.name} on {architecture}"
    if done.returncode != 0:
        return [f"{where}:\n{done.stderr[-3000:]}"]
    kernel, problems, count = "", [], 0
    for line in done.stderr.splitlines():
        if found := re.search(r"Function properties for (\S+)", line):
            kernel = found[1]
        if found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            count += 1
            stack, stores, loads = map(int, found.groups())
            if stores or loads or stack:  # a stack without spills is an array that has left the registers
                problems.append(f"{where}: {kernel}: {line.strip()}")
    return problems if count else [f"{where}: ptxas reported no kernel"]


def test_every_kernel_on_every_architecture(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("NO CUDA COMPILER: the kernels are NOT compiled here; pip install -e '.[nvcc]', or set CUDA_HOME")
    sources = sorted(CUDA.glob("*.cu"))
    longest_first = ["segments", "heads", "sums"]
    jobs = sorted(product(sources, ARCHITECTURES), key=lambda job: longest_first.index(job[0].stem))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(lambda job: compile_one(nvcc, *job, tmp_path), jobs))
    assert not (found := [problem for some in problems for problem in some]), "\n".join(found)


@pytest.mark.parametrize("cuda", [[], ["-DSETT_WITH_CUDA"]], ids=["cpu", "cuda"])
def test_the_binding_compiles_without_a_toolkit(cuda: list[str]) -> None:
    """With and without CUDA, against the headers of any torch: it must not depend on how that torch was built."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("NO C++ COMPILER: the binding of the loss kernels is not compiled")
    headers = [flag for folder in include_paths() for flag in ("-isystem", folder)]
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", STABLE_ABI]
    command = [compiler, *flags, *cuda, *headers, str(CUDA.parent / "binding.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
