"""Where a model comes from: its folder, its config, its tokenizer.

Owns: `resolve_path`, `load_config`, `load_tokenizer`, `model_kind`, `read_tensors`. Whatever a recipe names, the rest
of the code sees a local folder in `save_pretrained` form; nothing here allocates a model.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from trainer.errors import ModelError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.config.schema import ModelConfig

Kind = Literal["encoder", "encoder-decoder", "decoder"]

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHT_FILES = ["*.safetensors", "pytorch_model*.bin"]


def resolve_path(path: str, weights: bool = True) -> str:
    """The local folder behind a local path, a hub name or `package:NAME`; hub files are downloaded once.

    Args:
        path: what the recipe says.
        weights: also download the weights of a hub model (a tokenizer does without).
    """
    if path.startswith("package:"):
        return _package_folder(path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if not _HUB_NAME.fullmatch(path) or folder.exists():
        raise ModelError(f"model '{path}': no such folder; give a `save_pretrained` folder, a hub name or package:NAME")
    return _hub_folder(path, weights)


def _package_folder(path: str) -> str:
    name = path.removeprefix("package:")
    # A dotted name would import the parent package: only top-level packages are looked up, and none is imported.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model '{path}': no installed Python package '{name}'; install it with pip or correct the name"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (folder / "config.json").is_file():
        raise ModelError(f"model '{path}': the package '{name}' has no model/config.json; it does not carry a model")
    return str(folder)


def _hub_folder(name: str, weights: bool) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    # A repository that has safetensors often has the same weights as .bin again: fetch them only where needed.
    try:
        folder = Path(snapshot_download(name, allow_patterns=_SMALL_FILES + _WEIGHT_FILES[: int(weights)]))
        if weights and not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=_WEIGHT_FILES)
    except HFValidationError as error:
        raise ModelError(f"model '{name}': neither a folder nor a valid hub name: {error}") from error
    except Exception as error:  # the hub client raises errors of several HTTP libraries
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"model '{name}': no such folder here, and it cannot be had from the hub ({reason}); "
            "correct the path, or go online once so that it is cached"
        ) from error
    return str(folder)


def load_config(model: ModelConfig) -> Any:
    """The transformers config of the recipe's model, with the special tokens of the recipe's tokenizer."""
    config, written = _raw_config(model), set(model.config or {})
    tokenizer = load_tokenizer(model)
    if model.config is not None:
        _adopt_tokenizer(config, written, tokenizer)
    # The stock sequence classifiers of decoders find the last token by this id.
    config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"model.tokenizer: it has {len(tokenizer)} tokens, but the model only {config.vocab_size}; "
            "they do not belong together"
        )
    if getattr(config, "classifier_pooling", "cls") != "cls":
        config.classifier_pooling = "cls"  # ModernBERT's stock heads can average too; here all encoders pool alike
    return config


def _raw_config(model: ModelConfig) -> Any:
    if model.config is not None:
        return _written_config(dict(model.config))
    folder = resolve_path(str(model.path), weights=False)
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"model '{model.path}': no config.json in {folder}; it is not a `save_pretrained` folder")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"model '{model.path}': its config.json cannot be read by transformers {transformers.__version__} "
            f"(code from model folders is never run): {error}"
        ) from error


def _written_config(values: dict[str, Any]) -> Any:
    model_type = str(values.pop("model_type"))
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"model.config.model_type: transformers {transformers.__version__} has no '{model_type}'"
            f"{nearest(model_type, CONFIG_MAPPING_NAMES)}"
        )
    default = AutoConfig.for_model(model_type)
    # transformers keeps unknown keys without a word: a typo would silently train another model.
    known = set(default.to_dict()) | set(default.attribute_map)
    for key in values:
        if key not in known and not _is_read(key, type(default).__module__):
            raise ModelError(f"model.config.{key}: not a setting of a '{model_type}' model{nearest(key, known)}")
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # strict dataclasses of huggingface_hub raise classes of their own
        raise ModelError(f"model.config: {error}") from error


def _is_read(key: str, configuration: str) -> bool:
    """Whether the architecture's own code mentions a setting: some have no default and are read when present."""
    modules = [configuration, configuration.replace(".configuration_", ".modeling_")]
    sources = [spec.origin for name in modules if (spec := importlib.util.find_spec(name)) and spec.origin]
    return any(re.search(rf"\b{re.escape(key)}\b", Path(source).read_text("utf-8")) for source in sources)


def _adopt_tokenizer(config: Any, written: set[str], tokenizer: Any) -> None:
    """Give a config written in a recipe the tokenizer's size and special tokens, where the recipe is silent."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    if config.is_encoder_decoder:
        starts_with_pad = hasattr(config, "relative_attention_num_buckets")  # the T5 family
        ids["decoder_start_token_id"] = ids["pad_token_id" if starts_with_pad else "eos_token_id"]
        ids["forced_eos_token_id"] = None
    for name, value in ids.items():
        if name in written and value is not None and getattr(config, name) != value:
            raise ModelError(
                f"model.config.{name}: {getattr(config, name)}, but the tokenizer's is {value}; leave it out"
            )
        if name not in written and (hasattr(config, name) or name == "decoder_start_token_id"):
            setattr(config, name, value)
    if "vocab_size" not in written:
        config.vocab_size = len(tokenizer)


def load_tokenizer(model: ModelConfig) -> Any:
    """The recipe's tokenizer, with a padding token (decoders without one pad with their end token)."""
    name = model.tokenizer or str(model.path)
    folder = resolve_path(name, weights=False)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers and sentencepiece raise bare exceptions
        raise ModelError(f"tokenizer '{name}': cannot be loaded from {folder}: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"tokenizer '{name}': has neither a padding nor an end token; add a pad_token to it")
        logger.info("tokenizer '%s' has no padding token; padding with its end token %s", name, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_kind(model: ModelConfig) -> Kind:
    """Whether the recipe's model is an encoder, an encoder-decoder or a decoder."""
    return kind_of(_raw_config(model))


def kind_of(config: Any) -> Kind:
    """The kind of a transformers config."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    name = config.model_type
    if name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "encoder"
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    raise ModelError(
        f"model type '{name}': neither an encoder with a masked LM, nor an encoder-decoder, nor a decoder of text "
        f"in transformers {transformers.__version__}; choose another model"
    )


def read_tensors(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Those of `names` that a checkpoint folder holds, in fp32, without loading the rest where the format allows."""
    found: dict[str, Tensor] = {}
    for file in sorted(_shards(folder, "model.safetensors", names)):
        with safe_open(file, framework="pt") as tensors:
            for name in set(tensors.keys()) & set(names):
                found[name] = tensors.get_tensor(name).float()
    if found or any(folder.glob("*.safetensors")):
        return found
    for file in sorted(_shards(folder, "pytorch_model.bin", names)):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        found |= {name: state[name].float() for name in names if name in state}
    return found


def _shards(folder: Path, single: str, names: Collection[str]) -> set[Path]:
    if (folder / single).is_file():
        return {folder / single}
    index = folder / f"{single}.index.json"
    if not index.is_file():
        return set()
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return {folder / weight_map[name] for name in names if name in weight_map}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading reports off the screen: what they would say is checked here and raised if wrong."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()
