"""What this machine has and lacks for training with Sett, each with the remedy.

Owns: `sett doctor`. It looks and never changes anything; a probe that fails is a finding, not a crash.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.losses import build
from trainer.run.memory import readable

_LEAST_DISK = 10 * 2**30
_TOOLS = {
    "ssh": "runs over several hosts (Debian: apt install openssh-client)",
    "pdsh": "runs over several hosts with --hostfile (Debian: apt install pdsh)",
    "numactl": "deepspeed --bind_cores_to_rank (Debian: apt install numactl)",
    "srun": "runs under Slurm; comes with the cluster",
}


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """One thing looked at. A problem stops training; a warning costs something or matters only to some runs."""

    topic: str
    level: Level
    found: str
    remedy: str = ""


def examine(cache: Path | None = None) -> list[Finding]:
    """Look at everything. `cache` is the token cache's folder; None is $SETT_CACHE, else ~/.cache/sett."""
    folder = cache or Path(os.environ.get("SETT_CACHE") or Path.home() / ".cache" / "sett")
    return [
        *_versions(),
        *_accelerators(),
        *_compilers(),
        _kernels(),
        *_ops(),
        *_tools(),
        *_disk({"disk, token cache": folder, "disk, current folder": Path.cwd()}),
        *_packages(),
    ]


def render(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table, and how many need attention."""
    styles = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
    table = Table(show_lines=False)
    for name in ("", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        topic = Text(finding.topic, style=styles[finding.level])
        table.add_row(topic, Text(finding.found), Text(finding.remedy))
    console.print(table)
    counts = {level: sum(f.level is level for f in findings) for level in Level}
    console.print(f"{counts[Level.OK]} ok, {counts[Level.WARNING]} warnings, {counts[Level.PROBLEM]} problems")


def _versions() -> Iterator[Finding]:
    python = f"{platform.python_version()} ({sys.executable})"
    old = sys.version_info < (3, 11)
    yield Finding("Python", Level.PROBLEM if old else Level.OK, python, "install Python 3.11 or newer" if old else "")
    for name in ("sett", "torch", "deepspeed", "transformers"):
        try:
            yield Finding(name, Level.OK, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            in_checkout = name == "sett"
            remedy = "pip install -e . (or `make quickstart`)" if in_checkout else f"pip install {name}"
            yield Finding(name, Level.WARNING if in_checkout else Level.PROBLEM, "not installed", remedy)


def _accelerators() -> Iterator[Finding]:
    """The GPUs, or what makes the CPU fast; DeepSpeed and PyTorch must see the same."""
    from deepspeed.accelerator import get_accelerator

    chosen = str(get_accelerator().device_name())
    forced = os.environ.get("DS_ACCELERATOR")
    gpus = torch.cuda.device_count()
    for index in range(gpus):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if card.major >= 8 else "no bf16: training.precision fp16 or fp32"
        found = f"{card.name}, {readable(card.total_memory)}, compute {card.major}.{card.minor}, {bf16}"
        yield Finding(f"GPU {index}", Level.OK, found)
    if (chosen == "cuda") == (gpus > 0):
        yield Finding("DeepSpeed accelerator", Level.OK, chosen)
    else:
        remedy = (
            f"unset DS_ACCELERATOR (it is '{forced}')" if forced else "compare `nvidia-smi` with the installed torch"
        )
        found = f"'{chosen}', but PyTorch sees {gpus} GPUs"
        yield Finding("DeepSpeed accelerator", Level.PROBLEM, found, remedy)
    if not gpus and shutil.which("nvidia-smi"):
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        remedy = "install a torch for this driver (pytorch.org), unless the GPUs are hidden on purpose"
        yield Finding("GPU", Level.WARNING, f"nvidia-smi is here, but torch ({build}) sees no GPU", remedy)
    yield _processor()


def _processor() -> Finding:
    supported = {
        "AMX bf16": torch.cpu._is_amx_tile_supported(),
        "AVX-512 bf16": torch.cpu._is_avx512_bf16_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX2": torch.cpu._is_avx2_supported(),
    }
    names = ", ".join(name for name, has in supported.items() if has) or "no vector extensions known to torch"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    found = f"{usable} cores, {readable(memory.total)} RAM ({readable(memory.available)} free), {names}"
    fast = supported["AMX bf16"] or supported["AVX-512 bf16"]
    return Finding("CPU", Level.OK, found, "training.precision=bf16 is fast on this CPU" if fast else "")


def _compilers() -> Iterator[Finding]:
    """DeepSpeed compiles its ops at the first start that needs them, with g++ and ninja, CUDA ones with nvcc."""
    compiler = os.environ.get("CXX") or "c++"  # as PyTorch chooses it
    version = _output(compiler, "-dumpfullversion") or _output(compiler, "-dumpversion")
    if version:
        yield Finding("C++ compiler", Level.OK, f"{compiler} {version}")
    else:
        remedy = "Debian: apt install g++; without it no offloaded optimizer"
        yield Finding("C++ compiler", Level.WARNING, f"no {compiler}", remedy)
    if ninja := _output("ninja", "--version"):
        yield Finding("ninja", Level.OK, ninja)
    elif importlib.util.find_spec("ninja"):
        remedy = "activate the virtual environment, so that its bin folder is on PATH"
        yield Finding("ninja", Level.WARNING, "installed, but not on PATH", remedy)
    else:
        yield Finding("ninja", Level.WARNING, "missing", "pip install ninja")
    release = re.search(r"release (\d+\.\d+)", _output("nvcc", "--version"))
    yield cuda_toolkit(torch.version.cuda, release[1] if release else "", version)


def cuda_toolkit(built: str | None, nvcc: str, gcc: str) -> Finding:
    """Whether `nvcc` can compile for a torch built with CUDA `built`, and whether it takes this host compiler."""
    from torch.utils.cpp_extension import CUDA_GCC_VERSIONS

    topic, found = "CUDA toolkit", f"nvcc {nvcc}, torch is built for CUDA {built}"
    if built is None:
        here = f" (nvcc {nvcc} is here)" if nvcc else ""
        return Finding(topic, Level.OK, f"not needed: this torch is a CPU build{here}")
    if not nvcc:
        remedy = f"install the CUDA {built} toolkit; without it DeepSpeed compiles no op for the GPU"
        return Finding(topic, Level.WARNING, f"no nvcc; torch is built for CUDA {built}", remedy)
    if nvcc.split(".")[0] != built.split(".")[0]:
        remedy = f"install the CUDA {built} toolkit; DeepSpeed does not compile with another major version"
        return Finding(topic, Level.WARNING, found, remedy)
    _, too_new = CUDA_GCC_VERSIONS.get(nvcc, ((), (10**6,)))
    if gcc and gcc[0].isdigit() and int(gcc.split(".")[0]) >= too_new[0]:
        remedy = f"set CXX to a g++ older than {too_new[0]}, or install a newer CUDA toolkit"
        return Finding(topic, Level.WARNING, f"{found}; it does not take g++ {gcc}", remedy)
    return Finding(topic, Level.OK, found)


def _kernels() -> Finding:
    """The loss kernels: compiled, to be compiled by the first run, or not possible."""
    topic = "loss kernels"
    try:
        tools = build.Toolchain.find()
    except build.KernelBuildError as error:
        return Finding(topic, Level.WARNING, "cannot be compiled; losses run in plain PyTorch", str(error))
    if build.library_path(tools).exists():
        return Finding(topic, Level.OK, f"compiled for {tools.target}")
    return Finding(topic, Level.OK, f"the first run compiles them for {tools.target} (`sett kernels`)")


def _ops() -> Iterator[Finding]:
    """DeepSpeed's compiled ops: built in, to be built when needed, or not possible here."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    groups: dict[str, list[str]] = {"built in": [], "can be built": [], "not possible": []}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # the probes chat
        for name, builder in ALL_OPS.items():
            if name == "deepspeed_not_implemented":
                continue  # a placeholder that every missing op shares
            possible = "can be built" if probe_is_compatible(builder, False) else "not possible"
            groups["built in" if installed_ops.get(name) else possible].append(name)
    found = "; ".join(f"{group}: {', '.join(sorted(names))}" for group, names in groups.items() if names)
    yield Finding("DeepSpeed ops", Level.OK, found)
    if "async_io" in groups["not possible"]:
        remedy = "only for zero3-offload-nvme (Debian: apt install libaio-dev)"
        yield Finding("DeepSpeed async_io", Level.WARNING, "cannot be built", remedy)
    if "cpu_adam" in groups["not possible"]:
        remedy = "only for offloaded optimizers; see the compiler above"
        yield Finding("DeepSpeed cpu_adam", Level.WARNING, "cannot be built", remedy)


def _tools() -> Iterator[Finding]:
    for name, use in _TOOLS.items():
        path = shutil.which(name)
        yield Finding(name, Level.OK, path or "missing", "" if path else f"only for {use}")


def _disk(folders: dict[str, Path]) -> Iterator[Finding]:
    for topic, folder in folders.items():
        # The cache's folder may not be there yet: what counts is the disk it will be on.
        there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
        free = shutil.disk_usage(there).free
        found = f"{readable(free)} free at {folder}"
        if not os.access(there, os.W_OK):
            yield Finding(
                topic, Level.PROBLEM, f"{folder} is not writable", "choose another folder (SETT_CACHE, cache:)"
            )
        elif free < _LEAST_DISK:
            remedy = "a checkpoint needs 12 to 16 bytes a parameter; make room or choose another disk"
            yield Finding(topic, Level.WARNING, found, remedy)
        else:
            yield Finding(topic, Level.OK, found)


def _packages() -> Iterator[Finding]:
    if importlib.util.find_spec("tensorboard"):
        yield Finding("tensorboard", Level.OK, importlib.metadata.version("tensorboard"))
    else:
        remedy = "pip install tensorboard (on every host); without it rank 0 fails and the others wait for it"
        yield Finding("tensorboard", Level.PROBLEM, "not installed", remedy)
    shadow = _shadowed_kernels()
    if shadow:
        remedy = "start from another folder, or take that one off PYTHONPATH: transformers would import it"
        found = f"{shadow} hides the installed Hugging Face package 'kernels'"
        yield Finding("kernels", Level.PROBLEM, found, remedy)


def _shadowed_kernels() -> str:
    """A folder `kernels` that Python would find instead of the installed package of that name, or an empty string.

    transformers decides by the package's metadata whether to import it, so without the package nothing is hidden.
    """
    try:
        package = Path(str(importlib.metadata.distribution("kernels").locate_file("kernels"))).resolve()
    except importlib.metadata.PackageNotFoundError:
        return ""
    spec = importlib.util.find_spec("kernels")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places or Path(places[0]).resolve() == package:
        return ""
    return places[0]


def _output(*command: str) -> str:
    """First lines a command prints, or an empty string when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
