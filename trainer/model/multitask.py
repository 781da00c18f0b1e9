"""The whole model: backbone, trunk, packed head, vocabulary head, and the loss of a micro-batch.

Owns: `MultiTaskModel`, `build_model`, and `sizes`. The forward runs the same modules in the same order whatever a batch
holds, and every parameter gets a gradient, of zeros where the batch has no use for it: ZeRO-3 needs both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from trainer.batch.batch import Batch
from trainer.config.schema import OptimizerConfig, Recipe
from trainer.losses import Losses, ReferenceLosses, choose
from trainer.model.backbone import (
    LM_CLASSES,
    Backbone,
    load_body,
    load_tokenizer,
    materialise_random,
    read_tensors,
    resolve_path,
    running_config,
    stock_body,
)
from trainer.model.heads import HeadTable, PackedHead
from trainer.model.shake import Shake, shaken
from trainer.model.source import kind_of
from trainer.model.stand_in import StandIn
from trainer.model.stock import Stock, Trunk, classifier_dropout, initial_std, stock_of
from trainer.model.vocabulary import VocabularyHead
from trainer.tasks.spec import Family, TaskSpec

_LM_FAMILIES = (Family.SEQ2SEQ, Family.MASKED_LM, Family.CAUSAL_LM)


class MultiTaskModel(nn.Module):
    """One backbone and all its heads. Parts that no task of the mixture needs are None."""

    def __init__(self, backbone: Backbone, table: HeadTable, recipe: Recipe, has_lm: bool, losses: Losses) -> None:
        """Put the parts together; `fresh` names the parameters that no checkpoint provides."""
        super().__init__()
        config, kind = backbone.body.config, backbone.kind
        stock = stock_of(config, kind)
        rate = recipe.heads.dropout
        dropout = classifier_dropout(config, kind) if rate is None else rate
        span_dropout = getattr(config, "qa_dropout", dropout if stock.span_trunk else 0.0) if rate is None else rate
        kinds = {head.kind for head in table.heads}
        needs_trunk = stock.trunk is not None and bool(kinds if stock.span_trunk else kinds - {"span"})
        self.table = table
        self.losses = losses
        self.head_std = initial_std(config)
        self.backbone = backbone
        self.trunk = Trunk(config, stock, dropout, recipe.seed) if needs_trunk else None
        self.span_trunk = stock.span_trunk
        self.dropout = nn.Dropout(dropout)
        self.span_dropout = nn.Dropout(span_dropout)
        self.head = (
            PackedHead(
                table, config.hidden_size, self.head_std, recipe.seed, losses, stock.output_bias, recipe.heads.spectral
            )
            if table.rows
            else None
        )
        self.vocabulary = VocabularyHead(backbone.body, config, stock, kind, losses) if has_lm else None
        self.fresh: set[str] = set()

    def forward(
        self,
        batch: Batch,
        stand_in: StandIn | Callable[[Tensor], StandIn] | None = None,
        shake: Shake | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a micro-batch and what metrics need.

        Args:
            batch: the micro-batch.
            stand_in: a head through which its one task is seen instead of its own, or how to come by one from the
                features [P + Q, H], without gradient. The packed head runs all the same and gets a gradient of zeros.
            shake: add the divergence of a second pass.

        Returns:
            `loss`, an fp32 scalar (fp64 for fp64 models): the sum of weight x loss over segments, regression rows and
            LM tokens, and of the second pass. And, without gradient: `r3f`, the second pass's part; `by_task` [tasks],
            the parts of the rest, `scores` [E], `segment_loss` [G],
            `regression` [N] (predictions on the [0, 1] scale), `regression_loss` [N], `lm_loss` [T], `features` [P + Q,
            H] (what the packed head sees).
        """
        hidden, features = seen = self._see(batch)
        loss, by_task = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(batch.tasks, dtype=torch.float32)
        r3f = loss if shake is None else self._divergence(seen, batch, shake)
        scores = head_loss = lm_loss = torch.zeros(0, device=hidden.device)
        if self.head is not None:
            of_heads = self.head(features, batch)
            if stand_in is not None:
                its = stand_in if isinstance(stand_in, StandIn) else stand_in(features.detach())
                through = its.loss(self.losses, features, batch)
                of_heads = through._replace(total=through.total + 0.0 * of_heads.total, by_task=of_heads.by_task)
            loss, by_task = loss + of_heads.total, by_task + of_heads.by_task
            scores, head_loss = of_heads.scores, of_heads.loss
        if self.vocabulary is not None:
            of_words = self.vocabulary(hidden.index_select(0, batch.lm_positions), batch)
            loss, lm_loss = loss + of_words.total, of_words.loss
            by_task = by_task.index_add(0, batch.lm_task, batch.lm_weight * lm_loss)
        segments = len(batch.target)
        return {
            "loss": loss + r3f,
            "r3f": r3f.detach(),
            "by_task": by_task,
            "scores": scores[: batch.scores],
            "segment_loss": head_loss[:segments],
            "regression": scores[batch.scores :],
            "regression_loss": head_loss[segments:],
            "lm_loss": lm_loss,
            "features": features.detach(),
        }

    def _see(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Last hidden states, and what the packed head sees of them: nothing where there is none."""
        hidden = self.backbone(batch)
        return hidden, hidden[:0] if self.head is None else self._features(hidden, batch)

    def _divergence(self, seen: tuple[Tensor, Tensor], batch: Batch, shake: Shake) -> Tensor:
        """Weight x divergence of a second pass from the first one."""
        with shaken(self.backbone.embeddings, shake):
            other = self._see(batch)
        total = seen[0].new_zeros((), dtype=torch.float32)
        if self.head is not None:
            total = total + self.head(seen[1], batch, other[1], shake.sides).total
        if self.vocabulary is not None:
            x, y = (hidden.index_select(0, batch.lm_positions) for hidden, _ in (seen, other))
            total = total + self.vocabulary(x, batch, y, shake.sides).total
        return shake.weight * total

    def _features(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[P + Q, H] what the packed head sees: pooled features, then token features."""
        pooled = hidden.index_select(0, self.backbone.pooled_positions(batch))
        tokens = hidden.index_select(0, batch.tokens)
        if self.trunk is not None:
            # One call for both, where both pass: ZeRO-3 gathers the trunk once.
            together = self.trunk(torch.cat([pooled, tokens]) if self.span_trunk else pooled)
            pooled, tokens = together[: len(pooled)], together[len(pooled) :] if self.span_trunk else tokens
        return torch.cat([self.dropout(pooled), self.span_dropout(tokens)])

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
        """Groups `body`, `body_no_decay` (biases and norms) and `heads`, those that are not empty, in this order.

        `heads` has every parameter that no checkpoint provides: the packed head, the trunk unless its weights are
        pretrained, an output layer's transform the checkpoint lacks. What starts at random wants the heads' rate.
        """
        groups: dict[str, list[nn.Parameter]] = {"body": [], "body_no_decay": [], "heads": []}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            group = "heads" if name in self.fresh else "body" if dimensions > 1 else "body_no_decay"
            groups[group].append(parameter)
        head_lr = optimizer.lr if optimizer.head_lr is None else optimizer.head_lr
        rates = {"body": optimizer.lr, "body_no_decay": optimizer.lr, "heads": head_lr}
        decays = {"body": optimizer.weight_decay, "body_no_decay": 0.0, "heads": optimizer.head_weight_decay}
        return [
            {"name": name, "params": parameters, "lr": rates[name], "weight_decay": decays[name]}
            for name, parameters in groups.items()
            if parameters
        ]

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, synced_gpus: bool = False
    ) -> Tensor:
        """Greedy continuations.

        Args:
            input_ids: [S, L]; left-padded prompts for decoders.
            attention_mask: [S, L].
            max_new_tokens: most tokens of a continuation.
            synced_gpus: keep running until every rank is done (needed under ZeRO-3).

        Returns:
            [S, at most max_new_tokens] new tokens only, padded after the end token.
        """
        ids: Tensor = self.backbone.body.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            synced_gpus=synced_gpus,
            use_cache=True,
        )
        return ids[:, 1:] if self.backbone.kind == "encoder-decoder" else ids[:, input_ids.shape[1] :]


def has_lm_family(tasks: Sequence[TaskSpec]) -> bool:
    """Whether a mixture needs the model's own output layer."""
    return any(task.family in _LM_FAMILIES for task in tasks)


def build_model(recipe: Recipe, tasks: Sequence[TaskSpec], random_weights: Path | None = None) -> MultiTaskModel:
    """The model of a recipe, the same on every rank and under every ZeRO stage.

    Args:
        recipe: which model, which seed.
        tasks: the mixture; parts that it does not need are not built.
        random_weights: what `materialise_random` returned, for a recipe with `model.config`. Without it the folder is
            written to a temporary place first.
    """
    if recipe.model.config is not None and random_weights is None:
        with tempfile.TemporaryDirectory() as folder:
            return build_model(recipe, tasks, materialise_random(recipe, Path(folder)))
    folder = str(random_weights) if random_weights is not None else resolve_path(str(recipe.model.path))
    config = running_config(recipe)
    kind, has_lm = kind_of(config), has_lm_family(tasks)
    with torch.random.fork_rng(devices=[]):  # what constructors draw is overwritten: it must not move the run's state
        body, fresh = load_body(recipe, config, kind, has_lm, folder)
        backbone = Backbone(body, kind, load_tokenizer(recipe.model))
        model = MultiTaskModel(backbone, HeadTable.of(tasks, recipe.heads), recipe, has_lm, choose(recipe.kernels))
    model.fresh = {f"backbone.body.{name}" for name in fresh}
    if model.head is not None:
        model.fresh |= {f"head.{name}" for name, _ in model.head.named_parameters()}
    if model.trunk is not None and not _load_trunk(model.trunk, stock_of(config, kind), Path(folder)):
        model.fresh |= {f"trunk.{name}" for name, _ in model.trunk.named_parameters()}
    for part in (model.trunk, model.head):
        if part is not None:
            part.to(body.dtype)  # under ZeRO-3 the body has its training type already
    return model


def _load_trunk(trunk: Trunk, stock: Stock, folder: Path) -> bool:
    """Fill the trunk from the checkpoint, where it has one (BERT's pooler, a fine-tuned classifier's dense layer)."""
    for prefix in stock.pretrained:
        names = {f"dense.{part}": f"{prefix}.{part}" for part, _ in trunk.dense.named_parameters()}
        if stock.norm:
            names |= {f"norm.{part}": f"{stock.norm}.{part}" for part, _ in trunk.norm.named_parameters()}
        found = read_tensors(folder, set(names.values()))
        if len(found) == len(names):
            trunk.load_state_dict({ours: found[theirs] for ours, theirs in names.items()})
            return True
    return False


def skeleton(recipe: Recipe, tasks: Sequence[TaskSpec]) -> MultiTaskModel:
    """The model without its weights: every parameter has its name and shape and takes no memory."""
    config = running_config(recipe)
    kind, has_lm = kind_of(config), has_lm_family(tasks)
    tokenizer = load_tokenizer(recipe.model)
    with torch.device("meta"):
        body = stock_body(LM_CLASSES[kind] if has_lm else AutoModel, config)
        table = HeadTable.of(tasks, recipe.heads)
        return MultiTaskModel(Backbone(body, kind, tokenizer), table, recipe, has_lm, ReferenceLosses())


@dataclass(frozen=True)
class ModelSizes:
    """How large a model is. Parameters that are tied count once."""

    parameters: int
    largest_layer: int
    """Parameters of the largest single module: what ZeRO-3 gathers at least."""
    hidden_size: int
    parts: dict[str, int]
    """Parameters of `body`, `trunk`, `heads` and `vocabulary` (of the last, what the body does not have anyway)."""


def sizes(recipe: Recipe, tasks: Sequence[TaskSpec]) -> ModelSizes:
    """The sizes of a recipe's model, without allocating it."""
    model = skeleton(recipe, tasks)
    base = sum(p.numel() for p in model.backbone.base.parameters())
    body = sum(p.numel() for p in model.backbone.body.parameters())
    parts = {
        "body": base,
        "trunk": sum(p.numel() for p in model.trunk.parameters()) if model.trunk else 0,
        "heads": sum(p.numel() for p in model.head.parameters()) if model.head else 0,
        "vocabulary": body - base,
    }
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    return ModelSizes(sum(parts.values()), largest, model.backbone.body.config.hidden_size, parts)
