"""The schedule as a function of the step, and the launcher's command line."""

from pathlib import Path

import pytest
import torch

from trainer.config.schema import OptimizerConfig
from trainer.engine.launch import Launch
from trainer.engine.schedule import lr_factor, warmup_steps
from trainer.errors import ConfigError


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "constant"])
def test_schedule_warms_up_and_decays(schedule: str) -> None:
    config = OptimizerConfig(schedule=schedule, warmup=0.1, power=2.0)
    factors = [lr_factor(s, 100, config) for s in range(101)]
    assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(factors) == 1.0
    if schedule == "constant":
        assert factors[-1] == 1.0
    else:
        assert factors[10:] == sorted(factors[10:], reverse=True)
        assert factors[-1] == pytest.approx(0.0, abs=1e-12)
        middle = {"linear": 0.5, "cosine": 0.5, "polynomial": 0.25}[schedule]
        assert factors[55] == pytest.approx(middle)


def test_warmup_is_a_share_or_a_number() -> None:
    assert warmup_steps(OptimizerConfig(warmup=0.06), 1000) == 60
    assert warmup_steps(OptimizerConfig(warmup=50), 1000) == 50
    assert lr_factor(0, 10, OptimizerConfig(warmup=0)) == 1.0


def test_world_size_follows_deepspeeds_meanings(tmp_path: Path) -> None:
    hosts = tmp_path / "hostfile"
    hosts.write_text("# two hosts\nalpha slots=4\n\nbeta slots=2\n")
    assert Launch(hostfile=hosts).world_size() == 6
    assert Launch(hostfile=hosts, include="alpha:0,1@beta").world_size() == 4
    assert Launch(hostfile=hosts, exclude="alpha:3").world_size() == 5
    assert Launch(hostfile=hosts, num_gpus=2).world_size() == 4
    if not torch.cuda.is_available():
        assert Launch(num_gpus=3).world_size() == 3
        assert Launch().world_size() == 1


def test_bad_launches_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "hostfile"
    bad.write_text("alpha slots=four\n")
    for launch, expected in (
        (Launch(hostfile=tmp_path / "none"), "does not exist"),
        (Launch(hostfile=bad), "hostfile"),
        (Launch(num_gpus=2, include="a"), "cannot be combined"),
        (Launch(include="a", exclude="b"), "give one of them"),
        (Launch(num_gpus=0), "at least 1"),
    ):
        with pytest.raises(ConfigError, match=expected):
            launch.world_size()


def test_command_is_deepspeeds_own_launcher(tmp_path: Path) -> None:
    hosts = tmp_path / "hostfile"
    hosts.write_text("alpha slots=4\nbeta slots=2\n")
    local = Launch(num_gpus=2).command(["recipe.yaml"])
    assert local[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert local[local.index("--num_gpus") + 1] == "2"
    assert local[-3:] == ["--module", "trainer.worker", "recipe.yaml"]
    remote = Launch(hostfile=hosts, include="alpha:0@beta:1").command([])
    assert remote[remote.index("--hostfile") + 1] == str(hosts)
    assert remote[remote.index("--include") + 1] == "alpha:0@beta:1"
    assert "--num_gpus" not in remote
