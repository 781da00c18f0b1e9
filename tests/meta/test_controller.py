"""What the controller does when there is nothing to go by."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

from trainer.config import recipe_from
from trainer.engine.session import init_distributed, start
from trainer.engine.step import run_window
from trainer.meta import Controller
from trainer.run.prepare import Job, prepare
from trainer.run.weighing import controller_of


def run(folder: Path, values: dict[str, Any], windows: int) -> tuple[Controller, Job]:
    recipe = recipe_from(values)
    init_distributed()
    job = prepare(recipe)
    session = start(recipe, job.tasks, None, job.random_weights)
    controller = controller_of(job, session)
    assert controller is not None
    planner, collator = job.planner(1), job.collator(job.train)
    for step in range(windows):
        window = planner.window(step, 1)
        held_out, factors = controller.before_window(step), controller.factors()
        totals, _ = run_window(session, window, collator, 0, 1.0, False, factors, held_out)
        controller.after_window(window, factors, totals.task_loss, held_out)
    return controller, job


def recipe(folder: Path, stage: int, **meta: Any) -> dict[str, Any]:
    meta = {"end_task": "topic", "every": 2, "rate": 1.0, "held_out": {"share": 0.25}, **meta}
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return tiny.values(folder, meta=meta, window={"heterogeneity": "step", "micro_batches": 8}, deepspeed=zero)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_gradient_of_zero_is_skipped_and_counted(tmp_path: Path, stage: int) -> None:
    """Held-out rows of one class: the best head says so, whatever the features."""
    values = recipe(tmp_path, stage)
    train = Path(values["tasks"][0]["train"])
    train.write_text("".join(json.dumps({**json.loads(line), "label": 0}) + "\n" for line in train.open()))
    controller, _ = run(tmp_path, values, 4)
    found = controller.values()
    assert found["meta/skipped"] == 2
    assert found["meta/dev_head_accuracy"] == 1.0
    assert controller.weighting.weights.tolist() == pytest.approx([1 / 6] * 6)
    json.dumps(controller.state(), allow_nan=False)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_held_out_loss_that_is_not_finite_does_no_harm(tmp_path: Path, stage: int, monkeypatch: Any) -> None:
    from trainer.meta.held_out import HeldOut

    refresh = HeldOut.refresh

    def broken(self: HeldOut, number: int, gradient: Any) -> Any:
        seen = refresh(self, number, gradient)
        gradient.pieces()[0][:3] = torch.nan
        return seen

    monkeypatch.setattr(HeldOut, "refresh", broken)
    controller, _ = run(tmp_path, recipe(tmp_path, stage), 4)
    assert controller.values()["meta/skipped"] == 2
    assert controller.weighting.weights.tolist() == pytest.approx([1 / 6] * 6)
    json.dumps(controller.state(), allow_nan=False)


def test_losses_are_weighted_so_that_the_expected_loss_is_the_weighted_sum(tmp_path: Path) -> None:
    """Over many windows the weights of a task's rows add up to its weight, though tasks are drawn by their size."""
    values = recipe(tmp_path, 0, weights="fixed", initial={"topic": 3.0, "same": 2.0}, floor=0.0)
    lines = Path(values["tasks"][1]["train"]).read_text().splitlines()
    values["tasks"][1]["train"] = tiny.write_rows(tmp_path / "more.jsonl", [json.loads(line) for line in lines] * 3)
    controller, job = run(tmp_path, values, 0)
    planner = job.planner(1)
    wanted = controller.weighting.weights
    assert wanted.tolist() == pytest.approx([3 / 9, 2 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9])
    windows = [planner.window(step, 1) for step in range(400)]
    found = sum(w.unit_weights() * w.units * controller.factors() for w in windows) / len(windows)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=0.1)
    assert job.shares[1] > 2 * job.shares[0]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("fit", ["converged", "steps"])
def test_one_batch_and_several_give_the_same_gradient(tmp_path: Path, stage: int, fit: str) -> None:
    """With one, the head is fitted inside the forward whose graph the gradient takes."""
    controller, _ = run(tmp_path, recipe(tmp_path, stage, head={"fit": fit, "l2": 1e-4}), 1)
    held_out, gradient = controller.held_out, controller.gradient
    assert held_out is not None
    assert gradient is not None
    found, batches = [], []
    for held_out.budget in (10**6, 40):
        seen = held_out.refresh(0, gradient)
        batches.append(len(held_out._batches(held_out.held_out, 0)))
        found.append((seen.loss, seen.accuracy, torch.cat(gradient.pieces()).clone()))
    assert batches[0] == 1 < batches[1]
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-5)
    assert float((found[0][2] - found[1][2]).norm()) < 1e-4 * float(found[0][2].norm())
    assert gradient.norm() > 1e-4
