"""Errors that are meant for the user.

Owns: the exception family of Sett. Every error a user can cause names the thing, the place and the remedy, and is
raised before anything expensive starts. Anything that is not a `SettError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SettError(Exception):
    """Base of all errors shown to the user as one message without a traceback. `exit_code` is the command's."""

    exit_code = 1


class ConfigError(SettError):
    """A recipe, an override or a DeepSpeed JSON is wrong. Raised before any process is spawned."""

    exit_code = 2


class DataError(SettError):
    """A task's declaration or rows are wrong; the message names file and line."""

    exit_code = 3


class ModelError(SettError):
    """A model or tokenizer cannot be loaded, or cannot do what the tasks ask of it."""

    exit_code = 4


class RunError(SettError):
    """A run directory, checkpoint or launch is not usable as asked."""

    exit_code = 5


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `valid`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""


def shortened(names: Sequence[str], most: int = 4) -> str:
    """`a, b, c, d and 17 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
