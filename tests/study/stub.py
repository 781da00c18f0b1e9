"""Runs without a model: a script stands for `sett train`, so that the loop around it is tested in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.config import recipe_from
from trainer.study.grid import Run
from trainer.study.process import Child
from trainer.study.result import Action
from trainer.study.runner import Runner, log_of

SCRIPT = Path(__file__).with_name("stub_train.py")


def stub_runs(folder: Path, seeds: int = 2, arms: tuple[str, ...] = ("one", "other")) -> list[Run]:
    runs = []
    for seed in range(seeds):
        for arm in arms:
            values = {
                "model": {"path": "any"},
                "tasks": ["any"],
                "output": str(folder / "t" / arm),
                "name": f"seed-{seed}",
            }
            runs.append(Run("t", arm, seed, folder / "none.yaml", (), recipe_from(values)))
    return runs


class StubRunner(Runner):
    """`codes` are exit codes by label, of runs that fail half-way."""

    seconds = 0.5
    codes: dict[str, int] = {}  # noqa: RUF012

    def _launch(self, run: Run, action: Action, slot: int) -> Child:
        code = str(self.codes.get(run.label, 0))
        command = [sys.executable, str(SCRIPT), str(run.directory), run.task, str(self.seconds), code]
        return Child(command, run.directory, log_of(run), self.slots.environments[slot])
