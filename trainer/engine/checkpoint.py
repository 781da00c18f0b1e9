"""Checkpoints of a run: what is in them, which are kept, which is resumed from.

Owns: RUN/checkpoints. DeepSpeed writes weights and optimizer shards; beside them stands `sett.json`, written last: a
folder without it is an unfinished checkpoint and is never resumed from. The sampler, the schedule and dropout are pure
functions of the step, so the step is all the state there is beyond the engine's.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine.session import Session
from trainer.errors import RunError

MARKER = "sett.json"


@dataclass(frozen=True)
class RunState:
    """What a run knows at a window boundary, the same on every rank."""

    step: int
    """Windows done."""
    world_size: int
    zero_stage: int
    group: int
    """`window.group`: the world size of the first start unless the recipe sets it."""
    best_step: int = -1
    """Step of the best evaluation so far, -1 before the first."""
    best_value: float = 0.0
    waited: int = 0
    """Evaluations since the best one."""
    finished: bool = False
    meta: dict[str, Any] | None = None
    """The task weights and what they are learned from (`trainer.meta.Controller.state`)."""


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, keep_last: int, keep_best: bool) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep_last = keep_last
        self.keep_best = keep_best

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.parent.name.removeprefix("step-")) for p in self.folder.glob(f"step-*/{MARKER}"))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def state(self, step: int) -> RunState:
        """The state stored with the checkpoint of `step`.

        Raises:
            RunError: its marker is damaged.
        """
        path = self.path(step) / MARKER
        try:
            return RunState(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(
                f"{path}: damaged checkpoint ({error}); delete {path.parent} to resume from the one before"
            ) from error

    def save(self, session: Session, state: RunState, held_out: Sequence[Tensor] = ()) -> None:
        """Save on all ranks; the checkpoint exists once its marker does. `held_out`: this rank's held-out gradient."""
        path = self.path(state.step)
        if session.is_first:
            shutil.rmtree(path, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        session.engine.save_checkpoint(
            str(self.folder), tag=path.name, client_state={"sett": asdict(state)}, save_latest=False
        )
        if held_out:
            torch.save(list(held_out), self._held_out(state.step, session.rank))
        dist.barrier()
        if session.is_first:
            temporary = path / (MARKER + ".tmp")
            temporary.write_text(json.dumps(asdict(state), indent=1) + "\n")
            os.replace(temporary, path / MARKER)
            self._prune(state)
        dist.barrier()

    def load(self, session: Session, step: int) -> RunState:
        """Restore the engine from the checkpoint of `step`.

        Raises:
            RunError: it was written by another number of ranks or ZeRO stage, or cannot be read.
        """
        state = self.state(step)
        for name, saved, now in (
            ("ranks", state.world_size, session.world_size),
            ("ZeRO stage", state.zero_stage, session.stage),
        ):
            if saved != now:
                raise RunError(
                    f"{self.path(step)}: saved with {name} {saved}, but this start has {now}; start with {saved} again"
                )
        loaded, client = session.engine.load_checkpoint(str(self.folder), tag=self.path(step).name)
        if loaded is None or client.get("sett") != asdict(state):
            raise RunError(f"{self.path(step)}: damaged checkpoint; delete it to resume from the one before")
        return state

    def held_out(self, step: int, rank: int) -> list[Tensor]:
        """What `save` was given on this rank."""
        path = self._held_out(step, rank)
        return list(torch.load(path, map_location="cpu")) if path.exists() else []

    def _held_out(self, step: int, rank: int) -> Path:
        return self.path(step) / f"held_out_rank_{rank:05d}.pt"

    def _prune(self, state: RunState) -> None:
        steps = self.steps()
        keep = set(steps[-self.keep_last :])
        if self.keep_best:
            keep.add(state.best_step)
        for step in steps:
            if step not in keep:
                # The marker goes first: a half-deleted checkpoint must not look complete.
                (self.path(step) / MARKER).unlink()
                shutil.rmtree(self.path(step), ignore_errors=True)


def newest(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint of a run; None when it has none."""
    steps = Checkpoints(run_dir, 1, False).steps()
    return steps[-1] if steps else None


def load_weights(folder: Path) -> dict[str, Any]:
    """Full fp32 weights of a checkpoint by the model's own names, gathered from its shards without any rank.

    Raises:
        RunError: the checkpoint cannot be read.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        if list(folder.glob("*zero_pp_rank_*_optim_states.pt")) or list(folder.glob("bf16_zero_*")):
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it reports each shard
                return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))
        # ZeRO 0 does not shard: the weights are in the first rank's file.
        saved = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: value.float() for name, value in saved["module"].items()}
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RunError(f"{folder}: cannot read the checkpoint: {error}") from error
