"""How many runs this machine takes at once, and what each of them gets of it.

Owns: the rule. With GPUs: a run has as many GPUs as it has ranks, and nobody else has them. Without: two cores a rank,
as far as the free memory reaches; the cores are shared out evenly as threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from trainer.config import Recipe
from trainer.config.mixture import tasks_of
from trainer.engine.deepspeed_json import resolve
from trainer.errors import ConfigError
from trainer.model.multitask import sizes
from trainer.run.memory import estimate
from trainer.study.grid import Run

CORES_A_RANK = 2
PROCESS_BYTES = 1.5 * 2**30
"""A rank without its states: interpreter, libraries, activations of a small micro-batch."""


@dataclass(frozen=True)
class Slots:
    """Room for runs: the environment of each place."""

    ranks: int
    environments: tuple[dict[str, str], ...]


def choose_slots(runs: Sequence[Run], jobs: int | None, ranks: int) -> Slots:
    """Places for `jobs` runs at once of `ranks` ranks each; None fits them to the machine.

    Raises:
        ConfigError: there are fewer GPUs than that, or they are not named by number.
    """
    for option, number in (("--jobs", jobs), ("--ranks", ranks)):
        if number is not None and number < 1:
            raise ConfigError(f"{option}: {number}; at least 1 is needed")
    if gpus := visible_gpus():
        return gpu_slots(gpus, jobs, ranks)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        need = max(run_bytes(recipe, ranks) for recipe in _one_a_model(runs))
        jobs = cpu_jobs(cores, psutil.virtual_memory().available, ranks, need)
    return cpu_slots(cores, jobs, ranks)


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return chosen.split(",")[:count] if chosen else [str(index) for index in range(count)]


def gpu_slots(gpus: Sequence[str], jobs: int | None, ranks: int) -> Slots:
    """One place for every `ranks` GPUs."""
    if not all(name.isdigit() for name in gpus):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES: '{','.join(gpus)}' must name GPUs by number; DeepSpeed takes no other"
        )
    most = len(gpus) // ranks
    if most < (jobs or 1):
        raise ConfigError(f"{jobs or 1} runs of {ranks} ranks need {(jobs or 1) * ranks} GPUs; there are {len(gpus)}")
    shares = [gpus[index * ranks : (index + 1) * ranks] for index in range(jobs or most)]
    return Slots(ranks, tuple({"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares))


def cpu_jobs(cores: int, free: float, ranks: int, need: float) -> int:
    """Runs at once on a CPU: limited by cores and by free memory, `need` bytes a run."""
    return max(1, min(cores // (CORES_A_RANK * ranks), int(free // need)))


def cpu_slots(cores: int, jobs: int, ranks: int) -> Slots:
    """`jobs` places with the same number of threads, unless the user has said how many."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // (jobs * ranks)))
    return Slots(ranks, ({"OMP_NUM_THREADS": threads},) * jobs)


def run_bytes(recipe: Recipe, ranks: int) -> float:
    """Memory of a run on a CPU: its model's states, sharded as its DeepSpeed configuration says, and its processes."""
    measured = sizes(recipe, tasks_of(recipe))
    config = resolve(recipe, ranks, hidden_size=measured.hidden_size, device="cpu")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    rows = estimate(measured.parameters, measured.largest_layer, ranks, ranks)
    return float(ranks * (max(row.gpu + row.cpu for row in rows if row.stage == stage) + PROCESS_BYTES))


def _one_a_model(runs: Sequence[Run]) -> list[Recipe]:
    """A recipe of every arm and model; seeds and judged tasks hardly change the model's size."""
    recipes = [(run.arm, recipe) for run in runs for recipe in run.stages]
    return list({(arm, str((recipe.model, recipe.deepspeed))): recipe for arm, recipe in recipes}.values())
