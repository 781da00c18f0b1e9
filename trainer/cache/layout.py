"""The layout of one cached row: the contract between tokenising (`encode.py`) and everything after it.

Owns: the Arrow schema. One file a (task, split); one row an example. A *sequence* is one input of the backbone: an
example has one, except multiple choice (one a choice) and span (one a window over a long context).
"""

from __future__ import annotations

import pyarrow as pa

from trainer.tasks.spec import Family

LAYOUT_VERSION = 1
"""Part of the cache key: raise it when a column's meaning changes."""

SPAN_STRIDE_BASE = 1 << 16
"""A span position is `window * SPAN_STRIDE_BASE + index in that window's sequence`."""

_COMMON = [
    pa.field("row", pa.int64()),  # 0-based index of the row in its source file, for messages
    pa.field("key", pa.uint64()),  # hash of the canonical input text (labels excluded): dev cuts and duplicates
    pa.field("sequences", pa.list_(pa.list_(pa.int32()))),  # token ids with special tokens, no padding
    pa.field("second", pa.list_(pa.int32())),  # per sequence: index where the second segment (token type 1) starts
    pa.field("count", pa.int32()),  # number of sequences
    pa.field("length", pa.int32()),  # longest sequence (decoder side included for encoder-decoders: max of both)
    pa.field("units", pa.int32()),  # what the loss is a mean over: 1, or target tokens of an LM row
    pa.field("truncated", pa.bool_()),  # some input text did not fit max_length
    pa.field("reference", pa.string()),  # JSON for the metric; empty in training splits
]

_FAMILY = {
    Family.CLASSIFICATION: [pa.field("label", pa.int32())],
    Family.PAIR_CLASSIFICATION: [pa.field("label", pa.int32())],
    Family.REGRESSION: [pa.field("score", pa.float32())],  # scaled to [0, 1] by score_range
    Family.MULTIPLE_CHOICE: [pa.field("label", pa.int32())],
    Family.SPAN: [
        # The positions the span softmax runs over, in document order: first the no-answer slot (index 0 of window 0),
        # then each context token exactly once, in the window that gives it the most context.
        pa.field("positions", pa.list_(pa.int32())),
        pa.field("start", pa.int32()),  # index into `positions`; 0 when there is no answer
        pa.field("end", pa.int32()),  # inclusive
        pa.field("offsets", pa.list_(pa.int32())),  # dev/test: 2 a position, character range in the context; else empty
    ],
    # Encoder-decoder: `targets` are the decoder's labels (with the end token). Decoder-only: the sequence is
    # prompt + target and `targets` repeats the target ids, which are the sequence's last ones.
    Family.SEQ2SEQ: [pa.field("targets", pa.list_(pa.int32()))],
    # Masks are drawn when a batch is made (a pure function of seed, epoch and row), so only the ids are stored.
    Family.MASKED_LM: [],
    Family.CAUSAL_LM: [],
}


def schema_of(family: Family) -> pa.Schema:
    """The Arrow schema of a cached split of `family`."""
    return pa.schema(_COMMON + _FAMILY[family])
