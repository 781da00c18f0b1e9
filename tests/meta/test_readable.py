"""What can be read is known before anything starts."""

import re
from pathlib import Path

import pytest
from support import tiny

from trainer.config import recipe_from
from trainer.errors import ConfigError
from trainer.run.prepare import prepare
from trainer.run.weighing import readable


def test_step_windows_can_always_be_read_and_others_by_stage(tmp_path: Path) -> None:
    for heterogeneity, stage, lowest in (("step", 3, 0.2), ("rank", 2, 0.5)):
        window = {"heterogeneity": heterogeneity, "micro_batches": 8}
        job = prepare(
            recipe_from(
                tiny.values(
                    tmp_path,
                    meta={"end_task": "topic", "held_out": {"share": 0.2}},
                    window=window,
                    sampling={"rule": "equal"},
                    training={"steps": 200},
                )
            )
        )
        found = readable(job, 2, stage)
        assert found.min() > lowest, heterogeneity
        assert readable(job, 1, 3).tolist() == pytest.approx(readable(job, 1, 0).tolist())


def test_a_task_that_is_never_alone_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    window = {"heterogeneity": "rank", "micro_batches": 4}
    values = tiny.values(tmp_path, meta={"end_task": "topic", "held_out": {"share": 0.2}}, window=window)
    job = prepare(recipe_from(values))
    message = "in none of the first 8 windows do all 4 ranks of a micro-step hold it, which ZeRO-3 needs"
    with pytest.raises(ConfigError, match=re.escape(message)):
        readable(job, 4, 3)
    assert readable(job, 4, 2).max() > 0
