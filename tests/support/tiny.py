"""Tiny tasks, tokenizers and recipes of every family and model kind, made in a folder in a second or two."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from trainer.config import Recipe, recipe_from
from trainer.run.tokenizer import train_sentencepiece

# fmt: off
WORDS = [
    "the", "a", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "rain", "falls", "on", "green",
    "hills", "and", "old", "stone", "walls", "where", "small", "birds", "sing", "of", "summer", "winter", "bread",
    "milk", "honey", "river", "boat", "storm", "light", "dark", "night", "morning", "road", "town",
]
# fmt: on

FAMILIES = {
    "encoder": ("topic", "same", "score", "choose", "find", "fill"),
    "encoder-decoder": ("topic", "choose", "find", "rewrite"),
    "decoder": ("topic", "choose", "find", "rewrite", "read"),
}

MODELS: dict[str, dict[str, Any]] = {
    "encoder": {"model_type": "bert", "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2},
    "encoder-decoder": {
        "model_type": "bart",
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_layerdrop": 0.5,
        "decoder_layerdrop": 0.5,
    },
    "decoder": {
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    },
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(draw: random.Random, low: int = 3, high: int = 14) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def row_of(name: str, draw: random.Random) -> dict[str, Any]:
    """A row that can be learnt from: the answer is in the words."""
    words = text(draw)
    match name:
        case "topic":
            return {"text": words, "label": WORDS.index(words.split()[0]) % 3}
        case "same":
            other = words if draw.random() < 0.5 else text(draw)
            return {"text_a": words, "text_b": other, "label": int(other == words)}
        case "score":
            return {"text_a": words, "text_b": "", "score": min(5.0, len(words.split()) / 3)}
        case "choose":
            choices = [text(draw, 2, 5) for _ in range(draw.randint(2, 4))]
            label = draw.randrange(len(choices))
            return {"context": choices[label], "choices": choices, "label": label}
        case "find":
            context = text(draw, 8, 40)
            if draw.random() < 0.2:
                return {"context": context, "question": "the dog", "answers": []}
            start = draw.randrange(len(context.split()))
            at = len(" ".join(context.split()[:start])) + (1 if start else 0)
            word = context.split()[start]
            return {"context": context, "question": f"where {word}", "answers": [{"text": word, "start": at}]}
        case "rewrite":
            return {"source": words, "target": " ".join(reversed(words.split()[:4]))}
        case _:
            return {"text": words}


def task(name: str, folder: Path, rows: int = 60, dev: int = 12) -> dict[str, Any]:
    """A declaration of a tiny task with its files; `name` decides the family."""
    draw = random.Random(name)
    families = {
        "topic": {"family": "classification", "labels": ["x", "y", "z"]},
        "same": {"family": "pair_classification", "labels": ["no", "yes"], "metric": "f1"},
        "score": {"family": "regression", "score_range": [0, 5]},
        "choose": {"family": "multiple_choice"},
        "find": {"family": "span", "metric": "squad_v2_f1_em"},
        "rewrite": {"family": "seq2seq"},
        "read": {"family": "causal_lm"},
        "fill": {"family": "masked_lm"},
    }
    return {
        "name": name,
        **families[name],
        "train": write_rows(folder / name / "train.jsonl", [row_of(name, draw) for _ in range(rows)]),
        "dev": write_rows(folder / name / "dev.jsonl", [row_of(name, draw) for _ in range(dev)]),
    }


def values(folder: Path, kind: str = "encoder", **changes: Any) -> dict[str, Any]:
    """A recipe as plain values: all families of `kind`, a random model, four micro-batches a window."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        draw = random.Random(0)
        folder.mkdir(parents=True, exist_ok=True)
        corpus.write_text("\n".join(text(draw, 5, 20) for _ in range(400)))
    tokenizer = folder / f"tokenizer-{kind}"
    if not tokenizer.exists():
        train_sentencepiece([corpus], tokenizer, "unigram", 64, kind)  # type: ignore[arg-type]
    hidden = {} if kind == "encoder-decoder" else {"hidden_size": 32}
    recipe: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder / "runs"),
        "cache": str(folder / "cache"),
        "workers": 1,
        "model": {
            "config": {**MODELS[kind], **hidden, "vocab_size": 128, "max_position_embeddings": 128},
            "tokenizer": str(tokenizer),
            "max_length": 48,
            "max_target_length": 12,
            "span_stride": 8,
        },
        "tasks": [task(name, folder / "tasks") for name in FAMILIES[kind]],
        "window": {"micro_batches": 4, "tokens": 160},
        # Some gradients are zero in exact arithmetic (attention's key biases). A usual epsilon would let AdamW turn
        # their rounding noise into steps, and no two orders of summation would agree.
        "optimizer": {"lr": 2e-3, "head_lr": 5e-3, "warmup": 0.1, "eps": 1e-4},
        "training": {"steps": 8, "precision": "fp32", "log_every": 1},
        "checkpoint": {"export": []},
        "deepspeed": "cpu",
        "kernels": "fused",  # not `auto`: a test must not fall back unseen
    }
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(recipe.get(key), dict) else value
    return recipe


def recipe(folder: Path, kind: str = "encoder", **changes: Any) -> Recipe:
    return recipe_from(values(folder, kind, **changes))
