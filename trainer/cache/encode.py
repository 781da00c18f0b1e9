"""From checked rows to cached rows: tokenising, family by family.

Owns: what each family's columns of `layout.py` hold. The layout says what a column means; `text.py` says where special
tokens go and how texts are cut.

What `units` counts: 1 a row, except the targets of a seq2seq row, the predicted tokens of a causal LM row, and of a
masked LM row the tokens that may be masked (how many of them are is decided when a batch is made).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.cache.layout import SPAN_STRIDE_BASE, schema_of
from trainer.cache.text import PAIR_SEPARATOR, Encoded, EncodeOptions, Ids, Template, TextEncoder
from trainer.cache.windows import answer_tokens, around, best_window, window_starts
from trainer.tasks.rows import input_fields, input_text, row_key
from trainer.tasks.spec import Family, Row, TaskSpec

__all__ = ["ENCODER_VERSION", "EncodeOptions", "encode_rows", "evaluation_differs"]

ENCODER_VERSION = 1
"""Part of the cache key: raise it when the same row would be tokenised differently."""


@dataclass
class _Example:
    """One cached row, before it is laid out in columns."""

    source: int
    """Position in the rows given to `encode_rows`."""
    inputs: list[Encoded]
    columns: dict[str, Any] = field(default_factory=dict)
    """The family's own columns."""
    units: int = 1
    truncated: bool = False
    """Beyond what the inputs themselves say."""
    reference: Any = None


@dataclass(frozen=True)
class _Work:
    """What every family's function needs."""

    spec: TaskSpec
    rows: list[Row]
    text: TextEncoder
    options: EncodeOptions
    evaluation: bool

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]


def encode_rows(
    spec: TaskSpec, rows: Sequence[tuple[int, Row]], tokenizer: Any, options: EncodeOptions, evaluation: bool
) -> pa.RecordBatch:
    """Tokenise checked rows.

    Args:
        spec: The rows' task.
        rows: Each row with its index in the source.
        tokenizer: A tokenizer of transformers.
        options: Kind of model and lengths.
        evaluation: Keep what metrics need (references, character offsets) and all windows of a span context.

    Returns:
        A batch with the schema of `layout.py`: a row for each given row, several for a long text of an LM task.
    """
    work = _Work(spec, [row for _, row in rows], TextEncoder(tokenizer, options), options, evaluation)
    examples = list(_FAMILIES[spec.family](work))
    for example in examples:
        example.inputs = [e if e.ids else Encoded([work.text.filler_id], 1, e.truncated) for e in example.inputs]
    keys = [row_key(input_text(spec, row)) for _, row in rows]
    lengths = [[len(e.ids) for e in x.inputs] for x in examples]
    columns: dict[str, list[Any]] = {
        "row": [rows[x.source][0] for x in examples],
        "key": [keys[x.source] for x in examples],
        "sequences": [[e.ids for e in x.inputs] for x in examples],
        "second": [[e.second for e in x.inputs] for x in examples],
        "count": [len(x.inputs) for x in examples],
        # An encoder-decoder's decoder reads its labels, shifted by one.
        "length": [
            max(*own, len(x.columns.get("targets", ())), 0) if options.kind == "encoder-decoder" else max(own)
            for own, x in zip(lengths, examples, strict=True)
        ],
        "units": [x.units for x in examples],
        "truncated": [x.truncated or any(e.truncated for e in x.inputs) for x in examples],
        "reference": [
            "" if x.reference is None or not evaluation else json.dumps(x.reference, ensure_ascii=False)
            for x in examples
        ],
    }
    schema = schema_of(spec.family)
    own = schema.names[len(columns) :]
    columns.update({name: [x.columns[name] for x in examples] for name in own})
    return pa.record_batch([_array(columns[f.name], f.type) for f in schema], schema=schema)


def evaluation_differs(spec: TaskSpec) -> bool:
    """Whether rows of this task are cached differently for evaluation."""
    return spec.family in (Family.SPAN, Family.SEQ2SEQ, Family.REGRESSION) or spec.primary_metric == "map_mrr"


def _classification(work: _Work) -> Iterator[_Example]:
    texts = work.column("text")
    for i, encoded in enumerate(work.text.sequences(texts, [""] * len(texts))):
        yield _Example(i, [encoded], {"label": work.rows[i]["label"]})


def _pair_classification(work: _Work) -> Iterator[_Example]:
    grouped = work.spec.primary_metric == "map_mrr"
    for i, encoded in enumerate(work.text.sequences(work.column("text_a"), work.column("text_b"))):
        row = work.rows[i]
        yield _Example(i, [encoded], {"label": row["label"]}, reference={"group": row["text_a"]} if grouped else None)


def _regression(work: _Work) -> Iterator[_Example]:
    low, high = work.spec.score_range or (0.0, 1.0)
    for i, encoded in enumerate(work.text.sequences(work.column("text_a"), work.column("text_b"))):
        score = work.rows[i]["score"]
        yield _Example(i, [encoded], {"score": (score - low) / (high - low)}, reference={"score": score})


def _multiple_choice(work: _Work) -> Iterator[_Example]:
    pairs = [(row["context"], choice) for row in work.rows for choice in row["choices"]]
    encoded = work.text.sequences([context for context, _ in pairs], [choice for _, choice in pairs])
    first = 0
    for i, row in enumerate(work.rows):
        choices = len(row["choices"])
        yield _Example(i, encoded[first : first + choices], {"label": row["label"]})
        first += choices


def _span(work: _Work) -> Iterator[_Example]:
    """Question and context as a pair, the question first (for decoders too, so that the context has seen it)."""
    decoder = work.options.kind == "decoder"
    template = Template(work.text.single.prefix, (), ()) if decoder else work.text.pair
    questions = work.text.ids([q + PAIR_SEPARATOR if decoder else q for q in work.column("question")])
    contexts = work.text.ids_with_offsets(work.column("context"))
    for i, (question, (context, offsets)) in enumerate(zip(questions, contexts, strict=True)):
        yield _span_example(work, i, template, question, context, offsets)


def _span_example(
    work: _Work, i: int, template: Template, question: Ids, context: Ids, offsets: NDArray[np.int64]
) -> _Example:
    row, options = work.rows[i], work.options
    room = options.max_length - template.special
    question_cut = question[: room // 2]  # a question never takes more than half, so that contexts get somewhere
    size = room - len(question_cut)
    answer = row["answers"][0] if row["answers"] else None
    first = last = 0
    if answer is not None and len(context):
        first, last = answer_tokens(offsets, answer["start"], answer["start"] + len(answer["text"]))
    starts = window_starts(len(context), size, options.span_stride)
    begin, end = 0, len(starts)
    if not work.evaluation:
        begin, end = around(starts, size, options.span_windows, (first + last) // 2)
    kept = starts[begin:end]
    inputs = [template.wrap(question_cut, context[s : s + size]) for s in kept]

    windows = best_window(kept, size, len(context))
    tokens = np.flatnonzero(windows >= 0)
    index = len(template.prefix) + len(question_cut) + len(template.middle) + tokens - np.array(kept)[windows[tokens]]
    positions = [0, *(windows[tokens] * SPAN_STRIDE_BASE + index).tolist()]
    target = (0, 0)
    if answer is not None and len(tokens):  # slot 0 is "no answer", so tokens count from 1
        span = np.clip([first, last], tokens[0], tokens[-1]) - tokens[0] + 1
        target = (int(span[0]), int(span[1]))
    columns = {
        "positions": positions,
        "start": target[0],
        "end": target[1],
        "offsets": [0, 0, *offsets[tokens].ravel().tolist()] if work.evaluation else [],
    }
    truncated = len(question_cut) < len(question) or len(tokens) < len(context)
    reference = {"context": row["context"], "answers": [a["text"] for a in row["answers"]]}
    return _Example(i, inputs, columns, truncated=truncated, reference=reference)


def _seq2seq(work: _Work) -> Iterator[_Example]:
    sources, targets = work.column("source"), work.text.targets(work.column("target"))
    if work.options.kind == "decoder":
        prompts = work.text.ids([source + PAIR_SEPARATOR for source in sources])
        encoded = [_prompt(work, prompt, target) for prompt, (target, _) in zip(prompts, targets, strict=True)]
    else:
        encoded = work.text.sequences(sources, [""] * len(sources))
    for i, (source, (target, cut)) in enumerate(zip(encoded, targets, strict=True)):
        row = work.rows[i]
        reference = {"references": row.get("references") or [row["target"]], "source": row["source"]}
        yield _Example(i, [source], {"targets": target}, units=len(target), truncated=cut, reference=reference)


def _prompt(work: _Work, prompt: Ids, target: Ids) -> Encoded:
    """Prompt + target of a decoder. What does not fit is cut from the prompt's start: its end is what is answered."""
    prefix = list(work.text.single.prefix)
    room = max(work.options.max_length - len(prefix) - len(target), 0)
    kept = prompt[len(prompt) - room :] if len(prompt) > room else prompt
    # The first target token is predicted at the token before it, so there has to be one.
    lead = [*prefix, *kept] or [work.text.end_id]
    ids = lead + target
    return Encoded(ids, len(ids), len(kept) < len(prompt))


def _texts(work: _Work) -> list[list[str]]:
    """The texts of each row of an LM task; a row has several where it is another task's."""
    return [[text for text in input_fields(work.spec, row) if text] for row in work.rows]


def _masked_lm(work: _Work) -> Iterator[_Example]:
    template = work.text.single
    room = max(work.options.max_length - template.special, 1)
    for i, (ids, second) in enumerate(work.text.streams(_texts(work))):
        for start in range(0, max(len(ids), 1), room):
            piece = ids[start : start + room]
            maskable = sum(token not in work.text.special_ids for token in piece)
            whole = template.wrap(piece, [])
            if second < start + len(piece):  # only texts of several parts have a second type
                whole = whole._replace(second=len(template.prefix) + max(second - start, 0))
            yield _Example(i, [whole], units=maskable)


def _causal_lm(work: _Work) -> Iterator[_Example]:
    """Pieces share a token with the next one: its last is the next one's first, so each token is predicted once."""
    step = work.options.max_length - 1
    for i, (ids, _) in enumerate(work.text.streams(_texts(work))):
        stream = [*work.text.single.prefix, *ids, work.text.end_id]
        if len(stream) < 2:  # a text of no tokens: predict the end from the end
            stream = [*stream, *stream]
        for start in range(0, len(stream) - 1, step):
            piece = stream[start : start + step + 1]
            yield _Example(i, [Encoded(piece, len(piece), False)], units=len(piece) - 1)


_FAMILIES: dict[Family, Callable[[_Work], Iterator[_Example]]] = {
    Family.CLASSIFICATION: _classification,
    Family.PAIR_CLASSIFICATION: _pair_classification,
    Family.REGRESSION: _regression,
    Family.MULTIPLE_CHOICE: _multiple_choice,
    Family.SPAN: _span,
    Family.SEQ2SEQ: _seq2seq,
    Family.MASKED_LM: _masked_lm,
    Family.CAUSAL_LM: _causal_lm,
}


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column; lists are flattened here, which is several times faster than Arrow's own conversion."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = list(chain.from_iterable(values))
    return pa.ListArray.from_arrays(offsets, _array(flat, kind.value_type), type=kind)
