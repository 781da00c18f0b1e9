"""How many runs at once, and what each gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from study.small import write_study
from support import tiny

from trainer.engine.launch import Launch
from trainer.errors import ConfigError
from trainer.study.grid import plan_runs
from trainer.study.machine import PROCESS_BYTES, choose_slots, cpu_jobs, cpu_slots, gpu_slots, run_bytes, visible_gpus
from trainer.study.schema import load_study

GIB = 2.0**30


def test_on_a_cpu_two_cores_a_rank_as_far_as_the_memory_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [cpu_jobs(cores, 64 * GIB, 1, 2 * GIB) for cores in (1, 3, 4, 16)] == [1, 1, 2, 8]
    assert cpu_jobs(16, 64 * GIB, 2, 2 * GIB) == 4
    assert cpu_jobs(16, 7 * GIB, 1, 2 * GIB) == 3
    assert cpu_jobs(16, 1 * GIB, 1, 2 * GIB) == 1  # it may fit all the same: one is always tried
    assert cpu_slots(16, 4, 2).environments == ({"OMP_NUM_THREADS": "2"},) * 4
    assert cpu_slots(2, 4, 1).environments == ({"OMP_NUM_THREADS": "1"},) * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu_slots(16, 4, 1).environments[0] == {"OMP_NUM_THREADS": "3"}


def test_on_gpus_each_run_has_its_own() -> None:
    def shares(gpus: list[str], jobs: int | None, ranks: int) -> list[str]:
        return [e["CUDA_VISIBLE_DEVICES"] for e in gpu_slots(gpus, jobs, ranks).environments]

    assert shares(["0", "1", "2"], None, 1) == ["0", "1", "2"]
    assert shares(["4", "5", "6", "7"], None, 2) == ["4,5", "6,7"]
    assert shares(["0", "1", "2"], 1, 2) == ["0,1"]
    with pytest.raises(ConfigError, match="must name GPUs by number"):
        gpu_slots(["GPU-1a2b"], None, 1)
    with pytest.raises(ConfigError, match="3 runs of 2 ranks need 6 GPUs; there are 4"):
        gpu_slots(["0", "1", "2", "3"], 3, 2)
    with pytest.raises(ConfigError, match="1 runs of 2 ranks need 2 GPUs; there are 1"):
        gpu_slots(["0"], None, 2)


def test_gpus_that_are_hidden_stay_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    command = Launch(num_gpus=1).command(["recipe.yaml"])
    assert command[command.index("--num_gpus") + 1] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert visible_gpus() == ["5", "3"]
    for launch, expected in ((Launch(num_gpus=1), "localhost:5"), (Launch(), "localhost:5,3")):
        command = launch.command(["recipe.yaml"])
        assert command[command.index("--include") + 1] == expected
        assert "--num_gpus" not in command  # with it DeepSpeed takes GPU 0, whatever the variable says


def test_the_estimate_grows_with_the_model_and_the_ranks(tmp_path: Path) -> None:
    def need(hidden: int, ranks: int) -> float:
        values = tiny.values(tmp_path, tasks=[tiny.task("topic", tmp_path / "tasks")])
        values["model"]["config"]["hidden_size"] = hidden
        return run_bytes(tiny.recipe_from(values), ranks)

    assert PROCESS_BYTES < need(32, 1) < 1.1 * PROCESS_BYTES
    assert need(1024, 1) > need(32, 1) + 16 * 4 * 2 * 1024**2  # Adam's states of the attention's weights alone
    assert need(32, 2) > 2 * PROCESS_BYTES


def test_options_are_checked(tmp_path: Path) -> None:
    runs = plan_runs(load_study(write_study(tmp_path)))
    for jobs, ranks, message in ((0, 1, "--jobs: 0"), (None, 0, "--ranks: 0")):
        with pytest.raises(ConfigError, match=message):
            choose_slots(runs, jobs, ranks)
    if not visible_gpus():
        assert len(choose_slots(runs, 3, 1).environments) == 3
        assert choose_slots(runs, None, 1).environments
