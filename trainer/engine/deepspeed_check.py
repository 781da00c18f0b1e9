"""What a DeepSpeed JSON may contain: every key known, every feature one that Sett's promises survive.

Owns: the checks of one JSON by itself. DeepSpeed accepts unknown keys silently at the top level and inside `optimizer`,
`checkpoint` and other plain sections; its pydantic sections reject them, but only after the processes are up. Both are
found here. Loading the JSON, filling `auto` and comparing with the recipe are `deepspeed_json.py`.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Iterable, Iterator, KeysView
from pathlib import Path
from typing import Any, TypeGuard, get_args

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from trainer.errors import ConfigError, nearest

REFUSED: dict[str, str] = {
    "scheduler": "the schedule is the recipe's: set optimizer.schedule (WarmupLR is 'constant', WarmupDecayLR "
    "'linear', WarmupCosineLR 'cosine') and optimizer.warmup there",
    "pipeline": "pipeline stages see different parameters, and a window needs every rank to run the same ones",
    "tensor_parallel": "Sett shards by ZeRO only; every rank must hold its own micro-batches",
    "expert_parallel": "Sett shards by ZeRO only; every rank must hold its own micro-batches",
    "sequence_parallel_size": "Sett shards by ZeRO only; every rank must hold its own micro-batches",
    "data_parallel_size": "Sett shards by ZeRO only; every rank must hold its own micro-batches",
    "hybrid_engine": "it is for RLHF generation; evaluation decodes through the training engine",
    "data_efficiency": "which rows are drawn is planned by the recipe's sampling and window sections",
    "curriculum_learning": "which rows are drawn is planned by the recipe's sampling and window sections",
    "elasticity": "the batch is the recipe's window at every world size; a run keeps its number of ranks",
    "compile": "DeepCompile reduces gradients on its own path, which excludes the window's accumulation",
    "autotuning": "the autotuner ends the process after profiling",
    "amp": "Apex AMP is gone; use bf16 or fp16",
    "bfloat16": "write the section as 'bf16'",
}
"""Top-level keys that Sett cannot honour, and why."""

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
"""Sections that DeepSpeed itself checks by pydantic."""

PLAIN = (
    "optimizer",
    "checkpoint",
    "data_types",
    "activation_checkpointing",
    "flops_profiler",
    "aio",
    "torch_autocast",
)
"""Sections that DeepSpeed reads key by key, ignoring the rest."""

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Monitor section -> the package it imports, on rank 0 only."""


def check_sections(config: dict[str, Any], source: str) -> None:
    """Refuse what Sett cannot honour, and sections that are not JSON objects, before anything is filled in."""
    for key, why in REFUSED.items():
        if key in config:
            raise ConfigError(f"{source}: '{key}' is not supported: {why}. Remove it from the DeepSpeed JSON.")
    for key in (*(name.split(".")[0] for name in MODELS), *PLAIN):
        if not isinstance(config.get(key, {}), dict):
            remedy = 'write {"stage": 1} for true' if key == "zero_optimization" else "write a section in braces"
            raise ConfigError(f"{source}: {key}: must be a JSON object, got {config[key]!r}; {remedy}.")
    if not isinstance(config.get("optimizer", {}).get("params", {}), dict):
        raise ConfigError(f"{source}: optimizer.params: must be a JSON object.")
    for name, package in MONITORS.items():
        if config.get(name, {}).get("enabled") is True and importlib.util.find_spec(package) is None:
            # Only rank 0 imports it: there it raises, and the other ranks wait for it until the time-out.
            raise ConfigError(
                f"{source}: {name}.enabled needs the package '{package}', which is not installed. "
                f"Run `pip install {package}` on every host, or set {name}.enabled to false."
            )


def check_models(config: dict[str, Any], source: str) -> None:
    """Check the pydantic sections through DeepSpeed's own models, so that the error comes now and names the key."""
    for path, model in MODELS.items():
        section: Any = config
        for part in path.split("."):
            section = section.get(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{source}: {path}: must be a JSON object, got {section!r}.")
        _refuse_deprecated(section, model, f"{source}: {path}")
        try:
            model(strict=True, **section)
        except ValidationError as error:
            raise ConfigError(_explain(error, model, f"{source}: {path}")) from None


def check_known(config: dict[str, Any], source: str) -> None:
    """Find the keys that the installed DeepSpeed never reads: it would ignore them without a word.

    The valid keys are not ours to list: DeepSpeed parses a copy of the JSON that remembers what it was asked for.
    """
    asked = _Asked({k: _Asked(v) if k in PLAIN else v for k, v in config.items()})
    # The rank count is not known to DeepSpeed here, so the product is left for it to work out.
    del asked["train_batch_size"]
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        raise ConfigError(f"{source}: DeepSpeed rejects it: {error.errors()[0]['msg']}.") from None
    except (AssertionError, DeepSpeedConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{source}: DeepSpeed rejects it: {error}") from None
    for path, key, valid in asked.ignored(config):
        where = f"{path}.{key}" if path else key
        raise ConfigError(
            f"{source}: {where}: DeepSpeed has no such key{nearest(key, valid - REFUSED.keys())}; "
            "it would be ignored silently. Correct or remove it."
        )


def optimizer_class(config: dict[str, Any], source: str) -> type[torch.optim.Optimizer]:
    """The class that DeepSpeed will build for `optimizer.type`; an unknown or unsuitable type is an error."""
    name = config["optimizer"].get("type")
    if not isinstance(name, str):
        has = ", ".join(config["optimizer"]) or "nothing"
        raise ConfigError(f"{source}: optimizer.type: missing (the section has {has}); the usual value is 'AdamW'.")
    offloaded = offload_device(config, "offload_optimizer") != "none"
    if name.lower() in ("adam", "adamw") and config["optimizer"].get("params", {}).get("torch_adam") is True:
        return torch.optim.AdamW
    known: dict[str, type[torch.optim.Optimizer]] = {
        "adam": DeepSpeedCPUAdam if offloaded else FusedAdam,
        "adamw": DeepSpeedCPUAdam if offloaded else FusedAdam,
        "lion": DeepSpeedCPULion if offloaded else FusedLion,
        "adagrad": DeepSpeedCPUAdagrad if offloaded else torch.optim.Adagrad,
        "lamb": FusedLamb,
    }
    if name.lower() in known:
        return known[name.lower()]
    if name.lower() == "muon":
        raise ConfigError(
            f"{source}: optimizer.type: Muon is not supported: DeepSpeed's Muon is wrong when gradients are "
            "accumulated over several micro-steps (DeepSpeed issue 8443), as a window does. Use AdamW."
        )
    found = getattr(torch.optim, name, None)
    if name.lower() in DEEPSPEED_OPTIMIZERS or not _is_optimizer(found):
        torch_names = [n for n, c in vars(torch.optim).items() if _is_optimizer(c)]
        names = ["AdamW", "Adam", "Lion", "Adagrad", "Lamb", *torch_names]
        raise ConfigError(f"{source}: optimizer.type: '{name}' is not supported{nearest(name, names)}. Use AdamW.")
    return found


def _is_optimizer(candidate: object) -> TypeGuard[type[torch.optim.Optimizer]]:
    is_class = inspect.isclass(candidate) and issubclass(candidate, torch.optim.Optimizer)
    return is_class and candidate is not torch.optim.Optimizer


def optimizer_keys(cls: type[torch.optim.Optimizer]) -> set[str]:
    """The keys of `optimizer.params` that `cls`, or DeepSpeed on its behalf, accepts."""
    keys = set(inspect.signature(cls).parameters) - {"self", "params", "model_params", "max_grad_norm"}
    if cls in (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam):
        keys -= {"adamw_mode"}  # DeepSpeed passes it itself, from adam_w_mode
        keys |= {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
    return keys


def check_zero(zero: dict[str, Any], source: str) -> None:
    """Refuse ZeRO options that break what Sett promises about a window."""
    where = f"{source}: zero_optimization"
    if zero.get("overlap_comm") is True and zero["stage"] < 2:
        raise ConfigError(
            f"{where}.overlap_comm needs ZeRO stage 2 or 3 here: below, DeepSpeed reduces a window's gradients once, "
            "at its end, so there is nothing to overlap. Remove it, or raise zero_optimization.stage."
        )
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(f"{where}.compute_grad_norm: Sett logs the gradient norm; remove the key.")
    if zero.get("zenflow") is not None:
        raise ConfigError(
            f"{where}.zenflow: ZenFlow applies part of the gradients later, so a window's step would not be its own. "
            "Remove it."
        )
    if zero.get("elastic_checkpoint"):
        raise ConfigError(
            f"{where}.elastic_checkpoint: ignored at stage 3; a run resumes on the number of ranks it started with. "
            "Remove it."
        )


def check_machine(config: dict[str, Any], world_size: int, device: str, source: str) -> None:
    """Refuse what this machine cannot do: offload folders, compiled ops, the number of ranks."""
    zero = config["zero_optimization"]
    for which in ("offload_optimizer", "offload_param"):
        if (target := offload_device(config, which)) == "none":
            continue
        where = f"{source}: zero_optimization.{which}"
        if zero["stage"] != 3 and (target == "nvme" or which == "offload_param"):
            raise ConfigError(f"{where}: device '{target}' needs ZeRO stage 3, but stage is {zero['stage']}.")
        if target == "nvme":
            _check_nvme(zero[which].get("nvme_path"), where)
        if device == "cpu" and zero[which].get("super_offload"):
            raise ConfigError(f"{where}.super_offload needs a GPU; remove it on a CPU box.")
    if device == "cpu":
        for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
            if zero.get(key):
                raise ConfigError(
                    f"{source}: zero_optimization.{key}: its quantizer is CUDA code; use 'cpu' or 'zero3'."
                )
    hpz = int(zero.get("zero_hpz_partition_size", 1))
    if hpz > 1 and world_size % min(hpz, world_size):
        raise ConfigError(
            f"{source}: zero_optimization.zero_hpz_partition_size = {hpz} does not divide the {world_size} ranks. "
            "Set it to the number of GPUs per node ('auto' does)."
        )


def offload_device(config: dict[str, Any], which: str) -> str:
    """`none`, `cpu` or `nvme` for `offload_optimizer` or `offload_param`."""
    section = config.get("zero_optimization", {}).get(which) or {}
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"


def leftover_auto(config: dict[str, Any], path: str = "") -> Iterator[str]:
    """Paths whose value is still `auto`. DeepSpeed drops such keys silently, misspelt ones too."""
    for key, value in config.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from leftover_auto(value, where)
        elif value == "auto" and where != "data_types.keep_in_fp32_modules":
            yield where


class _Asked(dict[str, Any]):
    """A dict that remembers the keys it was asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        nested = {k: _Asked(v) for k, v in values.items() if k in ("writer", "parallel_write") and isinstance(v, dict)}
        super().__init__(values | nested)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> KeysView[str]:  # type: ignore[override]  # `key in d.keys()` must ask us, not the dict
        return KeysView(self)

    def __copy__(self) -> _Asked:
        return self  # DeepSpeed reads a shallow copy

    def ignored(self, given: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, set[str]]]:
        """(path of the section, ignored key, keys DeepSpeed did ask for) of every key of `given` nobody read."""
        for key in given:
            if key not in self.asked:
                yield path, key, self.asked
            elif isinstance(inner := dict.get(self, key), _Asked):
                yield from inner.ignored(given[key], f"{path}.{key}" if path else key)


def _check_nvme(path: Any, where: str) -> None:
    if not path:
        raise ConfigError(f"{where}.nvme_path: missing; name a folder on a fast local disk.")
    if not Path(path).is_dir() or not os.access(path, os.W_OK):
        raise ConfigError(
            f"{where}.nvme_path: '{path}' is not a writable folder on this host. Create it on a fast local disk of "
            "every host, or copy the JSON and edit the path."
        )
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(f"{where}: NVMe offload needs libaio. Install it (Debian: apt install libaio-dev).")


def _fields(model: type[BaseModel]) -> dict[str, str]:
    """Every name under which a field can be written -> the field."""
    names = {name: name for name in model.model_fields}
    return names | {field.alias: name for name, field in model.model_fields.items() if field.alias}


def _refuse_deprecated(section: dict[str, Any], model: type[BaseModel], where: str) -> None:
    """DeepSpeed rewrites these keys while parsing; the checks here look at the ones they turn into."""
    for key in section:
        extra = model.model_fields[key].json_schema_extra if key in model.model_fields else None
        if isinstance(extra, dict) and extra.get("deprecated"):
            raise ConfigError(f"{where}.{key}: deprecated by DeepSpeed; write {extra.get('new_param')} instead.")


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line for the first complaint of pydantic, with the key's path and the nearest valid key."""
    first = error.errors()[0]
    *parents, key = [str(part) for part in first["loc"]] or [""]
    inner = model
    for part in parents:
        name = _fields(inner).get(part)
        nested = _models(inner.model_fields[name].annotation) if name else []
        inner = nested[0] if nested else inner
    path = ".".join(p for p in (where, *parents, key) if p)
    if first["type"] == "extra_forbidden":
        return f"{path}: DeepSpeed has no such key{nearest(key, _fields(inner))}. Correct or remove it."
    return f"{path}: {first['msg']} (got {first['input']!r})."


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as Optional[Model]."""
    candidates: Iterable[Any] = get_args(annotation) or (annotation,)
    return [c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel)]
