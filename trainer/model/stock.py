"""How the stock classes of transformers build their heads, architecture by architecture.

Owns: the table `STOCK` and what is read off a config with it. The trunk here does what the stock sequence classifier
does before its last linear layer, and the names here say where each part goes on export; both sides of "exported models
give the same logits" come from one row of this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from trainer.model.heads import seeded_normal

_DROPOUT_NAMES = ("classifier_dropout", "classifier_dropout_prob", "cls_dropout", "seq_classif_dropout")


@dataclass(frozen=True)
class Stock:
    """One architecture's stock heads. Names are parameter prefixes; `{base}` is the class's `base_model_prefix`."""

    trunk: str | None = None
    """The dense layer of the sequence classifier; None when the last linear layer sees the pooled state itself."""
    output: str = "classifier"
    """The last linear layer of the sequence classifier."""
    choice_trunk: str | None = None
    """The dense layer of the multiple-choice class; None where it is `trunk`."""
    choice_output: str = "classifier"
    span_output: str = "qa_outputs"
    norm: str | None = None
    """A layer norm after the trunk's activation (ModernBERT)."""
    base_trunk: str | None = None
    """Where the base model itself has the trunk, as its pooler."""
    pretrained: tuple[str, ...] = ()
    """Prefixes under which a checkpoint may hold trained weights of the trunk."""
    activation: str = "tanh"
    """The trunk's activation, or `config:NAME` for a setting of the config."""
    input_dropout: str | None = "classifier"
    """Dropout before the dense layer: `classifier` for the classifier's own rate, a setting's name, or None."""
    span_trunk: bool = False
    """The stock span class sends every token through the trunk."""
    output_bias: bool = True
    lm_transform: tuple[str, ...] = ()
    """Modules between the last hidden state and the vocabulary layer; `@NAME` is an activation function."""


_BERT = Stock(
    trunk="{base}.pooler.dense",
    base_trunk="pooler.dense",
    pretrained=("bert.pooler.dense", "pooler.dense"),
    input_dropout=None,
    lm_transform=("cls.predictions.transform",),
)
_ROBERTA = Stock(
    trunk="classifier.dense",
    output="classifier.out_proj",
    choice_trunk="{base}.pooler.dense",
    base_trunk="pooler.dense",
    pretrained=("classifier.dense",),
    lm_transform=("lm_head.dense", "@gelu", "lm_head.layer_norm"),
)
_DEBERTA = Stock(
    trunk="pooler.dense",
    pretrained=("pooler.dense",),
    activation="config:pooler_hidden_act",
    input_dropout="pooler_dropout",
    lm_transform=("cls.predictions.transform",),
)
_SEQ2SEQ = Stock(
    trunk="classification_head.dense",
    output="classification_head.out_proj",
    pretrained=("classification_head.dense",),
)
_DECODER = Stock(output="score", output_bias=False)

STOCK: dict[str, Stock] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _ROBERTA,
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA,
    "electra": Stock(
        trunk="classifier.dense",
        output="classifier.out_proj",
        choice_trunk="sequence_summary.summary",
        pretrained=("classifier.dense",),
        activation="gelu",
        lm_transform=("generator_predictions",),
    ),
    "distilbert": Stock(
        trunk="pre_classifier",
        pretrained=("pre_classifier",),
        activation="relu",
        input_dropout=None,
        lm_transform=("vocab_transform", "activation", "vocab_layer_norm"),
    ),
    "albert": Stock(
        trunk="{base}.pooler",
        base_trunk="pooler",
        pretrained=("albert.pooler", "pooler"),
        input_dropout=None,
        lm_transform=("predictions.dense", "predictions.activation", "predictions.LayerNorm"),
    ),
    "modernbert": Stock(
        trunk="head.dense",
        norm="head.norm",
        span_output="classifier",
        span_trunk=True,
        pretrained=("head.dense",),
        activation="config:classifier_activation",
        input_dropout=None,
        lm_transform=("head",),
    ),
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "t5": _SEQ2SEQ,
    "mt5": _SEQ2SEQ,
    "umt5": _SEQ2SEQ,
}

_UNKNOWN = Stock(trunk="trunk")
"""Encoders and encoder-decoders outside the table train like RoBERTa; only their body exports."""


def stock_of(config: Any, kind: str) -> Stock:
    """The row of a model: decoders all share one, the generic head of transformers."""
    return _DECODER if kind == "decoder" else STOCK.get(config.model_type, _UNKNOWN)


def classifier_dropout(config: Any, kind: str) -> float:
    """The rate before the last linear layer of the stock sequence classifier; decoders have none."""
    if kind == "decoder":
        return 0.0
    rates = [getattr(config, name, None) for name in (*_DROPOUT_NAMES, "hidden_dropout_prob")]
    return float(next((rate for rate in rates if rate is not None), 0.0))


def initial_std(config: Any) -> float:
    """Standard deviation with which the stock class draws a head."""
    if hasattr(config, "initializer_factor"):  # the T5 family
        return float(config.initializer_factor * config.hidden_size**-0.5)
    return float(getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02)


class Trunk(nn.Module):
    """What the stock sequence classifier does to the pooled state before its last linear layer."""

    def __init__(self, config: Any, stock: Stock, dropout: float, seed: int) -> None:
        super().__init__()
        size = config.hidden_size
        name = stock.activation
        self.input_dropout = nn.Dropout(self._input_rate(config, stock, dropout))
        self.dense = nn.Linear(size, size, bias=getattr(config, "classifier_bias", True))
        self.activation = ACT2FN[getattr(config, name.removeprefix("config:")) if ":" in name else name]
        self.norm = nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias) if stock.norm else nn.Identity()
        self.dense.weight = nn.Parameter(seeded_normal(seed, "trunk", (size, size), initial_std(config)))
        if self.dense.bias is not None:
            nn.init.zeros_(self.dense.bias)

    @staticmethod
    def _input_rate(config: Any, stock: Stock, dropout: float) -> float:
        if stock.input_dropout is None:
            return 0.0
        return dropout if stock.input_dropout == "classifier" else float(getattr(config, stock.input_dropout))

    def forward(self, features: Tensor) -> Tensor:
        """[P, H] pooled states to [P, H] features."""
        result: Tensor = self.norm(self.activation(self.dense(self.input_dropout(features))))
        return result
