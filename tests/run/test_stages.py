"""Stages: what they are, that all are checked first, what one takes over from the other, and stopping in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import tiny

from trainer.config import load_recipe, recipe_from
from trainer.engine.checkpoint import Checkpoints, load_weights
from trainer.engine.launch import Launch
from trainer.errors import ConfigError, ModelError, RunError, SettError
from trainer.metrics.log import read_metrics
from trainer.run.directory import is_finished, open_run
from trainer.run.job import train
from trainer.run.outcome import chosen_step
from trainer.run.plan import make_plans
from trainer.run.stages import final_run_dir, prepare_stages, stage_recipes, stage_run

SETT = [sys.executable, "-m", "trainer.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Language modelling and two tasks, then those two and another: the head's rows move between the stages."""
    tasks = {name: tiny.task(name, folder / "tasks") for name in ("topic", "same", "score", "fill")}
    stages = [
        {"name": "first", "tasks": [tasks["fill"], tasks["topic"], tasks["score"]], "evaluation": {"every": 3}},
        {"name": "second", "tasks": [tasks["same"], tasks["topic"], tasks["score"]], "training": {"steps": 12}},
    ]
    return tiny.values(folder, tasks=[tasks["topic"]], stages=stages, training={"steps": 6}, **changes)


def sett(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [*SETT, *arguments], capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def write(folder: Path, recipe: dict[str, Any]) -> str:
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def test_a_stage_is_an_ordinary_recipe(tmp_path: Path) -> None:
    recipe = recipe_from(values(tmp_path, optimizer={"head_lr": 1e-3}))
    first, second = stage_recipes(recipe)
    assert [r.run_dir for r in (first, second)] == [recipe.run_dir / "first", recipe.run_dir / "second"]
    assert (first.training.steps, second.training.steps) == (6, 12)
    assert first.evaluation.every == 3
    assert "every" not in second.evaluation.model_fields_set
    assert second.optimizer == recipe.optimizer
    assert (first.stages, first.init_from.run) == ([], None)
    assert (second.init_from.run, second.init_from.checkpoint, second.init_from.heads) == (first.run_dir, "best", False)
    assert final_run_dir(recipe) == second.run_dir


def test_a_recipe_without_stages_is_its_own_only_one(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    assert stage_recipes(recipe) == [recipe]
    assert final_run_dir(recipe) == recipe.run_dir


def test_heads_are_carried_when_the_recipe_or_the_stage_says_so(tmp_path: Path) -> None:
    recipe = values(tmp_path, carry_heads=True)
    assert stage_recipes(recipe_from(recipe))[1].init_from.heads
    recipe["stages"][1]["carry_heads"] = False
    assert not stage_recipes(recipe_from(recipe))[1].init_from.heads


MISTAKES = [
    ({"training": {"stepz": 3}}, r"stages.1.training.stepz: unknown key \(did you mean 'steps'\?\)"),
    ({"traning": {}}, r"stages.1.traning: unknown key \(did you mean 'training'\?\)"),
    ({"training": {"steps": "x"}}, "stages.1.training.steps: input should be a valid integer"),
    ({"early_stopping": {"patience": 2}}, "stages.1.early_stopping.patience: needs evaluation.every > 0"),
    ({"tasks": []}, "stages.1.tasks: list should have at least 1 item"),
    ({"name": "first"}, "stages.1.name: another stage is called 'first'"),
    ({"name": None}, "stages.1.name: missing"),
    ({"name": "../up"}, "stages.1.name: string should match"),
    ({"output": "x"}, "stages.1.output: not a stage's to say"),
    ({"init_from": {"run": "x"}}, "stages.1.init_from: not a stage's to say"),
    ({"stages": []}, "stages.1.stages: not a stage's to say"),
    ({"carry_heads": "heads"}, "stages.1.carry_heads: say true or false, not 'heads'"),
    ({"seed": 5}, "stages.1.seed: 5, but the first stage has 0. It decides which rows are cut as dev"),
    ({"evaluation": {"dev_rows": 9}}, "stages.1.evaluation.dev_rows: 9, but the first stage has 500"),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes_are_found_as_the_recipe_is_read(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    recipe = values(tmp_path)
    recipe["stages"][1] = {**recipe["stages"][1], **changes}
    with pytest.raises(ConfigError, match=words):
        recipe_from(recipe)


def test_keys_that_only_stages_have_use_for(tmp_path: Path) -> None:
    for changes, words in (
        ({"carry_heads": True}, "carry_heads: only used by stages"),
        ({"init_from": {"heads": True}}, "init_from.run: missing"),
        ({"init_from": {"run": "x", "checkpoint": "newest"}}, "init_from.checkpoint: string should match"),
    ):
        with pytest.raises(ConfigError, match=words):
            tiny.recipe(tmp_path, **changes)


def test_paths_and_overrides_reach_into_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "topic").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "r.yaml"
    stage = {"name": "a", "tasks": ["masked_lm:../data/topic"]}
    path.write_text(yaml.safe_dump({"model": {"path": "x/y"}, "stages": [stage]}))
    monkeypatch.chdir("/")
    recipe = load_recipe(path, ["stages.0.training.steps=7"])
    (run,) = stage_recipes(recipe)
    assert run.training.steps == 7
    (task,) = run.tasks
    assert str(task).startswith("masked_lm:/")
    assert Path(str(task).partition(":")[2]).resolve() == tmp_path / "data" / "topic"


def refused(recipe: dict[str, Any], error: type[SettError], words: str) -> None:
    with pytest.raises(error, match=words):
        train(recipe_from(recipe), Launch(num_gpus=1))
    assert not recipe_from(recipe).run_dir.exists()


def test_nothing_starts_before_every_stage_is_found_possible(tmp_path: Path) -> None:
    recipe = values(tmp_path)
    recipe["stages"][1]["early_stopping"] = {"watch": "topik"}
    refused(recipe, ConfigError, r"stage 'second': early_stopping.watch: no task named 'topik'")
    recipe["stages"][1] |= {"early_stopping": {}, "window": {"micro_batches": 3}, "deepspeed": {"train_batch_size": 2}}
    refused(recipe, ConfigError, "stage 'second': .*train_batch_size")
    recipe = values(tmp_path)
    rows = tmp_path / "tasks" / "same" / "train.jsonl"
    rows.write_text("{broken\n")
    refused(recipe, SettError, r"stage 'second': task 'same', train: 1 bad row")
    recipe = values(tmp_path)
    recipe["stages"][1]["model"] = {"config": {"num_hidden_layers": 3}}
    refused(recipe, ModelError, r"stage 'second': init_from.run: .*first: its model is another one: .*layer.2")
    other = tiny.values(tmp_path / "other", "decoder")["model"]["tokenizer"]
    recipe["stages"][1]["model"] = {"tokenizer": other}
    refused(recipe, ModelError, "stage 'second': init_from.run: .* has another tokenizer")


def test_the_plan_has_every_stage(tmp_path: Path) -> None:
    plans = make_plans(recipe_from(values(tmp_path)), Launch(num_gpus=1), windows=1)
    assert [plan.job.recipe.name for plan in plans] == ["first", "second"]
    assert [plan.job.names for plan in plans] == [["fill", "topic", "score"], ["same", "topic", "score"]]


def test_a_run_to_start_from_must_be_there_and_finished(tmp_path: Path) -> None:
    start = tiny.recipe(tmp_path, name="start")
    recipe = tiny.recipe(tmp_path, init_from={"run": str(start.run_dir)})
    with pytest.raises(RunError, match=r"start: not a run directory"):
        prepare_stages(recipe)
    open_run(start)
    with pytest.raises(RunError, match="has no checkpoint yet"):
        prepare_stages(recipe)
    folder = Checkpoints(start.run_dir, 1, True).path(3)
    folder.mkdir(parents=True)
    (folder / "sett.json").write_text('{"step": 3, "world_size": 1, "zero_stage": 3, "group": 1}')
    with pytest.raises(RunError, match="has not finished, so that its best checkpoint may change"):
        prepare_stages(recipe)
    with pytest.raises(RunError, match="no checkpoint '4'"):
        prepare_stages(tiny.recipe(tmp_path, init_from={"run": str(start.run_dir), "checkpoint": "4"}))
    assert prepare_stages(tiny.recipe(tmp_path, init_from={"run": str(start.run_dir), "checkpoint": "3"}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A finished recipe of two stages on two ranks: its directory, its values, and what it printed."""
    folder = tmp_path_factory.mktemp("stages")
    recipe = values(folder)
    recipe["stages"][1]["checkpoint"] = {"export": ["topic"]}
    printed = sett("train", write(folder, recipe), "--num-gpus", "2")
    return folder / "runs" / "tiny", recipe, printed


@pytest.mark.distributed
def test_the_last_stage_is_what_commands_mean(finished: tuple[Path, dict[str, Any], str]) -> None:
    run, recipe, printed = finished
    assert printed.index("stage 1 of 2: first") < printed.index("stage 2 of 2: second")
    assert printed.count("Dev metrics") == 1
    assert is_finished(run / "first")
    assert is_finished(run / "second")
    assert stage_run(run) == run / "second" == final_run_dir(load_recipe(run / "recipe.yaml"))
    assert load_recipe(run / "recipe.yaml") == recipe_from(recipe)
    rows = json.loads((run / "second" / "results.json").read_text())["tasks"]
    assert {row["task"] for row in rows} == {"same", "topic", "score"}
    assert (run / "second" / "export" / "topic" / "model.safetensors").is_file()
    assert "same" in sett("eval", str(run), "--num-gpus", "1")
    assert str(run / "second" / "export" / "same") in sett("export", str(run), "--task", "same")


@pytest.mark.distributed
def test_finished_stages_are_not_trained_again(finished: tuple[Path, dict[str, Any], str]) -> None:
    run, recipe, _ = finished
    before = [(run / name / "metrics.jsonl").read_bytes() for name in ("first", "second")]
    printed = sett("train", write(run.parents[1], recipe), "--num-gpus", "2")
    assert "stage 1 of 2: first, finished already" in printed
    assert [(run / name / "metrics.jsonl").read_bytes() for name in ("first", "second")] == before


@pytest.mark.distributed
def test_what_may_change_is_decided_stage_by_stage(finished: tuple[Path, dict[str, Any], str]) -> None:
    run, recipe, _ = finished
    path = write(run.parents[1], recipe)
    message = sett("train", path, "--num-gpus", "2", "stages.0.optimizer.lr=0.5", code=2)
    assert "stage 'first'" in message
    assert "optimizer.lr: 0.002 -> 0.5" in message
    message = sett("train", path, "--num-gpus", "2", "stages.1.carry_heads=true", code=2)
    assert "stage 'second'" in message
    assert "init_from.heads: False -> True" in message
    assert "finished already" in sett("train", path, "--num-gpus", "2", "stages.1.evaluation.max_rows=5")
    moved = run.parents[2] / "moved"
    moved.mkdir()
    (moved / "runs").symlink_to(run.parent)
    assert "finished already" in sett("train", path, "--num-gpus", "2", f"output={moved / 'runs'}")


@pytest.mark.distributed
def test_stopped_in_the_second_stage_and_gone_on_with(
    finished: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    """SIGTERM in stage 2, the same command again: the weights of a run that was never stopped."""
    run, recipe, _ = finished
    path = write(tmp_path, {**recipe, "name": "stopped"})
    stopped = run.with_name("stopped")
    command = [*SETT, "train", path, "--num-gpus", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    log = stopped / "second" / "metrics.jsonl"
    deadline = time.monotonic() + 300  # a crowded machine takes its time
    while not (log.exists() and any(r["step"] >= 2 for r in read_metrics(log))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert f"The run in {stopped / 'second'} is not finished" in " ".join(printed.split())
    reached = Checkpoints(stopped / "second", 1, False).steps()[-1]
    assert 2 <= reached < 12
    printed = sett("train", path, "--num-gpus", "2")
    assert "stage 1 of 2: first, finished already" in printed
    assert f"resuming at window {reached}" in printed
    ours, theirs = (
        load_weights(Checkpoints(r / "second", 1, True).path(chosen_step(r / "second", "last"))) for r in (stopped, run)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.distributed
def test_a_run_without_stages_is_not_overwritten(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    run, recipe, _ = finished
    inner = {**recipe, "name": "first", "output": str(run)}
    message = sett("train", write(tmp_path, inner), "--num-gpus", "2", code=2)
    assert "holds a run without stages" in message
    worker = [sys.executable, "-m", "trainer.worker", str(run / "recipe.yaml")]
    done = subprocess.run(worker, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert done.returncode == 2
    assert "train it with `sett train`" in done.stderr
