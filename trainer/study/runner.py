"""Running a study: as many runs at once as there is room for, until all are done, the time is up, or someone says stop.

Owns: the loop. It keeps nothing that a later call would need: what is done and what is claimed is in the directories of
the runs. One thread does everything, because a child is told to stop when the thread that made it ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.engine.stop import StopFlag
from trainer.metrics.progress import duration
from trainer.study.claim import BEAT_SECONDS, Claim, Standing, holder
from trainer.study.grid import Run
from trainer.study.machine import Slots
from trainer.study.process import Child
from trainer.study.result import Action, next_action, read_result, store_provenance, store_test

LOG = "study.log"
LOG_LINES = 12
"""Lines of the log shown of a run that fails."""
POLL_SECONDS = 0.2


@dataclass
class Active:
    """A run that this process runs now."""

    run: Run
    claim: Claim
    slot: int
    began: float
    action: Action
    child: Child
    told_to_stop: bool = False


@dataclass
class Tally:
    """What one call has done."""

    finished: list[Run] = field(default_factory=list)
    """By this call."""
    failed: list[Run] = field(default_factory=list)
    stopped: list[Run] = field(default_factory=list)
    elsewhere: list[Run] = field(default_factory=list)
    """Claimed by another study to the end."""


class Runner:
    """Runs the runs of a study that are not done."""

    def __init__(
        self, runs: Sequence[Run], split: str, slots: Slots, limit: float | None, say: Callable[[str], None]
    ) -> None:
        self.split = split
        self.slots = slots
        self.say = say
        self.total = len(runs)
        self.pending = [run for run in runs if next_action(run, split) is not Action.NOTHING]
        self.done = self.total - len(self.pending)
        self.active: list[Active] = []
        self.tally = Tally()
        self.began = time.monotonic()
        self.deadline = self.began + 60 * limit if limit is not None else float("inf")
        self._try_again: dict[Run, float] = {}
        self._held: set[Run] = set()
        self._durations: list[float] = []
        self._next_beat = 0.0
        self._stopping = False

    def work(self) -> Tally:
        """Run until nothing is left to do here; Ctrl-C and SIGTERM stop the runs in order, another Ctrl-C kills."""
        with StopFlag() as stop:
            try:
                while True:
                    self._collect()
                    if stop.raised or time.monotonic() >= self.deadline:
                        self._stop("asked to stop" if stop.raised else "the time is up")
                    else:
                        self._start()
                    if not self.active and (self._stopping or not self._waits()):
                        break
                    self._beat()
                    time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                self.say("killing the runs; what they did since their last checkpoint is lost")
                self.tally.stopped += [active.run for active in self.active]
            finally:
                for active in self.active:
                    active.child.kill()
                    active.claim.release()
        self.tally.elsewhere = [] if self._stopping else self.pending
        return self.tally

    def _start(self) -> None:
        """Fill the free places, in the order of the study."""
        free = [slot for slot in range(len(self.slots.environments)) if slot not in {a.slot for a in self.active}]
        for run in list(self.pending):
            if not free:
                return
            if run.origin is not None and not self._has_origin(run, run.origin):
                continue
            if time.monotonic() < self._try_again.get(run, 0.0):
                continue
            if next_action(run, self.split) is Action.NOTHING:
                self.pending.remove(run)
                self.done += 1
                self.say(f"done by another study: {run.label}")
                continue
            claim = Claim.take(run.directory)
            if isinstance(claim, Standing):
                held = claim is Standing.HELD
                (self._held.add if held else self._held.discard)(run)
                self._try_again[run] = time.monotonic() + (BEAT_SECONDS if held else 1.0)
                continue
            self.pending.remove(run)
            action = next_action(run, self.split)
            if action is Action.NOTHING:  # finished between the look and the claim
                claim.release()
                self.done += 1
                continue
            slot = free.pop(0)
            child = self._launch(run, action, slot)
            self.active.append(Active(run, claim, slot, time.monotonic(), action, child))
            self.say(f"started  {run.label}  ({self._numbers()})")

    def _has_origin(self, run: Run, origin: Run) -> bool:
        """Whether the run that `run` starts from is finished; where that has failed, `run` fails with it."""
        if next_action(origin, self.split) is Action.NOTHING:
            return True
        if origin in self.tally.failed:
            self.pending.remove(run)
            self.tally.failed.append(run)
            self.say(f"FAILED   {run.label}: not started, because {origin.label} has failed")
        elif origin in self._held:  # with another study: neither is waited for
            self._held.add(run)
        return False

    def _launch(self, run: Run, action: Action, slot: int) -> Child:
        sett = [sys.executable, "-m", "trainer.cli"]
        ranks = ["--num-gpus", str(self.slots.ranks)]
        if action is Action.TRAIN:
            command = [*sett, "train", str(run.recipe_path), *run.overrides, *ranks]
        else:
            command = [*sett, "eval", str(run.directory), "--split", "test", "--task", run.task, *ranks]
        return Child(command, run.directory, log_of(run), self.slots.environments[slot])

    def _collect(self) -> None:
        """Go on with the runs whose process has ended."""
        for active in list(self.active):
            code = active.child.poll()
            if code is None:
                continue
            run = active.run
            if active.action is Action.TEST and code == 0:
                store_test(run)
            action = next_action(run, self.split)
            if code == 0 and action not in (active.action, Action.NOTHING) and not active.told_to_stop:
                active.action, active.child = action, self._launch(run, action, active.slot)
                continue
            if action is Action.NOTHING:
                store_provenance(run.directory)
                self._finished(active)
            elif active.told_to_stop or code == 0:
                self.tally.stopped.append(run)
                self.say(f"stopped  {run.label}; the next call goes on with it")
            else:
                self._failed(active, code)
            active.claim.release()
            self.active.remove(active)

    def _finished(self, active: Active) -> None:
        took = time.monotonic() - active.began
        self._durations.append(took)
        self.tally.finished.append(active.run)
        self.done += 1
        result = read_result(active.run, self.split)
        number = f"{result.metric} {result.value:.4f} " if result is not None and result.value is not None else ""
        self.say(f"finished {active.run.label}  {number}in {duration(took)}  ({self._numbers()})")

    def _failed(self, active: Active, code: int) -> None:
        self.tally.failed.append(active.run)
        lines = active.child.last_lines(LOG_LINES)
        self.say(f"FAILED   {active.run.label}, exit code {code}; the end of {log_of(active.run)}:")
        for line in lines:
            self.say(f"    {line}")

    def _numbers(self) -> str:
        """`3 of 20 done, 0:10:00, about 0:50:00 left`."""
        text = f"{self.done} of {self.total} done, {duration(time.monotonic() - self.began)}"
        if not self._durations:
            return text
        mean = sum(self._durations) / len(self._durations)
        running = sum(max(0.0, mean - (time.monotonic() - active.began)) for active in self.active)
        left = (running + mean * len(self.pending)) / len(self.slots.environments)
        return f"{text}, about {duration(left)} left"

    def _stop(self, why: str) -> None:
        if not self._stopping and self.active:
            self.say(f"{why}: {len(self.active)} runs save a checkpoint and end (Ctrl-C twice kills them)")
        self._stopping = True
        for active in self.active:
            if not active.told_to_stop:
                active.told_to_stop = True
                active.child.stop()

    def _beat(self) -> None:
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + BEAT_SECONDS
        for active in self.active:
            if not active.claim.beat() and not active.told_to_stop:
                self.say(
                    f"{active.run.label}: the claim has gone to {holder(active.run.directory) or 'nobody'}; stopping"
                )
                active.told_to_stop = True
                active.child.stop()

    def _waits(self) -> bool:
        """Whether a pending run may still become ours: one that another study holds is not waited for."""
        return any(run not in self._held for run in self.pending)


def log_of(run: Run) -> Path:
    """What the run's processes print."""
    return run.directory / LOG
