"""A started DeepSpeed engine and what this rank knows of the others.

Owns: `Session`: distributed start, building the model under ZeRO, `deepspeed.initialize`, and the two facts about
ZeRO that training must not forget (who scales gradients, and stale partitions).
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config.schema import Recipe
from trainer.engine import deepspeed_json
from trainer.engine.stale_locks import clear_stale_locks
from trainer.errors import RunError
from trainer.model.backbone import load_config
from trainer.model.multitask import MultiTaskModel, build_model
from trainer.tasks.spec import TaskSpec

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a rank waits for the others before it gives up: evaluation of one slow rank must fit."""


_TRAINING_KEYS = ("optimizer", "tensorboard", "wandb", "csv_monitor", "comet")
"""Keys of the JSON that evaluation has no use for."""


@dataclass
class Session:
    """One rank's view of the running engine."""

    engine: Any
    model: MultiTaskModel
    config: dict[str, Any]
    rank: int
    world_size: int
    device: torch.device

    @property
    def stage(self) -> int:
        return deepspeed_json.stage(self.config)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's part of the window's loss.

        DeepSpeed averages gradients over ranks and would divide by its accumulation steps; the window's denominator is
        already in the loss, so the first is undone here and the second switched off.
        """
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def forward_aside(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The model's forward without DeepSpeed, which replicated weights (ZeRO 0 to 2) allow."""
        autocast = self.config.get("torch_autocast", {})
        dtype = getattr(torch, str(autocast.get("dtype", "bfloat16")))
        with torch.autocast(self.device.type, dtype, enabled=bool(autocast.get("enabled", False))):
            output: dict[str, Tensor] = self.model(*args, **kwargs)
        return output

    def loss_scale(self) -> float:
        """What fp16 training multiplies losses by; 1 in other precisions."""
        optimizer = self.engine.optimizer
        holder = getattr(optimizer, "loss_scale_config", optimizer)  # ZeRO's own has it itself
        return float(getattr(holder, "cur_scale", 1.0))

    def clear_gradients(self) -> None:
        """Forget what backwards since the last step have accumulated."""
        self.engine.optimizer.zero_grad()
        self._zero_buffer()

    def step(self) -> None:
        """Clip, update, clear gradients."""
        self.engine.step()
        self._zero_buffer()

    def _zero_buffer(self) -> None:
        # ZeRO-3 hands the optimizer every parameter's partitioned gradient buffer but overwrites only those that got
        # a gradient: what is left from the last window would be applied again (reference: stage3.py never zeroes it).
        # The model touches every parameter in every micro-batch; this guards what it cannot know about.
        buffer = getattr(self.engine.optimizer, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()

    def gradient_norm(self) -> float:
        """Norm of the last window's gradient before clipping; NaN where DeepSpeed does not keep it."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def set_learning_rates(self, factor: float) -> None:
        """Scale every group's peak learning rate."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def learning_rates(self) -> dict[str, float]:
        """Current learning rate by parameter group."""
        return {group["name"]: float(group["lr"]) for group in self.engine.optimizer.param_groups}

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(values)
        return values

    def agree(self, *flags: bool) -> list[bool]:
        """Each flag, raised if any rank raised it. Every rank must call it at the same place."""
        values = torch.tensor([float(f) for f in flags], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(v) for v in values.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank, in rank order."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered


def init_distributed() -> tuple[int, int, torch.device]:
    """Join the process group the launcher describes; alone when there is none. Returns rank, world size, device."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        from trainer.engine.launch import free_port

        os.environ["MASTER_PORT"] = str(free_port())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        clear_stale_locks()
        with contextlib.redirect_stdout(io.StringIO()):  # each rank prints that its CPU all-reduce is built
            deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
        if device.type == "cpu":
            _unlink_shared_memory()
    return dist.get_rank(), dist.get_world_size(), device


def _unlink_shared_memory() -> None:
    """Leave nothing of DeepSpeed's CPU all-reduce in /dev/shm, however the rank ends.

    It maps 66 MiB a rank under a name with the port in it and never unlinks it, so every run would keep that much of
    the machine's memory until reboot, and the next one on the same port could open it. Mapped memory outlives its name.
    """
    dist.barrier()  # until every rank has mapped every other's
    place = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{dist.get_rank()}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{place}").unlink(missing_ok=True)


def start(
    recipe: Recipe,
    tasks: Sequence[TaskSpec],
    run_dir: Path | None,
    random_weights: Path | None,
    weights: dict[str, Tensor] | None = None,
    begin: Callable[[MultiTaskModel, torch.device], None] | None = None,
) -> Session:
    """Build the model and its optimizer, sharded as the DeepSpeed JSON says.

    Args:
        recipe: the run.
        tasks: its tasks.
        run_dir: where DeepSpeed's monitor writes; None for evaluation only, which has no optimizer.
        random_weights: folder of a model made from `model.config`, if the recipe has one.
        weights: full weights to evaluate instead of the pretrained ones.
        begin: changes the initial weights, before the optimizer copies and ZeRO shards what is not sharded yet.
    """
    rank, world_size, device = init_distributed()
    hidden = load_config(recipe.model).hidden_size
    if weights is not None:
        # The window's size means nothing here; any number of ranks may evaluate.
        recipe = recipe.model_copy(
            update={"window": recipe.window.model_copy(update={"micro_batches": world_size, "group": None})}
        )
    config = deepspeed_json.resolve(recipe, world_size, hidden, device.type, run_dir=run_dir)
    if weights is not None:
        return _start_evaluation(recipe, tasks, config, random_weights, weights, (rank, world_size, device))
    zero_init = None
    if deepspeed_json.stage(config) == 3:
        from transformers.integrations import HfDeepSpeedConfig

        zero_init = HfDeepSpeedConfig(config)  # while it lives, from_pretrained shards as it loads
    model = build_model(recipe, tasks, random_weights)
    if begin is not None:
        begin(model, device)
    groups = model.parameter_groups(deepspeed_json.optimizer_settings(config, recipe))
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    for group, ours in zip(engine.optimizer.param_groups, groups, strict=True):
        group["peak_lr"], group["name"] = ours["lr"], ours["name"]
    del zero_init
    engine.train()  # transformers hands out models in evaluation mode
    return Session(engine, model, config, rank, world_size, device)


def _start_evaluation(
    recipe: Recipe,
    tasks: Sequence[TaskSpec],
    config: dict[str, Any],
    random_weights: Path | None,
    weights: dict[str, Tensor],
    place: tuple[int, int, torch.device],
) -> Session:
    """An engine without optimizer: ZeRO-3 shards the weights, the other stages have nothing to shard."""
    model = build_model(recipe, tasks, random_weights)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    held = {id(p) for name, p in model.named_parameters() if name in weights}
    # Tied weights stand once in a checkpoint; anything else that is missing is a damaged one.
    if lost := [n for n, p in model.named_parameters(remove_duplicate=False) if n in missing and id(p) not in held]:
        raise RunError(f"the checkpoint lacks weights of the model ({', '.join(lost[:3])}, ...)")
    config = {k: v for k, v in config.items() if k not in _TRAINING_KEYS}
    if deepspeed_json.stage(config) < 3:
        config["zero_optimization"] = {"stage": 0}
    engine, _, _, _ = deepspeed.initialize(model=model, config=config)
    return Session(engine, model, config, *place)
