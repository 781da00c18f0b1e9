"""The example files for several hosts are read by what will read them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def test_hostfile_is_one_for_deepspeed() -> None:
    hosts = fetch_hostfile(str(LAUNCH / "hostfile.example"))
    assert dict(hosts) == {"node-a": 8, "node-b": 8}
    chosen = parse_inclusion_exclusion(hosts, "node-a:0,1@node-b", "")
    assert {host: len(slots) for host, slots in chosen.items()} == {"node-a": 2, "node-b": 8}


def test_deepspeed_env_has_only_assignments() -> None:
    # DeepSpeed splits every line at '=' and crashes on one without, blank lines and comments included.
    lines = (LAUNCH / "deepspeed_env.example").read_text().removesuffix("\n").split("\n")
    assert all(line.partition("=")[0].isidentifier() and "=" in line for line in lines)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_slurm_script_parses_and_says_how_to_use_it() -> None:
    script = str(LAUNCH / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
