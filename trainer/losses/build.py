"""From the sources of the loss kernels to a loaded library.

Owns: where the sources are, what they are compiled with, and the cache of what came out. A build is keyed by everything
that can change it, made aside, and renamed into place: killed or repeated, a half-made one is never loaded. Processes
that want the same build wait for the first on a lock that dies with its holder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

from trainer.errors import SettError

_LIBRARY = "libsett_kernels.so"
_CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
_NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# Only what torch promises to keep from 2.11 on: one build serves every later torch.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


class KernelBuildError(SettError):
    """The loss kernels cannot be compiled here; the message says why."""


@dataclass(frozen=True)
class Toolchain:
    """What builds are made with."""

    cxx: str
    nvcc: str | None
    """None builds for the CPU alone."""
    architectures: tuple[str, ...]
    """Compute capabilities such as `9.0`; empty without nvcc."""
    cudart: Path | None

    @property
    def target(self) -> str:
        """What is built for, in words."""
        return f"CUDA {' '.join(self.architectures)}" if self.nvcc else "the CPU"

    @classmethod
    def find(cls) -> Toolchain:
        """The tools for this machine's processors, and for its GPUs if torch sees some.

        `TORCH_CUDA_ARCH_LIST` names other GPUs than the ones here, as everywhere in PyTorch.

        Raises:
            KernelBuildError: there is no C++ compiler, or a GPU and no nvcc.
        """
        cxx = shutil.which(os.environ.get("CXX") or "c++")
        if cxx is None:
            raise KernelBuildError("there is no C++ compiler (Debian: apt-get install g++)")
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        architectures = tuple(listed) or tuple(sorted(f"{major}.{minor}" for major, minor in here))
        if not architectures or torch.version.cuda is None:
            return cls(cxx, None, (), None)
        home = _cuda_home()
        if home is None:
            raise KernelBuildError(
                f"there is a GPU and no nvcc: install the CUDA {torch.version.cuda} toolkit, or set CUDA_HOME to it"
            )
        cudart = next((p for folder in ("lib64", "lib") for p in sorted((home / folder).glob("libcudart.so*"))), None)
        if cudart is None:
            raise KernelBuildError(f"{home} has nvcc and no libcudart.so; install the CUDA runtime beside it")
        return cls(cxx, str(home / "bin" / "nvcc"), architectures, cudart)


def _cuda_home() -> Path | None:
    """A folder with bin/nvcc: CUDA_HOME and its usual places, else the one that pip installs."""
    places = [Path(cpp_extension.CUDA_HOME)] if cpp_extension.CUDA_HOME else []
    places += sorted((Path(torch.__file__).parent.parent / "nvidia").glob("cu*"))
    return next((p for p in places if (p / "bin" / "nvcc").exists()), None)


def source_folder() -> Path:
    """The kernels' sources: beside the package in a checkout, under `share/sett` where it is installed."""
    checkout = Path(__file__).resolve().parents[2] / "kernels" / "csrc"
    installed = Path(sysconfig.get_path("data")) / "share" / "sett" / "kernels" / "csrc"
    return checkout if checkout.is_dir() else installed


def library_path(tools: Toolchain) -> Path:
    """Where the library is, or will be once it is built."""
    root = Path(os.environ.get("SETT_CACHE") or Path.home() / ".cache" / "sett") / "kernels"
    return root / _key(tools) / _LIBRARY


def library(tools: Toolchain | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """The compiled library of this machine, from the cache or made now.

    Args:
        tools: what to build with; None looks for it.
        say: gets a line when a build starts and one when it has ended.

    Raises:
        KernelBuildError: something is missing, or a source does not compile.
    """
    tools = tools or Toolchain.find()
    path = library_path(tools)
    if path.exists():
        return path
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        with path.parent.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _build(tools, path.parent, say)
    except OSError as error:
        raise KernelBuildError(f"cannot write the compiled loss kernels to {path.parent}: {error.strerror}") from error
    return path


def _build(tools: Toolchain, folder: Path, say: Callable[[str], None]) -> None:
    """Compile aside, and rename into place what is whole."""
    start = time.monotonic()
    say(f"compiling the loss kernels for {tools.target}, once for this machine ...")
    aside = folder.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed
    try:
        _compile(tools, aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(f"compiled the loss kernels in {time.monotonic() - start:.0f} s")


def _sources(tools: Toolchain) -> list[Path]:
    folder = source_folder()
    found = [folder / "binding.cpp", *sorted((folder / "cpu").glob("*.cpp"))]
    return found + (sorted((folder / "cuda").glob("*.cu")) if tools.nvcc else [])


def _key(tools: Toolchain) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in source_folder().rglob("*") if p.is_file()):
        digest.update(path.relative_to(source_folder()).as_posix().encode() + b"\0" + path.read_bytes())
    versions = [_version(tools.cxx)] + ([_version(tools.nvcc)] if tools.nvcc else [])
    said = (*versions, *_CXX_FLAGS, *_NVCC_FLAGS, *tools.architectures, platform.machine(), torch.__version__)
    digest.update("\0".join(said).encode())
    return digest.hexdigest()[:20]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _commands(tools: Toolchain, out: Path) -> tuple[list[list[str]], list[str]]:
    """One command a source, and the one that links their objects."""
    include = ["-I", str(source_folder())]
    torch_include = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    codes = [a.replace(".", "").removesuffix("+PTX") for a in tools.architectures]
    gencode = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    compiling, objects = [], []
    for source in _sources(tools):
        target = str(out / f"{source.parent.name}_{source.stem}.o")
        objects.append(target)
        if source.suffix == ".cu":
            compiling.append([str(tools.nvcc), *_NVCC_FLAGS, *gencode, *include, "-c", str(source), "-o", target])
        else:
            meets_torch = [STABLE_ABI, *torch_include, *(["-DSETT_WITH_CUDA"] if tools.nvcc else [])]
            extra = meets_torch if source.name == "binding.cpp" else []
            compiling.append([tools.cxx, *_CXX_FLAGS, *extra, *include, "-c", str(source), "-o", target])
    libraries = ["-ltorch_cpu", *(["-ltorch_cuda"] if tools.nvcc else [])]
    link = [tools.cxx, "-shared", *objects, "-o", str(out / _LIBRARY), "-L", str(Path(torch.__file__).parent / "lib")]
    return compiling, [*link, *libraries, *([str(tools.cudart)] if tools.cudart else [])]


def _compile(tools: Toolchain, out: Path) -> None:
    out.mkdir()
    compiling, link = _commands(tools, out)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, compiling))
    _run(link)
    for leftover in out.glob("*.o"):
        leftover.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).splitlines()[:20])
        raise KernelBuildError(f"the loss kernels do not compile:\n{' '.join(command)}\n{said}")
