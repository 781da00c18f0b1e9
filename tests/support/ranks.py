"""Real ranks: a script of `tests/support/scripts` under DeepSpeed's own launcher, on gloo.

Owns: both ends of such a run: `run_ranks`, which a test calls, and `rank_main`, which the script calls on every rank.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from trainer.engine.launch import free_port
from trainer.engine.session import init_distributed
from trainer.engine.stop import end_rank

TESTS = Path(__file__).resolve().parents[1]
SCRIPTS = TESTS / "support" / "scripts"
LIMIT = 300
"""Seconds after which a hang is a failure."""


def run_ranks(script: str, world_size: int, out: Path, *arguments: str) -> list[Any]:
    """Run a script's `work(*arguments)` on `world_size` ranks; what it returned, in rank order.

    A rank that fails fails the test, and so does a mismatched collective that hangs, and shared memory left behind.

    Args:
        script: file in `tests/support/scripts`; its main is `rank_main(work)`.
        world_size: number of ranks.
        out: folder the ranks run in and leave their results in.
        arguments: of `work`.
    """
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world_size), "--no_local_rank"]
    command += ["--master_port", str(port), str(SCRIPTS / script), *arguments]
    code, output = _run(command, out)
    assert code == 0, f"{script} on {world_size} ranks failed:\n{output[-8000:]}"
    # DeepSpeed's own all-reduce on CPU leaves 66 MiB a rank under this name when nobody unlinks it.
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    return [torch.load(_result(out, rank)) for rank in range(world_size)]


def rank_main(work: Callable[..., Any]) -> NoReturn:
    """The whole main of a script: join the other ranks, do the work, leave its result for `run_ranks`, end."""
    rank, _, _ = init_distributed()
    torch.save(work(*sys.argv[1:]), _result(Path.cwd(), rank))
    end_rank()


def _result(out: Path, rank: int) -> Path:
    return out / f"rank-{rank}.pt"


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and output of a command that ends, with all its children, before the limit."""
    with subprocess.Popen(
        command,
        env=_environment(),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output = process.communicate(timeout=LIMIT)[0]
        except BaseException:
            # Killing the launcher alone, as `subprocess.run` does, would leave its ranks, and wait for their output.
            os.killpg(process.pid, signal.SIGKILL)
            print(process.communicate()[0][-8000:])
            raise
    return process.returncode, output


def _environment() -> dict[str, str]:
    """A script imports what the test that starts it can: this checkout, and the folders pytest has put on the path."""
    folders = [str(TESTS.parent), *(p for p in sys.path if Path(p).is_relative_to(TESTS))]
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # for ninja, which builds CPU Adam
        "PYTHONPATH": os.pathsep.join(folders),
        "TOKENIZERS_PARALLELISM": "false",
    }
