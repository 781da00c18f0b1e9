"""`sett doctor` and the memory table of `sett plan`: what they find and how it reads."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from rich.console import Console

from trainer.run import doctor, memory
from trainer.run.doctor import Finding, Level

ROOT = Path(__file__).resolve().parents[2]
BILLION = 10**9


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    return {f.topic: f for f in doctor.examine(tmp_path_factory.mktemp("cache") / "not" / "yet")}


def test_examine_covers_what_training_needs(findings: dict[str, Finding]) -> None:
    topics = ("Python", "torch", "deepspeed", "transformers", "sett", "CPU", "C++ compiler", "ninja", "CUDA toolkit")
    for topic in (*topics, "DeepSpeed ops", "pdsh", "ssh", "numactl", "srun", "disk, token cache", "tensorboard"):
        assert topic in findings
    assert not [f for f in findings.values() if f.level is Level.PROBLEM], "the machine that runs the tests can train"


def test_every_warning_has_a_remedy(findings: dict[str, Finding]) -> None:
    assert [f for f in findings.values() if f.level is not Level.OK and not f.remedy] == []


def test_doctor_is_quick_and_the_probes_do_not_chatter() -> None:
    code = "from rich.console import Console; from trainer.run.doctor import *; render(examine(), Console(width=100))"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 20
    # DeepSpeed's import says that it found no GPU; nothing else may stand before the table.
    lines = [line for line in done.stdout.splitlines() if "real_accelerator.py" not in line]
    assert lines[0].startswith("┏")
    assert lines[-1].endswith("problems")


def test_render_counts_and_shows_remedies() -> None:
    out = io.StringIO()
    rows = [Finding("disk", Level.WARNING, "1.0 GB free", "make [room]"), Finding("torch", Level.OK, "2.13.0")]
    doctor.render(rows, Console(file=out, width=100))
    assert "make [room]" in out.getvalue(), "brackets are text, not markup"
    assert "1 ok, 1 warnings, 0 problems" in out.getvalue()


@pytest.mark.parametrize(
    ("built", "nvcc", "gcc", "level", "words"),
    [
        (None, "", "12.2.0", Level.OK, "CPU build"),
        ("13.0", "13.0", "12.2.0", Level.OK, "nvcc 13.0"),
        ("13.0", "", "12.2.0", Level.WARNING, "no nvcc"),
        ("13.0", "12.8", "12.2.0", Level.WARNING, "torch is built for CUDA 13.0"),
        ("12.4", "12.4", "14.1.0", Level.WARNING, "does not take g++ 14.1.0"),
    ],
)
def test_compilers_that_do_not_match(built: str | None, nvcc: str, gcc: str, level: Level, words: str) -> None:
    finding = doctor.cuda_toolkit(built, nvcc, gcc)
    assert finding.level is level
    assert words in finding.found


def test_a_forced_accelerator_that_is_not_there_is_seen() -> None:
    # A fresh process: DeepSpeed chooses its accelerator once.
    code = "from trainer.run.doctor import *; print([f.level.value for f in examine() if 'accelerator' in f.topic])"
    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("['ok']"), done.stderr


def test_a_folder_that_hides_hugging_faces_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site"
    (package / "kernels").mkdir(parents=True)
    (package / "kernels" / "__init__.py").touch()
    (package / "kernels-0.1.dist-info").mkdir()
    (package / "kernels-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n")
    mine = tmp_path / "mine"
    (mine / "kernels").mkdir(parents=True)
    (mine / "kernels" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.setattr(sys, "path", [str(package), *sys.path])
    assert "kernels" not in {f.topic for f in doctor.examine(tmp_path)}
    monkeypatch.setattr(sys, "path", [str(mine), *sys.path])
    found = {f.topic: f for f in doctor.examine(tmp_path)}["kernels"]
    assert found.level is Level.PROBLEM
    assert str(mine / "kernels") in found.found


def test_memory_follows_deepspeeds_estimators() -> None:
    rows = {(r.stage, r.offload): r for r in memory.estimate(7 * BILLION, BILLION // 2, world_size=16, gpus_per_node=8)}
    cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
        7 * BILLION, BILLION // 2, num_gpus_per_node=8, num_nodes=2, cpu_offload=False, cpu_offload_params=False
    )
    assert rows[3, "none"].gpu == gpu
    assert rows[3, "none"].cpu == cpu // 8, "DeepSpeed counts a node, the table a rank"
    assert rows[0, "none"].gpu == 20 * 7 * BILLION


def test_memory_falls_with_the_stage_and_with_offload() -> None:
    rows = memory.estimate(7 * BILLION, BILLION // 20, world_size=8, gpus_per_node=8)
    assert [(r.stage, r.offload) for r in rows if r.config] == [
        (1, "none"),
        (2, "none"),
        (3, "none"),
        (3, "optimizer, weights"),
    ]
    plain = [r.gpu for r in rows if r.offload == "none"]
    assert plain == sorted(plain, reverse=True)
    stage3 = [r.gpu for r in rows if r.stage == 3]
    assert stage3 == sorted(stage3, reverse=True)


def test_on_one_rank_stages_0_to_2_need_the_same() -> None:
    rows = memory.estimate(BILLION, BILLION // 10, world_size=1, gpus_per_node=8)
    assert len({r.gpu for r in rows if r.offload == "none" and r.stage < 3}) == 1


def test_memory_table() -> None:
    out = io.StringIO()
    memory.render(memory.estimate(BILLION, BILLION // 10, 2, 2), Console(file=out, width=100))
    assert "zero3-offload-cpu" in out.getvalue()
    assert "18.6 GB" in out.getvalue(), "20 bytes a parameter at stage 0"


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KB"), (3 * 2**40, "3.0 TB")])
def test_readable(size: int, text: str) -> None:
    assert memory.readable(size) == text
