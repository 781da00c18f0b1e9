"""From texts to token ids between the tokenizer's special tokens.

Owns: where special tokens go, truncation, and what stands between two texts. The tokenizer's own templates are read off
once, by encoding a known pair, and put around the ids here: truncation and windows are then the same for every kind of
tokenizer, fast or not. What stands between two texts:

    BERT, DeBERTa    [CLS] a [SEP] b [SEP]      token types change at b
    RoBERTa, BART    <s> a </s></s> b </s>
    T5               a </s> b </s>
    Llama, Qwen      a + newline + b as one text, then the end token (these have no template for pairs)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ModelError

PAIR_SEPARATOR = "\n"
"""Between two texts of a decoder, and between its prompt and its target."""

Ids = list[int]


@dataclass(frozen=True)
class EncodeOptions:
    """What of a recipe's model decides how a row is tokenised."""

    kind: Literal["encoder", "encoder-decoder", "decoder"]
    max_length: int
    max_target_length: int
    span_stride: int
    span_windows: int


class Encoded(NamedTuple):
    """One input of the backbone."""

    ids: Ids
    second: int
    """Where token type 1 starts; the length when nothing has that type."""
    truncated: bool


@dataclass(frozen=True)
class Template:
    """Special tokens around one text (`middle` empty) or around and between two."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    type_start: int | None = None
    """Token type 1 starts this many tokens into `middle`; None when the model has no token types."""

    @property
    def special(self) -> int:
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def wrap(self, first: Ids, second: Ids, truncated: bool = False) -> Encoded:
        """Put the special tokens around the ids of the texts."""
        ids = [*self.prefix, *first, *self.middle, *second, *self.suffix]
        start = len(ids) if self.type_start is None else len(self.prefix) + len(first) + self.type_start
        return Encoded(ids, start, truncated)


class TextEncoder:
    """A tokenizer with its templates."""

    def __init__(self, tokenizer: Any, options: EncodeOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.single = self._probe(("a",))
        if options.kind == "decoder":
            # The pooled token of a decoder is its last one, so that one says that the text is over.
            self.single = self.pair = Template(self.single.prefix, (), (self.end_id,))
        else:
            self.pair = self._probe(("a", "b"))

    @property
    def end_id(self) -> int:
        """The end-of-text token."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                f"the tokenizer {self.name} has no end token (eos_token), which a {self.options.kind} needs; "
                "set eos_token in its tokenizer_config.json"
            )
        return int(eos)

    @property
    def filler_id(self) -> int:
        """What stands for a text of no tokens when there are no special tokens around it: a sequence is never empty."""
        known = (self.tokenizer.eos_token_id, self.tokenizer.unk_token_id, self.tokenizer.pad_token_id)
        return next((int(token) for token in known if token is not None), 0)

    @property
    def name(self) -> str:
        return f"{type(self.tokenizer).__name__} ({self.tokenizer.name_or_path})"

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of `texts` without special tokens. A text that stands there twice is tokenised once."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []
        found = self.tokenizer(
            unique,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        by_text = dict(zip(unique, found, strict=True))
        return [by_text[text] for text in texts]

    def ids_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, NDArray[np.int64]]]:
        """Token ids of `texts` and [n, 2] their character ranges, without the space some tokenizers put into them."""
        if not self.tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {self.name} is a slow one and cannot say which characters a token stands for, "
                "which span tasks need; use a model with a fast tokenizer (tokenizer.json), or leave span tasks out"
            )
        unique = list(dict.fromkeys(texts))
        found = self.tokenizer(
            unique,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        by_text = {
            text: (ids, _trimmed(text, offsets))
            for text, ids, offsets in zip(unique, found["input_ids"], found["offset_mapping"], strict=True)
        }
        return [by_text[text] for text in texts]

    def sequences(self, firsts: Sequence[str], seconds: Sequence[str]) -> list[Encoded]:
        """One input for each pair of texts; an empty text of a pair is left out, special tokens included."""
        if self.options.kind == "decoder":
            return self._joined(firsts, seconds)
        all_ids = self.ids([*firsts, *seconds])
        pairs = zip(firsts, seconds, all_ids[: len(firsts)], all_ids[len(firsts) :], strict=True)
        return [
            self._fit(self.pair, a, b) if first and second else self._fit(self.single, a or b, [])
            for first, second, a, b in pairs
        ]

    def streams(self, rows: Sequence[Sequence[str]]) -> list[tuple[Ids, int]]:
        """The texts of each row as one stream of ids, joined as a pair is, and where in it token type 1 starts."""
        if self.options.kind == "decoder":
            found = self.ids([PAIR_SEPARATOR.join(texts) for texts in rows])
            return [(ids, len(ids)) for ids in found]
        ids_of = iter(self.ids([text for texts in rows for text in texts]))
        streams = []
        for texts in rows:
            stream = list(next(ids_of))
            first = len(stream)
            for _ in texts[1:]:
                stream += [*self.pair.middle, *next(ids_of)]
            typed = len(texts) > 1 and self.pair.type_start is not None
            streams.append((stream, first + int(self.pair.type_start or 0) if typed else len(stream)))
        return streams

    def targets(self, texts: Sequence[str]) -> list[tuple[Ids, bool]]:
        """Decoder labels of `texts` with the end token, and whether they were cut to `max_target_length`."""
        most = self.options.max_target_length
        if self.options.kind == "encoder-decoder":
            template = self._probe(("a",), target=True)
            if self.tokenizer.eos_token_id is not None and self.end_id not in template.suffix:
                template = Template(template.prefix, (), (*template.suffix, self.end_id))
        else:  # the target shares its sequence with at least one token of the prompt
            template = Template((), (), (self.end_id,))
            most = min(most, self.options.max_length - len(self.single.prefix) - 1)
        room = max(most - template.special, 0)
        return [(template.wrap(ids[:room], []).ids, len(ids) > room) for ids in self.ids(texts)]

    def _fit(self, template: Template, first: Ids, second: Ids) -> Encoded:
        room = max(self.options.max_length - template.special, 0)
        if len(first) + len(second) <= room:
            return template.wrap(first, second)
        keep_first, keep_second = longest_first(len(first), len(second), room)
        return template.wrap(first[:keep_first], second[:keep_second], truncated=True)

    def _joined(self, firsts: Sequence[str], seconds: Sequence[str]) -> list[Encoded]:
        """Decoders: both texts as one. Where that is too long, they are tokenised and cut one by one."""
        found = self.ids([PAIR_SEPARATOR.join(t for t in pair if t) for pair in zip(firsts, seconds, strict=True)])
        out = []
        for first, second, ids in zip(firsts, seconds, found, strict=True):
            if len(ids) + self.single.special > self.options.max_length and first and second:
                a, b = self.ids([first, PAIR_SEPARATOR + second])
                keep_a, keep_b = longest_first(len(a), len(b), max(self.options.max_length - self.single.special, 0))
                out.append(self.single.wrap(a[:keep_a], b[:keep_b], truncated=True))
            else:
                out.append(self._fit(self.single, ids, []))
        return out

    def _probe(self, texts: tuple[str, ...], target: bool = False) -> Template:
        """Read the template off the tokenizer's own encoding of `texts`."""
        arguments = {"text_target": texts[0]} if target else dict(zip(("text", "text_pair"), texts, strict=False))
        found = self.tokenizer(
            **arguments, return_special_tokens_mask=True, return_token_type_ids=True, return_attention_mask=False
        )
        ids, special = list(found["input_ids"]), list(found["special_tokens_mask"])
        if 0 not in special:
            raise ModelError(f"the tokenizer {self.name} cannot encode {' and '.join(texts)}; its vocabulary is broken")
        parts = self.ids(texts)
        lead, trail = special.index(0), special[::-1].index(0)
        middle = tuple(ids[lead + len(parts[0]) : len(ids) - trail - len(parts[1])]) if len(parts) == 2 else ()
        types = list(found.get("token_type_ids", [])) if len(parts) == 2 else []
        start = None
        if 1 in types and "token_type_ids" in self.tokenizer.model_input_names:
            start = types.index(1) - lead - len(parts[0])
        template = Template(tuple(ids[:lead]), middle, tuple(ids[len(ids) - trail :]), start)
        if template.wrap(parts[0], parts[1] if len(parts) == 2 else []).ids != ids:
            raise ModelError(f"the tokenizer {self.name} does not put special tokens around whole texts; not supported")
        return template


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How much is kept of two texts that do not fit `room`: the longer one is cut first, as by Hugging Face."""
    if min(first, second) <= room // 2:
        return (first, room - first) if first <= second else (room - second, second)
    half, rest = room // 2, room - room // 2
    return (rest, half) if first > second else (half, rest)


def _trimmed(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Character ranges without leading white space (byte-level and SentencePiece tokens begin with it)."""
    ranges = np.array(offsets, np.int64).reshape(-1, 2)
    for i, (start, end) in enumerate(offsets):
        while start < end and text[start].isspace():
            start += 1
        ranges[i, 0] = start
    return ranges
