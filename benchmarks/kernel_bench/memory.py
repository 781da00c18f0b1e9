"""Peak memory of one contender of the linear cross-entropy on a CPU, in a process of its own.

Owns: how it is taken. The inputs exist and every library has run once at a small shape; then the kernel's high-water
mark of the process (`VmHWM`) is set back through `/proc/self/clear_refs`, the contender runs once, and what is counted
is that mark less what was resident before. So gradients count, inputs do not, and nothing is missed between samples.

    python -m kernel_bench.memory CONTENDER SHAPE KERNELS      (in the folder benchmarks; prints bytes)
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from kernel_bench import vocabulary
from kernel_bench.setting import Setting


def measure(contender: str, shape: str, kernels: str) -> int | str:
    """Bytes that one run of a contender needs beside its inputs, or why that is not known."""
    folder = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "kernel_bench.memory", contender, shape, kernels]
    path = os.pathsep.join(filter(None, [str(folder), str(folder.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return int(done.stdout.split()[-1])


def _peak(contender: str, shape: vocabulary.Shape, kernels: str) -> int:
    setting = Setting.here(kernels, lambda text: None)
    _run(setting, contender, vocabulary.SMALL)
    case = vocabulary.case(setting, shape)
    (chosen,) = [c for c in case.contenders if c.name == contender]
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    chosen.run()
    return _status("VmHWM") - before


def _run(setting: Setting, contender: str, shape: vocabulary.Shape) -> None:
    for found in vocabulary.case(setting, shape).contenders:
        if found.name == contender:
            found.run()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def main() -> None:
    contender, wanted, kernels = sys.argv[1:]
    (shape,) = [s for s in vocabulary.SHAPES["cpu"] if str(s) == wanted]
    print(_peak(contender, shape, kernels))


if __name__ == "__main__":
    main()
