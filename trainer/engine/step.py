"""One optimizer step, readable as the algorithm.

Owns: `run_window`: the only place where a forward, a backward and an update meet.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batch import Collator
from trainer.engine.alignment import HeldOutGradient
from trainer.engine.session import Session
from trainer.errors import RunError
from trainer.model.shake import Shake
from trainer.window import MicroBatch, Window
from trainer.window.hashing import seed32


@dataclass
class Totals:
    """What windows add up to, over this rank's micro-batches only."""

    task_loss: Tensor
    """[T] fp64: this rank's part of the objective, by task."""
    r3f: Tensor
    """fp64: this rank's part of R3F's divergences, which are beside `task_loss`."""
    real_tokens: int = 0
    padded_tokens: int = 0

    @classmethod
    def zero(cls, tasks: int, device: torch.device | str = "cpu") -> Totals:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(torch.zeros(tasks, dtype=torch.float64, device=device), zero)

    def add(self, output: dict[str, Tensor]) -> None:
        """Add a micro-batch; nothing is read back from the device."""
        self.task_loss += output["by_task"]
        self.r3f += output["r3f"]


def run_window(
    session: Session, window: Window, collator: Collator, seed: int, lr_factor: float, stop: bool,
    factors: NDArray[np.float64] | None = None, held_out: HeldOutGradient | None = None, shake: Shake | None = None,
) -> tuple[Totals, bool]:  # fmt: skip
    """Forward and backward of this rank's micro-batches, then one update of all ranks.

    Args:
        session: the engine.
        window: the plan of this step.
        collator: makes the batches.
        seed: of the run; dropout is seeded by (seed, step, micro-batch), so it needs no saved generator.
        lr_factor: of the schedule.
        stop: this rank was asked to stop.
        factors: [T] what each task's loss is multiplied by.
        held_out: what the gradients of the micro-steps are read against.
        shake: a second pass with noise (R3F).

    Returns:
        What the window adds to the log, and whether any rank was asked to stop.

    Raises:
        RunError: a loss is NaN or infinite, on every rank and before the update.
    """
    totals = Totals.zero(len(collator.views), session.device)
    weights = window.unit_weights() if factors is None else window.unit_weights() * factors
    losses = []
    with nullcontext() if held_out is None else held_out.reading():
        for micro_step in window.micro_steps:
            micro = micro_step[session.rank]
            batch = collator(micro.tasks, micro.rows, micro.epochs, weights)
            totals.real_tokens += batch.real_tokens
            totals.padded_tokens += batch.padded_tokens
            batch = batch.to(session.device)
            mine = seed32(seed, window.step, micro.index)
            torch.manual_seed(mine)
            output = session.engine(batch, shake=None if shake is None else replace(shake, seed=mine))
            session.backward(output["loss"])
            if held_out is not None:
                held_out.after_backward()
            totals.add(output)
            losses.append(output["loss"].detach())
    bad = [k for k, loss in enumerate(torch.stack(losses).tolist()) if not math.isfinite(loss)]
    any_bad, any_stop = session.agree(bool(bad), stop)
    if any_bad:
        here = "; ".join(_describe(window.micro_steps[k][session.rank], collator) for k in bad)
        places = "; ".join(place for place in session.gather(here) if place)
        raise RunError(
            f"window {window.step}: the loss is not finite ({places}); the weights were not updated. "
            "Lower optimizer.lr, or look at these rows"
        )
    session.set_learning_rates(lr_factor)
    session.step()
    return totals, any_stop


def _describe(micro: MicroBatch, collator: Collator) -> str:
    names = sorted({collator.views[t].spec.name for t in micro.tasks.tolist()})
    return f"{', '.join(names)}: rows {micro.rows.tolist()[:8]}{' ...' if len(micro.rows) > 8 else ''}"
