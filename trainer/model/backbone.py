"""The transformer under all tasks: loaded, run, and reduced to the states that tasks ask for.

Owns: `Backbone` (what runs), `load_body` (from weights) and `materialise_random` (weights for a model that has none).
Where models and tokenizers come from is `source.py`; how stock heads look is `stock.py`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, GenerationConfig

from trainer.batch.batch import Batch
from trainer.config.schema import ModelConfig, Recipe
from trainer.errors import ModelError
from trainer.model.heads import seeded_normal
from trainer.model.source import (
    Kind,
    kind_of,
    load_config,
    load_tokenizer,
    model_kind,
    quiet,
    read_tensors,
    resolve_path,
)
from trainer.model.stock import initial_std

__all__ = [
    "LM_CLASSES",
    "Backbone",
    "load_body",
    "load_config",
    "load_tokenizer",
    "materialise_random",
    "model_kind",
    "read_tensors",
    "resolve_path",
    "running_config",
    "stock_body",
    "stock_class",
]

LM_CLASSES: dict[str, Any] = {
    "encoder": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "decoder": AutoModelForCausalLM,
}

_LAYERDROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


class Backbone(nn.Module):
    """A stock model and how to run it: `body` is its language model when an LM family is trained, else its base."""

    def __init__(self, body: Any, kind: Kind, tokenizer: Any) -> None:
        super().__init__()
        self.body = body
        self.kind = kind
        self.pad_id: int = tokenizer.pad_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.takes_types = (
            getattr(body.config, "type_vocab_size", 0) > 1
            and "token_type_ids" in inspect.signature(body.base_model.forward).parameters
            and "token_type_ids" in tokenizer.model_input_names
        )

    @property
    def base(self) -> Any:
        """The stock base model inside the body (the body itself where there is no language model)."""
        return self.body.base_model

    @property
    def embeddings(self) -> nn.Module:
        """The table of the input's tokens; of an encoder-decoder, the encoder's."""
        body = self.body.get_encoder() if self.kind == "encoder-decoder" else self.body
        found: nn.Module = body.get_input_embeddings()
        return found

    def forward(self, batch: Batch) -> Tensor:
        """[S * L, H] last hidden states; [S * D, H] of the decoder for encoder-decoders."""
        if self.kind == "encoder-decoder":
            hidden = self._encode_decode(batch)
        else:
            extra: dict[str, Any] = {"token_type_ids": batch.token_type_ids} if self.takes_types else {}
            if self.kind == "decoder":
                extra["use_cache"] = False
            hidden = self.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra)
            hidden = hidden.last_hidden_state
        return hidden.flatten(0, 1)

    def _encode_decode(self, batch: Batch) -> Tensor:
        encoded = self.body.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        decoded = self.body.get_decoder()(
            input_ids=batch.decoder_input_ids,
            attention_mask=batch.decoder_attention_mask,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=batch.attention_mask,
            use_cache=False,
        )
        hidden: Tensor = decoded.last_hidden_state
        return hidden

    def pooled_positions(self, batch: Batch) -> Tensor:
        """[P] flat positions of the pooled states, chosen as the stock sequence classifiers do.

        Encoders: the first token. Decoders: the last token that is not padding. Encoder-decoders: where the encoder's
        input ends, in the decoder, whose input is the same text shifted right.
        """
        if self.kind == "encoder":
            return batch.pooled * batch.input_ids.shape[1]
        ids = batch.input_ids[batch.pooled]
        wanted = ids == self.eos_id if self.kind == "encoder-decoder" else ids != self.pad_id
        index = torch.arange(ids.shape[1], device=ids.device)
        width = batch.decoder_input_ids.shape[1] if self.kind == "encoder-decoder" else ids.shape[1]
        if not ids.numel():  # amax has no value for no rows
            return batch.pooled
        return batch.pooled * width + (index * wanted).amax(1)


def running_config(recipe: Recipe) -> Any:
    """The config with which the body is trained: `load_config` plus what the recipe changes for training only."""
    config = load_config(recipe.model)
    for name in _LAYERDROPS:  # a skipped layer has no gradient, and ranks would skip different ones
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if recipe.model.dropout is not None:
        for name, value in config.to_dict().items():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, int | float):
                setattr(config, name, recipe.model.dropout)
    return config


def load_body(recipe: Recipe, config: Any, kind: Kind, has_lm: bool, folder: str) -> tuple[Any, set[str]]:
    """The body with the weights of `folder`, in fp32, sharded as it loads where a ZeRO-3 config is alive.

    Returns:
        The stock model, and the names of its parameters that the folder has no weights for. Those belong to the output
        layer and are drawn from the recipe's seed.
    """
    auto = LM_CLASSES[kind] if has_lm else AutoModel
    extra = _without_pooler(auto, config)
    extra["attn_implementation"] = _attention(recipe.model)
    try:
        with quiet():
            body, info = auto.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **extra,
            )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model '{folder}': cannot be loaded as {auto.__name__}: {error}") from error
    if info["mismatched_keys"]:
        names = ", ".join(sorted(str(next(iter(key))) for key in info["mismatched_keys"])[:3])
        raise ModelError(f"model '{folder}': its weights have other shapes than its config.json says ({names}, ...)")
    fresh = _draw_missing(body, set(info["missing_keys"]), recipe.seed, folder)
    body.generation_config = _greedy(config)
    body.config.use_cache = False
    if recipe.model.gradient_checkpointing:
        if not body.supports_gradient_checkpointing:
            raise ModelError(f"model.gradient_checkpointing: '{config.model_type}' cannot; set it to false")
        # Renamed during transformers 5; the old name warns where the new one exists.
        enable = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return body, fresh


def stock_body(auto: Any, config: Any) -> Any:
    """A body with whatever weights its constructor gives."""
    return stock_class(auto, config)(config, **_without_pooler(auto, config))


def _without_pooler(auto: Any, config: Any) -> dict[str, Any]:
    """No pooler: where pooled states are wanted it is our trunk, elsewhere it would be parameters without gradient."""
    cls = stock_class(auto, config)
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls.__init__).parameters else {}


def stock_class(auto: Any, config: Any) -> Any:
    """The class behind an `AutoModel...` for a config."""
    if type(config) not in auto._model_mapping:
        raise ModelError(f"model type '{config.model_type}': transformers has no {auto.__name__} for it")
    cls = auto._model_mapping[type(config)]
    return cls[0] if isinstance(cls, tuple) else cls


def _attention(model: ModelConfig) -> str | None:
    """On a CPU eager attention is the faster one for short sequences (MiniLM, bf16); elsewhere transformers chooses."""
    if model.attention != "auto":
        return model.attention
    return None if torch.cuda.is_available() or model.max_length > 512 else "eager"


def _draw_missing(body: Any, missing: set[str], seed: int, folder: str) -> set[str]:
    """Draw the weights a checkpoint lacks from the seed; transformers draws them from the process's own state."""
    base = {id(p) for p in body.base_model.parameters()}
    output = body.get_output_embeddings()
    if output is not None and not body.config.tie_word_embeddings:
        base -= {id(p) for p in output.parameters()}  # T5 is its own base model
    fresh = {name: p for name, p in body.named_parameters() if name in missing}
    if lost := [name for name, p in fresh.items() if id(p) in base]:
        names = ", ".join(lost[:3])
        raise ModelError(f"model '{folder}': its checkpoint lacks weights of the model it describes ({names}, ...)")
    std = initial_std(body.config)
    for name, parameter in fresh.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if len(shape) > 1:  # biases and norms start at constants
            with torch.no_grad(), _whole(parameter):
                parameter.data.copy_(seeded_normal(seed, f"body/{name}", shape, std))
    return set(fresh)


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """A parameter that ZeRO-3 has sharded, whole for writing."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return gathered


def _greedy(config: Any) -> GenerationConfig:
    """Greedy decoding, whatever beams and penalties the checkpoint's home suggests."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    return GenerationConfig(do_sample=False, num_beams=1, **{name: getattr(config, name, None) for name in names})


def materialise_random(recipe: Recipe, folder: Path) -> Path:
    """Write the random model of `model.config` once, so that every rank, world size and ZeRO stage loads the same.

    Args:
        recipe: its `model.config`, tokenizer and seed decide the weights; nothing else does.
        folder: parent of the folder written; an earlier one is used again.
    """
    config = load_config(recipe.model)
    kind = kind_of(config)
    facts = json.dumps([config.to_dict(), recipe.seed, torch.__version__, transformers.__version__], sort_keys=True)
    target = folder / hashlib.sha256(facts.encode()).hexdigest()[:16]
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed % 2**63)
            model = stock_class(LM_CLASSES[kind], config)(config)
        # Not save_pretrained: in a process group that writes weights on the first rank only, and any may come first.
        state = {
            name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()
        }
        save_file(state, aside / "model.safetensors", {"format": "pt"})
        config.save_pretrained(aside)
        os.replace(aside, target)
    except OSError:
        if not target.is_dir():  # another process may have finished first
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
