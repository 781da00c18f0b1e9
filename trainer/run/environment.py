"""What a run ran on: the machine, the versions, the commit.

Owns: `RUN/environment.json`, written at every start for who reads the run later; nothing in Sett depends on it.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # studies ask for the device without starting DeepSpeed
    from trainer.engine.session import Session

ENVIRONMENT = "environment.json"
PACKAGES = ("sett", "torch", "deepspeed", "transformers", "datasets")


def write_environment(run_dir: Path, session: Session) -> None:
    """Write the file on the first rank; every rank calls it."""
    hosts = session.gather(socket.gethostname())
    if not session.is_first:
        return
    found = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "hosts": len(set(hosts)),
        "world_size": session.world_size,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    temporary = run_dir / f"{ENVIRONMENT}.tmp"
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(temporary, run_dir / ENVIRONMENT)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def device_name() -> str:
    """The GPU, or the CPU's model."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit of the code that runs, `-dirty` with changes; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
