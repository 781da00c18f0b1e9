"""Training a SentencePiece tokenizer for a model that starts from random weights.

Owns: `train_sentencepiece`, what special tokens and templates a kind of model needs, and the translation of a
SentencePiece model into the fast tokenizer that `AutoTokenizer` loads (same ids as SentencePiece itself gives).
"""

from __future__ import annotations

import io
import random
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainer.errors import ConfigError, DataError
from trainer.tasks.raw import RawRow
from trainer.tasks.sources import open_source

ModelType = Literal["unigram", "bpe"]
Kind = Literal["encoder", "encoder-decoder", "decoder"]

_SPACE = "▁"
# SentencePiece silently leaves out lines of more than 4,192 bytes, and those that hold its mark of the unknown.
_LINE_BYTES = 4000
_RESERVED = "\u2585"
_BYTES_FROM = 1024  # the bytes take 256 places: in a smaller vocabulary little would be left for text


class _Special(NamedTuple):
    """Special tokens of a kind in the order of their ids, their roles, and what is put around one and two texts."""

    tokens: tuple[str, ...]
    roles: dict[str, str]
    single: str
    pair: str


_SPECIAL: dict[Kind, _Special] = {
    # BERT's names.
    "encoder": _Special(
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    # T5's ids of padding, end and unknown; a start and a mask token besides, for BART.
    "encoder-decoder": _Special(
        ("<pad>", "</s>", "<unk>", "<s>", "<mask>"),
        {"pad": "<pad>", "eos": "</s>", "unk": "<unk>", "bos": "<s>", "mask": "<mask>"},
        "$A </s>",
        "$A </s> $B:1 </s>:1",
    ),
    # Llama's ids, and a padding token, which Llama lacks.
    "decoder": _Special(
        ("<unk>", "<s>", "</s>", "<pad>"),
        {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"},
        "<s> $A",
        "<s> $A $B:1",
    ),
}


def train_sentencepiece(
    inputs: Sequence[Path],
    out: Path,
    model: ModelType = "unigram",
    vocab_size: int = 8000,
    kind: Kind = "encoder",
    *,
    columns: Sequence[str] | None = None,
    most_lines: int = 500_000,
    seed: int = 0,
) -> Path:
    """Train a tokenizer on text and write it as a folder for `AutoTokenizer` and `model.tokenizer`.

    Encoders and encoder-decoders normalise text (NFKC, runs of spaces are one). Decoders keep it as it is, and from a
    vocabulary of 1,024 on spell unknown characters as bytes, so that decoding gives back exactly what was encoded.

    Args:
        inputs: Files of any kind a task's source may be (.txt, .jsonl, .csv, .parquet, ...; text also compressed).
        out: Folder to write: `tokenizer.json`, `tokenizer_config.json` and the SentencePiece model `spiece.model`.
        model: Kind of SentencePiece model.
        vocab_size: Size of the vocabulary, special tokens included.
        kind: What the tokenizer is for; decides the special tokens and what is put around texts.
        columns: Columns to read; None reads every text of a row. Plain text has the one column `text`.
        most_lines: A larger text is sampled down to this many lines, since training holds them in memory.
        seed: Of that sample. The same text, arguments and seed give the same tokenizer.

    Returns:
        `out`.

    Raises:
        DataError: a file is missing, unreadable or without text, or a column is not there.
        ConfigError: the vocabulary is too large or too small for the text; the message names the bound.
    """
    if not inputs:
        raise DataError("no text to train a tokenizer on: name at least one file")
    if model not in ("unigram", "bpe"):
        raise ConfigError(f"tokenizer model '{model}': choose 'unigram' or 'bpe'")
    if kind not in _SPECIAL:
        raise ConfigError(f"tokenizer kind '{kind}': choose one of {', '.join(_SPECIAL)}")
    if vocab_size < 1:
        raise ConfigError(f"vocab_size {vocab_size}: must be positive")
    lines = _sample(_texts(inputs, columns), most_lines, seed)
    if not lines:
        raise DataError(f"{', '.join(map(str, inputs))}: no text to train a tokenizer on")
    try:
        serialized = _train(lines, model, vocab_size, kind)
    except RuntimeError as error:
        raise _explain(error, inputs, vocab_size) from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(serialized)
    special = _SPECIAL[kind]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_fast(proto, special, lossless=kind == "decoder"),
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": token for role, token in special.roles.items()},
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(out))
    (out / "spiece.model").write_bytes(serialized)
    return out


def _texts(inputs: Sequence[Path], columns: Sequence[str] | None) -> Iterator[str]:
    """The lines of all rows' texts."""
    for path in inputs:
        for chunk in open_source(str(path), "train").chunks():
            for row in chunk.rows():
                for text in _row_texts(path, row, columns):
                    yield from _lines(text)


def _row_texts(path: Path, row: RawRow, columns: Sequence[str] | None) -> Iterator[str]:
    place = path.parent / row.place
    if row.data is None:
        raise DataError(f"{place}: {row.problem}")
    for column in row.data if columns is None else columns:
        if column not in row.data:
            raise DataError(f"{place}: no column '{column}'; the row has {', '.join(row.data)}")
        value = row.data[column]
        values = value if isinstance(value, list) else [value]
        texts = [v for v in values if isinstance(v, str)]
        if columns is not None and len(texts) < len(values):
            raise DataError(f"{place}: column '{column}' holds a {type(value).__name__}, not text")
        yield from texts


def _lines(text: str) -> Iterator[str]:
    """Lines of a text that SentencePiece reads. Long ones are cut between words: no token spans a space."""
    for line in text.replace(_RESERVED, " ").splitlines():
        if len(line.encode()) > _LINE_BYTES:
            # A character has at most four bytes.
            yield from textwrap.wrap(line, _LINE_BYTES // 4, break_on_hyphens=False)
        elif line.strip():
            yield line


def _sample(lines: Iterator[str], most: int, seed: int) -> list[str]:
    """All lines, or `most` of them with equal chances (a reservoir, since nobody has counted them)."""
    # SentencePiece's own sampling is not used: it depends on what the process has drawn before.
    draw = random.Random(seed)
    kept: list[str] = []
    for index, line in enumerate(lines):
        if index < most:
            kept.append(line)
        elif (place := draw.randrange(index + 1)) < most:
            kept[place] = line
    return kept


def _train(lines: list[str], model: ModelType, vocab_size: int, kind: Kind) -> bytes:
    """The serialised SentencePiece model."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type=model,
        vocab_size=vocab_size,
        num_threads=16,  # the sums of EM depend on it, so it is not the machine's number of cores
        minloglevel=2,
        **_trainer_options(kind, vocab_size),
    )
    return written.getvalue()


def _trainer_options(kind: Kind, vocab_size: int) -> dict[str, Any]:
    special = _SPECIAL[kind]
    options: dict[str, Any] = {"control_symbols": []}
    roles = {token: role for role, token in special.roles.items()}
    # SentencePiece knows four roles; an encoder's [CLS] and [SEP] take the places of the start and the end.
    known = {"pad": "pad", "unk": "unk", "bos": "bos", "cls": "bos", "eos": "eos", "sep": "eos"}
    for index, token in enumerate(special.tokens):
        role = known.get(roles[token])
        if role is None:
            options["control_symbols"].append(token)
        else:
            options |= {f"{role}_id": index, f"{role}_piece": token}
    if kind == "decoder":
        options |= {
            "byte_fallback": vocab_size >= _BYTES_FROM,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        }
    return options


def _explain(error: RuntimeError, inputs: Sequence[Path], vocab_size: int) -> Exception:
    """The error a user can act on for what SentencePiece says about the size; anything else as it is."""
    of = f"{inputs[0]}" + (f" and {len(inputs) - 1} more" if len(inputs) > 1 else "")
    if too_large := re.search(r"Vocabulary size too high .*<= (\d+)", str(error)):
        return ConfigError(
            f"vocab_size {vocab_size} is too large for the text of {of}: the largest possible is {too_large[1]}"
        )
    if too_small := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return ConfigError(
            f"vocab_size {vocab_size} is too small for the text of {of}: its characters and the special tokens "
            f"take {too_small[1]}, so give more than that"
        )
    return error


def _fast(proto: Any, special: _Special, lossless: bool) -> Tokenizer:
    """The `tokenizers` pipeline that does what the SentencePiece model does."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    fallback = proto.trainer_spec.byte_fallback
    unk = special.roles["unk"]
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=ids[unk], byte_fallback=fallback))
    else:
        normal = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == p.NORMAL}
        tokenizer = Tokenizer(models.BPE(ids, _merges(normal), unk_token=unk, fuse_unk=True, byte_fallback=fallback))
    if lossless:
        # Every space is kept, so the mark in front can't depend on whether the text begins with one.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        # Unigram knows no kinds of pieces: uncut, the six letters "<0x41>" in a text would be taken for the byte.
        bytes_spelt = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
        words = pre_tokenizers.Split(_SPACE, "merged_with_next")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_spelt])
        back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(back)
    else:
        tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
        # Split first: then a token's character offsets leave out the space before it.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always")]
        )
        tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
    used = [(token, ids[token]) for token in special.tokens]
    tokenizer.post_processor = processors.TemplateProcessing(special.single, special.pair, used)
    return tokenizer


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """BPE's merges in order. SentencePiece stores only their results, in the order they were made."""
    merges: list[tuple[str, str]] = []
    for piece in ids:
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        possible = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(possible, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
