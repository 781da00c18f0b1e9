"""From a recipe's `deepspeed` value to the JSON that `deepspeed.initialize` gets.

Owns: finding and reading the JSON, filling `auto` and missing values from the recipe, and refusing a value that both
set differently. A value that only the JSON sets stays, so what the optimizer and the schedule use is what stands in
the resolved JSON (`optimizer.params.lr` and so on), not the recipe's default. The checks of a JSON by itself are
`deepspeed_check.py`.
"""

from __future__ import annotations

import copy
import sysconfig
from pathlib import Path
from typing import Any

import hjson  # type: ignore[import-untyped]
import torch
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from trainer.config.schema import OptimizerConfig, Recipe
from trainer.engine.deepspeed_check import (
    check_known,
    check_machine,
    check_models,
    check_sections,
    check_zero,
    leftover_auto,
    offload_device,
    optimizer_class,
    optimizer_keys,
)
from trainer.errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = (_PACKAGE.parent / "ds_configs", Path(sysconfig.get_path("data")) / "share" / "sett" / "ds_configs")
"""The checkout's, else where a wheel puts them."""

_EXACT: dict[str, Any] = {
    "managed_gradient_accumulation": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
}
"""Keys on which the exact scaling of the window's loss rests: the only value Sett works with."""


def shipped() -> dict[str, Path]:
    """Name -> file of the DeepSpeed JSONs that come with Sett."""
    folder = next((f for f in _SHIPPED if f.is_dir()), None)
    return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.json"))}


def resolve(
    recipe: Recipe,
    world_size: int,
    hidden_size: int,
    device: str,
    base: Path = Path("."),
    run_dir: Path | None = None,
    gpus_per_node: int | None = None,
) -> dict[str, Any]:
    """The complete, checked DeepSpeed JSON for `recipe` on `world_size` ranks of `device` ("cpu" or "cuda").

    `base` is the folder that relative paths count from. With `run_dir`, TensorBoard events go to RUN/tensorboard unless
    the JSON has a `tensorboard` section. `gpus_per_node` fills `zero_hpz_partition_size`; None is what this host has.
    """
    config, source = _load(recipe.deepspeed, base)
    if run_dir is not None:
        config.setdefault("tensorboard", {"enabled": True, "output_path": str(run_dir), "job_name": "tensorboard"})
    check_sections(config, source)
    _fill_batch(config, recipe, world_size, source)
    _fill_zero(config, hidden_size, world_size, device, gpus_per_node, source)
    check_zero(config["zero_optimization"], source)
    _fill_precision(config, recipe, device, source)
    _fill_optimizer(config, recipe, source)
    for path in leftover_auto(config):
        raise ConfigError(f"{source}: {path}: 'auto' has no meaning here; write a value or remove the key.")
    check_models(config, source)
    check_known(config, source)
    check_machine(config, world_size, device, source)
    return config


def stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a resolved JSON."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def precision(config: dict[str, Any]) -> torch.dtype:
    """The dtype in which a resolved JSON keeps the model's parameters."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(name, {}).get("enabled", False):
            return dtype
    return torch.float32


def optimizer_settings(config: dict[str, Any], recipe: Recipe) -> OptimizerConfig:
    """The recipe's `optimizer` section with the values that stand in a resolved JSON.

    Parameter groups carry their own rates, which beat `optimizer.params`: build them from this, or a user's JSON is
    overruled by the recipe's defaults.
    """
    params = config["optimizer"]["params"]
    values = {key: params[key] for key in ("lr", "eps", "weight_decay") if key in params}
    if "betas" in params:
        values["betas"] = tuple(params["betas"])
    return recipe.optimizer.model_copy(update={**values, "clip": config["gradient_clipping"]})


def _load(value: str | dict[str, Any], base: Path) -> tuple[dict[str, Any], str]:
    """The JSON, as a copy that may be changed, and how to call it in messages."""
    if isinstance(value, dict):
        return copy.deepcopy(value), "deepspeed (in the recipe)"
    path = _find(value, base)
    try:
        # DeepSpeed's own reader: a superset of JSON with comments.
        config = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}).") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must hold one JSON object, got {type(config).__name__}.")
    return config, str(path)


def _find(value: str, base: Path) -> Path:
    path = base / Path(value).expanduser()
    if path.is_file():
        return path
    names = shipped()
    if (name := value.removesuffix(".json")) in names:
        return names[name]
    raise ConfigError(
        f"deepspeed: '{value}' is neither a file nor a shipped configuration{nearest(name, names)}. "
        f"Shipped are: {', '.join(names)}; relative paths count from {base.resolve()}."
    )


def _clash(source: str, key: str, has: Any, recipe_key: str, wants: Any) -> ConfigError:
    return ConfigError(
        f"{source}: {key} is {has!r}, but the recipe says {recipe_key} = {wants!r}. "
        f'Write "auto" in the JSON to use the recipe\'s value, or make the two equal.'
    )


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: must be a number or 'auto', got {value!r}.")
    return value


def _fill_batch(config: dict[str, Any], recipe: Recipe, world_size: int, source: str) -> None:
    """Batch numbers and the keys of exact scaling.

    Micro-batches are token-budgeted, so DeepSpeed's row counts mean nothing here: one "row" stands for one micro-batch.
    Sett owns the boundary of the window (unmanaged accumulation), DeepSpeed only needs numbers that fit together.
    These must agree with the recipe even where it leaves its default: the sampler plans by the recipe.
    """
    total = recipe.window.micro_batches
    if total % world_size:
        below = total - total % world_size
        choices = " or ".join(str(n) for n in (below, below + world_size) if n)
        raise ConfigError(
            f"window.micro_batches = {total} cannot be shared evenly by {world_size} ranks. "
            f"Set window.micro_batches to {choices}, or start another number of ranks."
        )
    wanted = {
        "train_micro_batch_size_per_gpu": (1, "window.tokens (micro-batches are counted in tokens, so 1)"),
        "gradient_accumulation_steps": (total // world_size, f"window.micro_batches / {world_size} ranks"),
        "train_batch_size": (total, "window.micro_batches"),
    }
    for key, (value, recipe_key) in wanted.items():
        if config.get(key, "auto") != "auto" and _number(config[key], f"{source}: {key}") != value:
            raise _clash(source, key, config[key], recipe_key, value)
        config[key] = value
    for key, exact in _EXACT.items():
        if config.setdefault(key, exact) != exact:
            raise ConfigError(
                f"{source}: {key} = {config[key]!r} would change how gradients are summed; Sett scales each loss "
                f"exactly and needs {exact!r}. Remove the key."
            )
    clip, clip_is_set = recipe.optimizer.clip, "clip" in recipe.optimizer.model_fields_set
    _fill_number(config, "gradient_clipping", clip, clip_is_set, source, "optimizer.clip")


def _fill_number(section: dict[str, Any], path: str, value: Any, is_set: bool, source: str, recipe_key: str) -> None:
    """Fill `auto` or a missing value; keep the JSON's own unless the recipe explicitly says otherwise."""
    key = path.rpartition(".")[2]
    has = section.get(key, "auto")
    if has == "auto":
        section[key] = value
        return
    if isinstance(has, list) != isinstance(value, list) or (isinstance(has, list) and len(has) != len(value)):
        raise ConfigError(f"{source}: {path}: must look like {value!r} or be 'auto', got {has!r}.")
    for part in has if isinstance(has, list) else [has]:
        _number(part, f"{source}: {path}")
    if is_set and has != value:
        raise _clash(source, path, has, recipe_key, value)


def _fill_precision(config: dict[str, Any], recipe: Recipe, device: str, source: str) -> None:
    """Choose fp32, bf16 or fp16: the JSON's word, else the recipe's, else bf16 on GPUs that have it."""
    says = {name: config.get(name, {}).get("enabled", "auto") for name in ("bf16", "fp16")}
    for name, value in says.items():
        if value not in (True, False, "auto"):
            raise ConfigError(f"{source}: {name}.enabled: must be true, false or 'auto', got {value!r}.")
    on = [name for name, value in says.items() if value is True]
    if len(on) == 2:
        raise ConfigError(f"{source}: bf16.enabled and fp16.enabled are both true; choose one.")
    wanted = recipe.training.precision
    if on and wanted not in ("auto", on[0]):
        raise _clash(source, f"{on[0]}.enabled", True, "training.precision", wanted)
    if not on and wanted in says and says[wanted] is False:
        raise _clash(source, f"{wanted}.enabled", False, "training.precision", wanted)
    autocast = config.get("torch_autocast", {}).get("enabled", False)
    if on:
        chosen: str = on[0]
    elif wanted != "auto":
        chosen = wanted
    else:
        chosen = "bf16" if says["bf16"] == "auto" and not autocast and _has_bf16(device) else "fp32"
    if chosen == "fp16" and device == "cpu":
        raise ConfigError(
            f"{source}: fp16 does not work on the CPU: set training.precision to 'bf16' or 'fp32'"
            + (" and fp16.enabled to 'auto' in the JSON." if on else ".")
        )
    for name in says:
        if name in config or name == chosen:
            config.setdefault(name, {})["enabled"] = name == chosen
    if chosen != "fp32" and stage(config) >= 2:
        # DeepSpeed's default sums a window's micro-steps in the low precision itself: over 64 of them that triples the
        # gradient's rounding error. From stage 2 on the fp32 sum is only a shard.
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def _has_bf16(device: str) -> bool:
    """Whether `device` computes in bf16 natively. Without a GPU in sight (a login node) the target is assumed to."""
    if device != "cuda":
        return False
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def _fill_zero(
    config: dict[str, Any], hidden_size: int, world_size: int, device: str, gpus_per_node: int | None, source: str
) -> None:
    """Bucket sizes by the model's width, as Hugging Face does, and what unmanaged accumulation demands."""
    zero = config.setdefault("zero_optimization", {})
    level = zero.setdefault("stage", 0)
    if level not in (0, 1, 2, 3) or isinstance(level, bool):
        raise ConfigError(f"{source}: zero_optimization.stage: must be 0, 1, 2 or 3, got {level!r}.")
    by_width = {
        "reduce_bucket_size": (1, hidden_size * hidden_size),
        "stage3_prefetch_bucket_size": (3, int(0.9 * hidden_size * hidden_size)),
        "stage3_param_persistence_threshold": (3, 10 * hidden_size),
    }
    for key, (lowest, value) in by_width.items():
        if zero.get(key, "auto") == "auto":
            # Filled where missing, too: DeepSpeed's own default, a bucket of 5e8 elements, costs 2 GB a rank.
            zero.pop(key, None)
            zero.update({key: value} if level >= lowest else {})
    if zero.get("overlap_comm") == "auto":
        zero["overlap_comm"] = level >= 2 and device == "cuda"
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = min(world_size, gpus_per_node or torch.cuda.device_count() or 1)


def _fill_optimizer(config: dict[str, Any], recipe: Recipe, source: str) -> None:
    """AdamW by default; its numbers from the recipe where the JSON leaves them open."""
    if "optimizer" not in config:
        # torch's AdamW needs no compiler; an offloaded optimizer wants DeepSpeed's CPU Adam, which is built by g++.
        in_place = offload_device(config, "offload_optimizer") == "none"
        config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True} if in_place else {}}
    params: dict[str, Any] = config["optimizer"].setdefault("params", {})
    cls = optimizer_class(config, source)
    valid = optimizer_keys(cls)
    for key in params:
        if key not in valid:
            raise ConfigError(
                f"{source}: optimizer.params.{key}: {cls.__name__} has no such parameter{nearest(key, valid)}."
            )
    is_adam = {"betas", "eps"} <= valid and "adam" in config["optimizer"]["type"].lower()
    owned: OptimizerConfig = recipe.optimizer
    for key in ("lr", "betas", "eps", "weight_decay"):
        is_set = key in owned.model_fields_set
        if key not in valid:
            if is_set:
                raise ConfigError(
                    f"{source}: optimizer.type is {config['optimizer']['type']}, which has no {key}, but the recipe "
                    f"sets optimizer.{key}. Remove it from the recipe."
                )
            continue
        if key in ("betas", "eps") and key not in params and not is_adam and not is_set:
            continue  # the recipe's defaults are AdamW's
        value = getattr(owned, key)
        value = list(value) if isinstance(value, tuple) else value
        _fill_number(params, f"optimizer.params.{key}", value, is_set, source, f"optimizer.{key}")
    untested = cls not in ZERO_SUPPORTED_OPTIMIZERS and not config.get("zero_allow_untested_optimizer", False)
    if stage(config) and untested:
        raise ConfigError(
            f"{source}: optimizer.type: DeepSpeed has not tested {cls.__name__} with ZeRO. Use AdamW, or accept the "
            "risk with zero_allow_untested_optimizer: true."
        )
