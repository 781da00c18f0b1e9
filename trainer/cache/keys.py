"""What a cached file depends on.

Owns: the cache key, and the memory of source fingerprints that makes a second start cost a few `stat` calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.cache.encode import ENCODER_VERSION, evaluation_differs
from trainer.cache.layout import LAYOUT_VERSION
from trainer.cache.text import EncodeOptions
from trainer.errors import ModelError
from trainer.tasks.sources import is_hub, open_source
from trainer.tasks.spec import Family, TaskSpec, TextOf

_TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
}
_TOKENIZER_SUFFIXES = {".model", ".tiktoken", ".spm", ".bpe"}


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or hub name."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its readers do, and all of it is about the user's files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path}: its tokenizer cannot be loaded: {reason[0]}") from error


def tokenizer_hash(path: str) -> str:
    """Hash of what decides the tokens of a text: the tokenizer's files and the libraries that read them."""
    digest = hashlib.blake2b(digest_size=16)
    for library in ("tokenizers", "transformers"):
        digest.update(f"{library} {version(library)}\0".encode())
    folder = Path(path)
    if folder.is_dir():
        _add_folder(digest, folder)
    else:  # a hub name: what it stands for may change, its files lie wherever the hub's client put them
        with tempfile.TemporaryDirectory() as saved:
            load_tokenizer(path).save_pretrained(saved)
            _add_folder(digest, Path(saved))
    return digest.hexdigest()


def _add_folder(digest: Any, folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.name in _TOKENIZER_FILES or file.suffix in _TOKENIZER_SUFFIXES:
            data = file.read_bytes()
            digest.update(f"{file.name} {len(data)}\0".encode() + data)
    config = folder / "config.json"
    if config.is_file():  # names the tokenizer's class where tokenizer_config.json does not
        values = json.loads(config.read_bytes())
        digest.update(json.dumps([values.get("model_type"), values.get("tokenizer_class")]).encode())


def cache_key(spec: TaskSpec, evaluation: bool, fingerprint: str, tokenizer: str, options: EncodeOptions) -> str:
    """Name of the cached rows: equal whenever the rows would be, whatever else of task and recipe differs."""
    evaluation = evaluation and evaluation_differs(spec)
    used = asdict(options)
    if spec.family is not Family.SEQ2SEQ:
        del used["max_target_length"]
    if spec.family is not Family.SPAN:
        del used["span_stride"]
    if spec.family is not Family.SPAN or evaluation:
        del used["span_windows"]
    if isinstance(spec, TextOf):
        used["of"] = _declared(spec.of)
    parts = {
        "versions": [LAYOUT_VERSION, ENCODER_VERSION],
        "task": _declared(spec),
        "evaluation": evaluation,
        "source": fingerprint,
        "tokenizer": tokenizer,
        "options": used,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def _declared(spec: TaskSpec) -> dict[str, Any]:
    """What a declaration says about its rows. `drop` is named where there is one: keys from before it was stay good."""
    named = {"family", "labels", "num_labels", "columns", "score_range"} | ({"drop"} if spec.drop else set())
    return spec.model_dump(mode="json", include=named)


class Fingerprints:
    """Fingerprints of sources, remembered by the size and time of change of their files."""

    def __init__(self, cache_dir: Path) -> None:
        self.path = cache_dir / "fingerprints.json"
        self._known: dict[str, list[Any]] = self._read()
        self._new: dict[str, list[Any]] = {}

    def of(self, uri: str, split: str) -> str:
        """The source's fingerprint, computed when its files are not as they were."""
        state = None if is_hub(uri) else _state(Path(uri))
        name = f"{os.path.abspath(uri)}@{split}"
        if state is not None and self._known.get(name, [None])[0] == state:
            return str(self._known[name][1])
        fingerprint = open_source(uri, split).fingerprint()
        if state is not None:
            self._known[name] = self._new[name] = [state, fingerprint]
        return fingerprint

    def save(self) -> None:
        """Write what was learnt. Of two runs at once one may forget what the other learnt; it is computed again."""
        if not self._new:
            return
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".fingerprints-", suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({**self._read(), **self._new}, file)
        os.replace(temporary, self.path)

    def _read(self) -> dict[str, list[Any]]:
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _state(path: Path) -> str | None:
    """Size and times of a file, or of all files of a folder; None when there is nothing."""
    if not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\0".encode())
    return digest.hexdigest()
