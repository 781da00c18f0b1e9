"""The model's own output layer, applied only where a token is predicted.

Owns: `VocabularyHead`: `features = transform(hidden)`, then `logits = features @ weight.T + bias`, then the loss. The
last two are one call of the fused linear cross-entropy, in a module that holds weight and bias itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from trainer.batch.batch import Batch
from trainer.errors import ModelError
from trainer.losses.interface import Divergence, Losses, Side, VocabularyLoss
from trainer.model.stock import Stock

_DEBERTA_NEW_HEAD = tuple(f"lm_predictions.lm_head.{name}" for name in ("dense", "transform_act_fn", "LayerNorm"))


class VocabularyHead(nn.Module):
    """The output layer of a stock language model.

    Weight and bias are the stock model's own parameters, tied here a second time: ZeRO-3 gathers what a module holds
    directly, so this module's forward and backward find them whole.
    """

    def __init__(self, body: Any, config: Any, stock: Stock, kind: str, losses: Losses) -> None:
        super().__init__()
        self.losses = losses
        new_deberta = hasattr(body, "lm_predictions")  # `legacy: false`: the embeddings are the output layer
        steps = _DEBERTA_NEW_HEAD if new_deberta else stock.lm_transform
        if kind == "encoder" and not steps:
            raise ModelError(f"masked LM: the output layer of '{config.model_type}' is not known here; leave it out")
        # Not registered: they stay the body's, under the names the stock class knows.
        self._steps: list[Callable[[Tensor], Tensor]] = [_step(body, name) for name in steps]
        output = body.get_input_embeddings() if new_deberta else body.get_output_embeddings()
        self.weight: nn.Parameter = output.weight
        self.bias: nn.Parameter | None = (
            body.lm_predictions.lm_head.bias if new_deberta else getattr(output, "bias", None)
        )
        self._constant_bias: tuple[Any, ...] = (body,) if hasattr(body, "final_logits_bias") else ()
        self.scale = _feature_scale(config)
        self.softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)

    @overload
    def forward(self, hidden: Tensor, batch: Batch) -> VocabularyLoss: ...

    @overload
    def forward(self, hidden: Tensor, batch: Batch, other: Tensor, gradient: Side) -> Divergence: ...

    def forward(
        self, hidden: Tensor, batch: Batch, other: Tensor | None = None, gradient: Side = "both"
    ) -> VocabularyLoss | Divergence:
        """The losses of a batch's predicted tokens under [T, H] hidden states, or how far another pass's are from them.

        Args:
            hidden: [T, H].
            batch: what is predicted.
            other: [T, H] the second pass's.
            gradient: which pass is differentiated.
        """
        features = self.features(hidden)
        if other is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and gradient != "x"):
                others = self.features(other)
            return self.losses.linear_symmetric_kl(
                features.detach() if gradient == "y" else features,
                others,
                self.weight,
                self._output_bias(features),
                batch.lm_weight,
                gradient=gradient,
                softcap=self.softcap,
            )
        return self.losses.linear_cross_entropy(
            features,
            self.weight,
            self._output_bias(features),
            batch.lm_target,
            batch.lm_weight,
            smoothing=batch.lm_smoothing,
            softcap=self.softcap,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] scores of the vocabulary, for who wants to look at them; training never holds them."""
        features = self.features(hidden)
        scores = F.linear(features, self.weight, self._output_bias(features))
        return torch.tanh(scores / self.softcap) * self.softcap if self.softcap else scores

    def _output_bias(self, features: Tensor) -> Tensor | None:
        if self._constant_bias:  # BART's is a buffer, and zero in all but a few checkpoints
            bias: Tensor = self._constant_bias[0].final_logits_bias[0].to(features.dtype)
            return bias
        return self.bias

    def features(self, hidden: Tensor) -> Tensor:
        """[T, E] what the last linear layer sees."""
        for step in self._steps:
            hidden = step(hidden)
        return hidden * self.scale if self.scale != 1.0 else hidden


def _step(body: Any, name: str) -> Callable[[Tensor], Tensor]:
    step: Callable[[Tensor], Tensor] = ACT2FN[name[1:]] if name.startswith("@") else body.get_submodule(name)
    return step


def _feature_scale(config: Any) -> float:
    """What the stock class multiplies into features or logits: T5's tied output, Cohere's and Granite's settings."""
    if getattr(config, "scale_decoder_outputs", False):
        return float(config.hidden_size**-0.5)
    if getattr(config, "logit_scale", None):
        return float(config.logit_scale)
    return 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)
