"""Trained tokenizers: what stock `transformers` loads does what SentencePiece itself does."""

from __future__ import annotations

import gzip
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest
import sentencepiece
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from trainer.errors import ConfigError, DataError
from trainer.run.tokenizer import Kind, ModelType, train_sentencepiece

MODELS = get_args(ModelType)
KINDS = get_args(Kind)
DATA = Path(__file__).resolve().parents[2] / "data"
with gzip.open(DATA / "cad_nli" / "train.jsonl.gz", "rt", encoding="utf-8") as _file:
    LINES = [json.loads(line)["text_b"].strip() for line in _file][:1500]
LINES += ["Héllo wörld, naïve café!", "Numbers 0123456789 and (brackets) [too]; punctuation: yes?", "日本語 text"]
SAMPLES = ["the white house", "where was the river?", "Answering questions, (slowly) by 2023!", "naïve  city", "a"]
SIZE = 1024


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(LINES) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    return {
        (kind, model): train_sentencepiece([corpus], base / f"{kind}-{model}", model, SIZE, kind)
        for kind in KINDS
        for model in MODELS
    }


def load(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    return tokenizer


def all_pairs() -> Iterable[tuple[str, str]]:
    return [(kind, model) for kind in KINDS for model in MODELS]


@pytest.mark.parametrize(("kind", "model"), all_pairs())
def test_ids_are_those_of_sentencepiece(folders: dict[tuple[str, str], Path], kind: str, model: str) -> None:
    folder = folders[kind, model]
    tokenizer = load(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert len(tokenizer) == reference.get_piece_size() == SIZE
    for text in SAMPLES + LINES[:100] + LINES[-3:]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), text


@pytest.mark.parametrize(("kind", "model"), all_pairs())
def test_text_comes_back(folders: dict[tuple[str, str], Path], kind: str, model: str) -> None:
    tokenizer = load(folders[kind, model])
    for text in LINES:
        ids = tokenizer(text)["input_ids"]
        if tokenizer.unk_token_id not in ids:
            assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize("model", MODELS)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1))
@example(text="<0x41>")
@example(text="  two\nlines\t ")
def test_decoders_lose_nothing(folders: dict[tuple[str, str], Path], model: str, text: str) -> None:
    tokenizer = load_once(folders["decoder", model])
    assume(not any(token in text for token in tokenizer.all_special_tokens))
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_small_decoder_vocabulary_has_no_bytes(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load(train_sentencepiece([corpus], tmp_path / "out", "unigram", 200, "decoder"))
    assert tokenizer.unk_token_id in tokenizer("\u2603")["input_ids"]
    assert tokenizer.decode(tokenizer("two  rivers")["input_ids"], skip_special_tokens=True) == "two  rivers"


_LOADED: dict[Path, PreTrainedTokenizerFast] = {}


def load_once(folder: Path) -> PreTrainedTokenizerFast:
    if folder not in _LOADED:
        _LOADED[folder] = load(folder)
    return _LOADED[folder]


@pytest.mark.parametrize("model", MODELS)
def test_encoder_tokens_and_templates(folders: dict[tuple[str, str], Path], model: str) -> None:
    tokenizer = load(folders["encoder", model])
    roles = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert [*roles, tokenizer.mask_token_id] == [0, 1, 2, 3, 4]
    a, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("the river", "white house"))
    pair = tokenizer("the river", "white house", return_token_type_ids=True)
    assert tokenizer("the river")["input_ids"] == [2, *a, 3]
    assert pair["input_ids"] == [2, *a, 3, *b, 3]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert tokenizer("the [MASK] house")["input_ids"].count(4) == 1


@pytest.mark.parametrize("model", MODELS)
def test_encoder_decoder_ends_with_eos(folders: dict[tuple[str, str], Path], model: str) -> None:
    tokenizer = load(folders["encoder-decoder", model])
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.mask_token_id is not None
    a, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("the river", "white house"))
    assert tokenizer("the river")["input_ids"] == [*a, 1]
    assert tokenizer("the river", "white house")["input_ids"] == [*a, 1, *b, 1]


@pytest.mark.parametrize("model", MODELS)
def test_decoder_starts_with_bos(folders: dict[tuple[str, str], Path], model: str) -> None:
    tokenizer = load(folders["decoder", model])
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        0,
        1,
        2,
        3,
    )
    a = tokenizer("the river", add_special_tokens=False)["input_ids"]
    assert tokenizer("the river")["input_ids"] == [1, *a]


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder"])
@pytest.mark.parametrize("model", MODELS)
def test_offsets_name_the_characters(folders: dict[tuple[str, str], Path], kind: str, model: str) -> None:
    """Spans are read off these, so a token must not claim the space before it."""
    text = "the  white house, by Hello"
    tokenizer = load(folders[kind, model])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    words = [token.removeprefix("▁") for token in encoded.tokens()]
    spans = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert [span for span, word in zip(spans, words, strict=True) if word] == [word for word in words if word]
    assert not any(" " in span for span in spans)


@pytest.mark.parametrize(
    ("kind", "config", "auto"),
    [
        ("encoder", BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2), AutoModelForMaskedLM),
        ("encoder-decoder", T5Config(d_model=8, num_layers=1, num_heads=2, d_kv=4), AutoModelForSeq2SeqLM),
        ("decoder", LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2), AutoModelForCausalLM),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_survives_beside_a_model(
    folders: dict[tuple[str, str], Path], tmp_path: Path, model: str, kind: str, config: object, auto: type
) -> None:
    """An exported model's folder has a config.json whose type must not turn the tokenizer into another one."""
    tokenizer = load(folders[kind, model])
    config.vocab_size = SIZE  # type: ignore[attr-defined]
    auto.from_config(config).save_pretrained(tmp_path)  # type: ignore[attr-defined]
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    for text in SAMPLES:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(SAMPLES[0])["input_ids"], skip_special_tokens=True) == SAMPLES[0]


@pytest.mark.parametrize("model", MODELS)
def test_same_text_same_bytes(corpus: Path, tmp_path: Path, model: ModelType) -> None:
    """Also when the text is sampled, and whatever the process trained before."""
    files = []
    for name in ("one", "two"):
        out = train_sentencepiece([corpus], tmp_path / name, model, 150, "encoder", most_lines=200)
        files.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert files[0] == files[1]
    other = train_sentencepiece([corpus], tmp_path / "three", model, 150, "encoder", most_lines=200, seed=1)
    assert (other / "tokenizer.json").read_bytes() != files[0]["tokenizer.json"]


def test_columns_and_compression(tmp_path: Path) -> None:
    rows = [{"context": line, "choices": ["zebra zebra", "quagga"], "label": 1} for line in LINES]
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    every = load(train_sentencepiece([path], tmp_path / "all", "bpe", 300, "encoder"))
    one = load(train_sentencepiece([path], tmp_path / "one", "bpe", 300, "encoder", columns=["context"]))
    assert "▁zebra" in every.get_vocab()
    assert "▁zebra" not in one.get_vocab()


def test_long_lines_count(tmp_path: Path) -> None:
    """SentencePiece skips lines of more than 4,192 bytes; here that is the whole text."""
    path = tmp_path / "long.txt"
    path.write_text(" ".join(LINES), "utf-8")
    tokenizer = load(train_sentencepiece([path], tmp_path / "out", "bpe", 300, "encoder"))
    assert "▁woman" in tokenizer.get_vocab()


@pytest.mark.parametrize("model", MODELS)
def test_vocabulary_too_large_names_the_largest(corpus: Path, tmp_path: Path, model: ModelType) -> None:
    with pytest.raises(ConfigError, match=r"50000 is too large .*corpus\.txt: the largest possible is (\d+)") as error:
        train_sentencepiece([corpus], tmp_path / "out", model, 50_000, "encoder")
    assert not (tmp_path / "out").exists()
    largest = int(str(error.value).rsplit(" ", 1)[1])
    assert len(load(train_sentencepiece([corpus], tmp_path / "out", model, largest, "encoder"))) == largest


def test_vocabulary_too_small_names_the_bound(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"20 is too small .* take (\d+)"):
        train_sentencepiece([corpus], tmp_path / "out", "bpe", 20, "encoder")


def test_input_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt: no such file"):
        train_sentencepiece([tmp_path / "absent.txt"], tmp_path / "out")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.txt: no text"):
        train_sentencepiece([empty], tmp_path / "out")
    with pytest.raises(DataError, match="at least one file"):
        train_sentencepiece([], tmp_path / "out")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no column 'text'; the row has body"):
        train_sentencepiece([rows], tmp_path / "out", columns=["text"])
    rows.write_text('{"text": 1}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'text' holds a int"):
        train_sentencepiece([rows], tmp_path / "out", columns=["text"])
    rows.write_text('{"text": "one"\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: bad JSON"):
        train_sentencepiece([rows], tmp_path / "out")
    assert not (tmp_path / "out").exists()
