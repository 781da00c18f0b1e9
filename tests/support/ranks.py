"""Real ranks: a script of `tests/support/scripts` under DeepSpeed's own launcher, on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.engine.launch import free_port

SCRIPTS = Path(__file__).parent / "scripts"
LIMIT = 300
"""Seconds after which a hang is a failure."""


def run_ranks(script: str, world_size: int, out: Path, *arguments: str) -> list[Any]:
    """Run a script on `world_size` ranks; each writes `OUT/rank-N.json`, which are returned in rank order.

    A script gets `OUT ARGUMENTS...`; a rank that fails, or a mismatched collective that hangs, fails the test.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world_size)]
    command += ["--master_port", str(free_port()), str(SCRIPTS / script), str(out), *arguments]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, f"{script} on {world_size} ranks failed:\n{(done.stdout + done.stderr)[-6000:]}"
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
