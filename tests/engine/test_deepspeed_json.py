"""The DeepSpeed JSON: filling, conflicts, unknown keys, and every shipped file that a CPU can run, run for real.

Those runs train a small module for three windows under each JSON; the weights are compared with plain PyTorch in one
process.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from support.ranks import run_ranks
from support.scripts.shipped_jsons import plain_pytorch
from torch import Tensor

from trainer.config.schema import Recipe
from trainer.engine.deepspeed_json import optimizer_settings, precision, resolve, shipped, stage
from trainer.errors import ConfigError

NAMES = ["cpu", "zero1", "zero2", "zero3", "zero3-offload-cpu", "zero3-offload-nvme", "zeropp"]
RUNS: dict[str, str | dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    **{name: name for name in ("cpu", "zero1", "zero2", "zero3")},
}


def recipe(deepspeed: str | dict[str, Any], **sections: Any) -> Recipe:
    return Recipe(model={"path": "unused"}, tasks=["unused"], deepspeed=deepspeed, **sections)


def resolved(
    deepspeed: str | dict[str, Any], device: str = "cpu", world_size: int = 2, **sections: Any
) -> dict[str, Any]:
    return resolve(recipe(deepspeed, **sections), world_size, hidden_size=384, device=device)


# --- filling -------------------------------------------------------------------------------------------------------


def test_shipped_names() -> None:
    assert sorted(shipped()) == sorted(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "zero3-offload-nvme"])
def test_shipped_files_resolve_for_gpus(name: str) -> None:
    config = resolved(name, device="cuda")
    assert json.loads(json.dumps(config)) == config, "must be plain JSON"
    assert stage(config) == int(name[4]) if name[4:5].isdigit() else 3
    assert config["managed_gradient_accumulation"] is False


def test_auto_is_filled_as_hugging_face_does() -> None:
    config = resolved("zero3", device="cuda", optimizer={"lr": 1e-3, "clip": 0.5}, window={"micro_batches": 6})
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 3)
    assert config["train_batch_size"] == 6
    assert config["gradient_clipping"] == 0.5
    params = {"torch_adam": True, "lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01}
    assert config["optimizer"] == {"type": "AdamW", "params": params}
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 384 * 384
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 384 * 384)
    assert zero["stage3_param_persistence_threshold"] == 3840


def test_what_is_missing_is_added() -> None:
    config = resolved({"zero_optimization": {"stage": 3}})
    assert config["optimizer"]["params"]["torch_adam"] is True, "needs no compiler"
    assert config["train_batch_size"] == 8
    assert config["zero_optimization"]["reduce_bucket_size"] == 384 * 384
    assert "stage3_prefetch_bucket_size" not in resolved({"zero_optimization": {"stage": 2}})["zero_optimization"]
    assert resolved({})["zero_optimization"] == {"stage": 0}


def test_offloaded_optimizer_is_deepspeeds_own() -> None:
    config = resolved({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert "torch_adam" not in config["optimizer"]["params"]


def test_the_recipe_and_its_json_stay_as_they_were() -> None:
    given = {"zero_optimization": {"stage": 1}, "gradient_clipping": "auto"}
    before = json.dumps(given)
    resolved(given)
    assert json.dumps(given) == before


def test_tensorboard_goes_to_the_run_unless_the_json_says_otherwise(tmp_path: Path) -> None:
    config = resolve(recipe("cpu"), 2, 384, "cpu", run_dir=tmp_path)
    assert config["tensorboard"] == {"enabled": True, "output_path": str(tmp_path), "job_name": "tensorboard"}
    own = {"tensorboard": {"enabled": False}}
    assert resolve(recipe(own), 2, 384, "cpu", run_dir=tmp_path)["tensorboard"] == {"enabled": False}
    assert "tensorboard" not in resolved("cpu")


def test_a_path_counts_from_base_and_may_hold_comments(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{\n  // ours\n  "gradient_clipping": 0.25\n}')
    config = resolve(recipe("mine.json"), 2, 384, "cpu", base=tmp_path)
    assert config["gradient_clipping"] == 0.25


def test_hpz_is_the_gpus_of_a_node() -> None:
    config = resolve(recipe("zeropp", window={"micro_batches": 16}), 16, 384, "cuda", gpus_per_node=8)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 8


# --- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted", "device", "dtype"),
    [
        ({}, "auto", "cpu", torch.float32),
        ({}, "bf16", "cpu", torch.bfloat16),
        ({}, "fp16", "cuda", torch.float16),
        ({}, "fp32", "cuda", torch.float32),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "fp16", "cuda", torch.float16),
        ({"bf16": {"enabled": True}}, "auto", "cpu", torch.bfloat16),
        ({"bf16": {"enabled": False}}, "auto", "cuda", torch.float32),
        ({"fp16": {"loss_scale": 128}}, "fp16", "cuda", torch.float16),
    ],
)
def test_precision(given: dict[str, Any], wanted: str, device: str, dtype: torch.dtype) -> None:
    config = resolved(given, device=device, training={"precision": wanted})
    assert precision(config) == dtype
    enabled = [n for n in ("bf16", "fp16") if config.get(n, {}).get("enabled") is True]
    assert enabled == {torch.bfloat16: ["bf16"], torch.float16: ["fp16"]}.get(dtype, [])


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_low_precision_sums_a_window_in_fp32(name: str) -> None:
    assert resolved(name, training={"precision": "bf16"})["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in resolved(name)


# --- conflicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sections", "names"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, {"optimizer": {"lr": 1e-4}}, ["3e-05", "0.0001"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}},
            {"optimizer": {"betas": (0.9, 0.98)}},
            ["[0.9, 0.999]", "[0.9, 0.98]"],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-8}}}, {"optimizer": {"eps": 1e-6}}, ["1e-08", "1e-06"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}},
            {"optimizer": {"weight_decay": 0.01}},
            ["0.1", "0.01"],
        ),
        (
            {"gradient_clipping": 2.0},
            {"optimizer": {"clip": 1.0}},
            ["gradient_clipping", "2.0", "optimizer.clip", "1.0"],
        ),
        ({"gradient_accumulation_steps": 2}, {}, ["gradient_accumulation_steps", "window.micro_batches", "4"]),
        ({"train_micro_batch_size_per_gpu": 16}, {}, ["window.tokens"]),
        ({"train_batch_size": 32}, {}, ["window.micro_batches"]),
        ({"bf16": {"enabled": True}}, {"training": {"precision": "fp32"}}, ["bf16.enabled", "training.precision"]),
        ({"bf16": {"enabled": False}}, {"training": {"precision": "bf16"}}, ["bf16.enabled", "training.precision"]),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, ["bf16.enabled", "fp16.enabled"]),
    ],
)
def test_two_values_for_one_thing_are_an_error_naming_both(
    given: dict[str, Any], sections: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(given, **sections)
    for name in names:
        assert name in str(error.value)


def test_equal_values_and_unset_defaults_do_not_conflict() -> None:
    given = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.9, 0.999]}}, "gradient_clipping": 2}
    config = resolved(given, optimizer={"lr": 3e-5})
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.999]
    assert config["gradient_clipping"] == 2


def test_parameter_groups_are_built_from_what_stands_in_the_json() -> None:
    given = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.9, 0.999]}}, "gradient_clipping": 2}
    asked = recipe(given, optimizer={"head_lr": 1e-3, "weight_decay": 0.2})
    settings = optimizer_settings(resolve(asked, 2, 384, "cpu"), asked)
    assert (settings.lr, settings.head_lr, settings.weight_decay) == (3e-5, 1e-3, 0.2)
    assert (settings.betas, settings.clip) == ((0.9, 0.999), 2)


@pytest.mark.parametrize(("micro_batches", "ranks", "choices"), [(8, 3, "6 or 9"), (2, 4, "4")])
def test_a_window_that_ranks_cannot_share(micro_batches: int, ranks: int, choices: str) -> None:
    with pytest.raises(ConfigError, match=rf"window.micro_batches = {micro_batches} .* {ranks} ranks.* to {choices},"):
        resolved("cpu", world_size=ranks, window={"micro_batches": micro_batches})


# --- what a JSON may not contain -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "path", "meant"),
    [
        ({"gradient_clippping": 1.0}, "gradient_clippping", "gradient_clipping"),
        ({"checkpoint": {"load_univ": True}}, "checkpoint.load_univ", "load_universal"),
        ({"checkpoint": {"writer": {"tpe": "x"}}}, "checkpoint.writer.tpe", "type"),
        ({"optimizer": {"type": "AdamW", "param": {}}}, "optimizer.param", "params"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decy": 0}}}, "params.weight_decy", "weight_decay"),
        ({"optimizer": {"type": "Adamv"}}, "optimizer.type", "Adam"),
        ({"zero_optimization": {"stagee": 3}}, "zero_optimization.stagee", "stage"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memori": True}}},
            "zero_optimization.offload_optimizer.pin_memori",
            "pin_memory",
        ),
        ({"bf16": {"enable": True}}, "bf16.enable", "enabled"),
        ({"csv_monitor": {"enabled": False, "jobname": "x"}}, "csv_monitor.jobname", "job_name"),
        ({"comms_logger": {"enabled": True, "verbos": True}}, "comms_logger.verbos", "verbose"),
        ({"flops_profiler": {"enable": True}}, "flops_profiler.enable", "enabled"),
        ({"activation_checkpointing": {"profil": True}}, "activation_checkpointing.profil", "profile"),
        ({"timers": {"throughput": {"enable": True}}}, "timers.throughput.enable", "enabled"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(given: dict[str, Any], path: str, meant: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(given)
    assert path in str(error.value)
    assert f"did you mean '{meant}'?" in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"scheduler": {"type": "WarmupLR"}}, "optimizer.schedule"),
        ({"elasticity": {"enabled": True}}, "keeps its number of ranks"),
        ({"data_efficiency": {"enabled": True}}, "sampling"),
        ({"curriculum_learning": {"enabled": True}}, "sampling"),
        ({"compile": {"deepcompile": True}}, "DeepCompile"),
        ({"optimizer": {"type": "Muon"}}, "Muon"),
        ({"optimizer": {"type": "MuAdam"}}, "MuAdam"),
        ({"optimizer": {}}, "optimizer.type: missing"),
        ({"prescale_gradients": True}, "prescale_gradients"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({"managed_gradient_accumulation": True}, "managed_gradient_accumulation"),
        ({"zero_optimization": True}, "JSON object"),
        ({"zero_optimization": {"stage": 4}}, "stage"),
        ({"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": True}}, "stage: must be 0, 1, 2 or 3"),
        ({"timers": {"throughput": True}}, "timers.throughput: must be a JSON object"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "optimizer.params.betas: must look like"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm needs ZeRO stage 2"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "ZenFlow"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": "auto"}}, "'auto' has no meaning"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage 3"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "SGD"}}, "zero_allow_untested_optimizer"),
        ({"nebula": {"enabled": True}}, "Nebula"),
        ({"gradient_clipping": "1.0"}, "number"),
        ({"communication_data_type": "fp8"}, "communication_data_type"),
    ],
)
def test_what_would_break_a_promise_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(given)
    assert words in str(error.value)
    assert "deepspeed (in the recipe)" in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("comet_ml") is not None, reason="comet_ml is installed")
def test_a_monitor_whose_package_is_missing() -> None:
    with pytest.raises(ConfigError, match="pip install comet_ml"):
        resolved({"comet": {"enabled": True}})


def test_fp16_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="'bf16' or 'fp32'"):
        resolved("zero2", training={"precision": "fp16"})
    with pytest.raises(ConfigError, match=r"fp16\.enabled to 'auto'"):
        resolved({"fp16": {"enabled": True}})


def test_zeropp_on_a_cpu_and_on_ranks_it_cannot_split() -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        resolved("zeropp")
    uneven = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    with pytest.raises(ConfigError, match="does not divide the 6 ranks"):
        resolved(uneven, device="cuda", world_size=6, window={"micro_batches": 6})


def test_nvme_needs_its_folder_and_libaio(tmp_path: Path) -> None:
    config = json.loads(shipped()["zero3-offload-nvme"].read_text())
    offload = config["zero_optimization"]["offload_optimizer"]
    offload["nvme_path"] = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match="not a writable folder"):
        resolved(config)
    offload["nvme_path"] = str(tmp_path)
    if AsyncIOBuilder().is_compatible(verbose=False):
        assert stage(resolved(config)) == 3
    else:
        with pytest.raises(ConfigError, match="libaio"):
            resolved(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1, 2]", "one JSON object"), ('{"a": 1, "a": 2}', "Duplicate"), ('{"a": [1, 2', "mine.json:1: not valid JSON")],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        resolve(recipe("mine.json"), 2, 384, "cpu", base=tmp_path)
    assert words in str(error.value)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'zero3'.*zero3-offload-cpu"):
        resolved("zero33")


# --- every shipped file that a CPU can run, on two real ranks ------------------------------------------------------


def train(names: list[str], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Train under each named JSON in one start of the real launcher; the weights every rank ended with."""
    jsons = {name: RUNS.get(name, name) for name in names}
    first, second = run_ranks("shipped_jsons.py", 2, folder, json.dumps(jsons))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.keys() == jsons.keys()
    return first


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    return train(list(RUNS), tmp_path_factory.mktemp("runs"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_plain_pytorch(weights: dict[str, dict[str, Tensor]], name: str) -> None:
    torch.testing.assert_close(weights[name], plain_pytorch(), rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed's CPU Adam is compiled by g++, which is missing")
def test_two_ranks_with_offload_equal_plain_pytorch(tmp_path: Path) -> None:
    trained = train(["zero3-offload-cpu"], tmp_path)["zero3-offload-cpu"]
    torch.testing.assert_close(trained, plain_pytorch(), rtol=1e-5, atol=1e-6)
