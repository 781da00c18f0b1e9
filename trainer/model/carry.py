"""What a model takes over from another that was trained on other tasks.

Owns: which parameters of two `MultiTaskModel`s mean the same. Names alone do not say it: the same backbone is called
`backbone.body.bert...` in a model that trains a language-modelling task and `backbone.body...` in one that does not,
and the rows of the packed head lie where the mixture puts them. Writing weights is `trainer.engine.start_weights`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.model.multitask import MultiTaskModel

HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class Rows:
    """Rows of the packed head: `size` from `theirs` on are taken to `ours` on."""

    ours: int
    theirs: int
    size: int


@dataclass(frozen=True)
class Carried:
    """What is taken over: parameters as a whole (our name -> theirs), and rows of the packed head by task."""

    whole: dict[str, str]
    rows: dict[str, Rows]


def carried(ours: MultiTaskModel, theirs: MultiTaskModel, heads: bool) -> Carried:
    """What `ours` takes over from `theirs`: the backbone, and the trunk and output layer where both have them.

    Args:
        ours: the model that starts.
        theirs: the one that was trained; a skeleton will do for either.
        heads: also the heads of tasks that both have.

    Raises:
        ModelError: the backbones are not of one architecture and size.
    """
    known = {meaning: (name, _shape(p)) for meaning, name, p in _meanings(theirs)}
    meanings = defaultdict(list)
    for meaning, _, parameter in _meanings(ours):
        meanings[id(parameter)].append(meaning)  # several where it is tied; a model may have but one of them
    needed = _backbone(ours)
    whole = {}
    for name, parameter in ours.named_parameters():
        found = next((known[meaning] for meaning in meanings[id(parameter)] if meaning in known), None)
        if found is not None and found[1] == _shape(parameter):
            whole[name] = found[0]
        elif id(parameter) in needed:
            other = "has none" if found is None else f"has {list(found[1])}"
            raise ModelError(
                f"its model is another one: {name} has the shape {list(_shape(parameter))} here, and that run {other}"
            )
    return Carried(whole, _head_rows(ours, theirs) if heads else {})


def untied(state: Mapping[str, Tensor], model: MultiTaskModel) -> dict[str, Tensor]:
    """`state` under every name of every parameter: a state may hold tied parameters once."""
    named = list(model.named_parameters(remove_duplicate=False))
    by_parameter = {id(p): state[name] for name, p in named if name in state}
    return {**state, **{name: by_parameter[id(p)] for name, p in named if id(p) in by_parameter}}


def _meanings(model: MultiTaskModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """What each parameter but the packed head's is, whatever the mixture; then its name, and itself. Tied parameters
    come under each of their names: which is first differs (XLM-RoBERTa's embeddings are its output layer's)."""
    body, base = model.backbone.body, model.backbone.base
    inside = next(name for name, module in body.named_modules() if module is base)
    prefix = f"backbone.body.{inside}." if inside else "backbone.body."
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in HEAD:
            yield name.replace(prefix, "base.", 1) if name.startswith(prefix) else name, name, parameter


def _backbone(model: MultiTaskModel) -> set[int]:
    """The parameters without which a model is another one: all of the base but an output layer of its own."""
    body = model.backbone.body
    needed = {id(p) for p in model.backbone.base.parameters()}
    output = body.get_output_embeddings()
    if output is not None and not body.config.tie_word_embeddings:
        needed -= {id(p) for p in output.parameters()}  # T5 is its own base model
    return needed


def _head_rows(ours: MultiTaskModel, theirs: MultiTaskModel) -> dict[str, Rows]:
    """Task -> rows of the head it has in both, of one kind and size. Tasks that share a head here take it from where
    the first of them has it."""
    rows = {}
    for head in ours.table.heads:
        for task in head.tasks:
            other = theirs.table.by_task.get(task)
            if other is not None and (other.kind, other.size) == (head.kind, head.size):
                rows[task] = Rows(head.first, other.first, head.size)
                break
    return rows


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
