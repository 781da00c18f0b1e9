"""Which run directory a recipe may use, and what is left of a start that came to nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny

from trainer.config import Recipe, load_recipe
from trainer.engine.launch import Launch
from trainer.errors import ConfigError, RunError
from trainer.run.job import RECIPE, check_run, is_finished, open_recipe, open_run, train


def with_lr(folder: Path, lr: float, **changes: Any) -> Recipe:
    return tiny.recipe(folder, optimizer={"lr": lr}, **changes)


def test_a_refused_start_leaves_nothing(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"window.micro_batches = 4 cannot be shared evenly by 3 ranks"):
        train(recipe, Launch(num_gpus=3))
    assert not recipe.run_dir.exists()


def test_until_the_first_checkpoint_the_recipe_may_change_and_logs_start_anew(tmp_path: Path) -> None:
    open_run(with_lr(tmp_path, 1e-3))
    run_dir = with_lr(tmp_path, 1e-3).run_dir
    (run_dir / "metrics.jsonl").write_text('{"step": 3}\n')
    (run_dir / "tensorboard").mkdir()
    (run_dir / "tensorboard" / "events").write_text("")
    open_run(with_lr(tmp_path, 2e-3))
    assert load_recipe(run_dir / RECIPE).optimizer.lr == 2e-3
    assert sorted(path.name for path in run_dir.iterdir()) == [RECIPE]
    assert not is_finished(run_dir)


def test_a_file_in_the_place_of_the_run_directory(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    recipe.run_dir.parent.mkdir(parents=True)
    recipe.run_dir.write_text("")
    with pytest.raises(ConfigError, match="is a file, not a directory"):
        check_run(recipe)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a run directory \(no recipe.yaml in it\)"):
        open_recipe(tmp_path)
