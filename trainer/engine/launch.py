"""Starting the ranks: the command line of DeepSpeed's own launcher.

Owns: how many ranks a launch has, the command, and the environment of the ranks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from trainer.engine.stop import StopFlag
from trainer.errors import ConfigError, RunError


@dataclass(frozen=True)
class Launch:
    """Where ranks run, with DeepSpeed's meanings. On a box without GPUs `num_gpus` is a number of processes."""

    num_gpus: int | None = None
    hostfile: Path | None = None
    include: str = ""
    exclude: str = ""
    master_port: int | None = None

    def world_size(self) -> int:
        """Number of ranks this starts.

        Raises:
            ConfigError: the options contradict each other, or the hostfile is missing or wrong.
        """
        if self.num_gpus is not None and (self.include or self.exclude):
            raise ConfigError("--num-gpus: cannot be combined with --include/--exclude (they already say which GPUs)")
        if self.include and self.exclude:
            raise ConfigError("--include and --exclude: give one of them")
        if self.num_gpus is not None and self.num_gpus < 1:
            raise ConfigError(f"--num-gpus: {self.num_gpus} ranks; at least 1 is needed")
        hosts = self._hosts()
        if self.num_gpus is not None:
            available = torch.cuda.device_count()
            if self.hostfile is None and available and self.num_gpus > available:
                raise ConfigError(f"--num-gpus: asks for {self.num_gpus} GPUs, this machine has {available}")
            return self.num_gpus * (len(hosts) or 1)
        if hosts:
            return sum(hosts.values())
        return torch.cuda.device_count() or 1

    def _hosts(self) -> dict[str, int]:
        """Slots in use on each host of the hostfile; empty without one."""
        from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

        if self.hostfile is None:
            if not (self.include or self.exclude):
                return {}
            pool = {"localhost": torch.cuda.device_count() or 1}
        else:
            if not self.hostfile.is_file():
                # DeepSpeed only warns and trains on this machine alone.
                raise ConfigError(f"--hostfile: {self.hostfile} does not exist")
            try:
                pool = fetch_hostfile(str(self.hostfile))
            except ValueError as error:
                raise ConfigError(f"--hostfile: {self.hostfile}: {error}") from error
        try:
            active = parse_inclusion_exclusion(pool, self.include, self.exclude)
        except ValueError as error:
            raise ConfigError(f"--include/--exclude: {error}") from error
        return {host: len(slots) for host, slots in active.items()}

    def _visible(self) -> list[str]:
        """The GPUs that CUDA_VISIBLE_DEVICES leaves to this machine's ranks; with --num_gpus DeepSpeed ignores it."""
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = chosen.split(",") if self.hostfile is None and torch.cuda.is_available() else []
        return names if all(name.isdigit() for name in names) else []

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The launcher's command that runs `python -m trainer.worker ARGUMENTS` on every rank."""
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
        if self.hostfile is not None:
            command += ["--hostfile", str(self.hostfile)]
        if self.include:
            command += ["--include", self.include]
        elif self.exclude:
            command += ["--exclude", self.exclude]
        else:
            per_host = self.num_gpus or (None if self.hostfile else self.world_size())
            if visible := self._visible():
                command += ["--include", f"localhost:{','.join(visible[:per_host])}"]
            else:
                command += ["--num_gpus", str(per_host)] if per_host else []
        if self.hostfile is None:
            command += ["--master_port", str(self.master_port or free_port())]
        elif self.master_port is not None:
            command += ["--master_port", str(self.master_port)]
        return [*command, "--module", "trainer.worker", *arguments]


_KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""Have glibc keep freed memory instead of returning it: ZeRO-3 gathers the same large weights in every micro-step, and
faulting their pages in again takes time that shows in a step on CPUs."""


def free_port() -> int:
    """A TCP port nobody listens on."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(ranks_here: int) -> dict[str, str]:
    """Environment of the ranks on this machine: on CPU the cores are shared out, and DeepSpeed told it is one."""
    environment = dict(os.environ)
    # DeepSpeed compiles with the ninja of this environment, which nobody need have activated.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks_here)))
        for name, value in _KEEP_MEMORY.items():
            environment.setdefault(name, value)
    environment.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


def run_ranks(launch: Launch, arguments: Sequence[str]) -> None:
    """Run the ranks to their end; SIGTERM and SIGINT to this process stop them in order, after the window.

    Raises:
        RunError: a rank failed; its own message is above in the output.
    """
    if launch.hostfile is not None and shutil.which("pdsh") is None:
        raise RunError("--hostfile: DeepSpeed starts other hosts through pdsh, which is not installed (Debian: pdsh)")
    # A session of its own: Ctrl-C must not reach DeepSpeed's launcher, which would kill rank after rank.
    process = subprocess.Popen(
        launch.command(arguments), env=rank_environment(launch.world_size()), start_new_session=True
    )
    stopped: set[int] = set()
    with StopFlag() as stop:
        while (code := _wait(process)) is None:
            if stop.raised:
                _stop_ranks(process.pid, stopped)
    if code:
        raise RunError(f"training stopped with exit code {code}; the message of the rank that failed is above")


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


def _stop_ranks(launcher: int, stopped: set[int]) -> None:
    """SIGTERM to every rank at once: the launcher would signal one and wait for its end before the next.

    Once a rank (`stopped` are those that had it), but asked for until the end: a signal that comes before the launcher
    has made its ranks would find none of them.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = child.cmdline()
                is_rank = "trainer.worker" in command and "deepspeed.launcher.launch" not in command
                if is_rank and "deepspeed.launcher.runner" not in command and child.pid not in stopped:
                    stopped.add(child.pid)
                    child.send_signal(signal.SIGTERM)
