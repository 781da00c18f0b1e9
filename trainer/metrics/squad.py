"""Exact match and token F1 of extracted answers, as SQuAD defines them.

Owns: the answer normalisation of Rajpurkar et al. 2016 (lower case, no punctuation, no articles, single spaces) and
the no-answer rules of Rajpurkar et al. 2018, which version 1.1 data with unanswerable rows follows here too.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without articles, one space between words; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the bags of words of two normalised strings; when one is empty, whether both are."""
    guessed, true = prediction.split(), answer.split()
    if not guessed or not true:
        return float(guessed == true)
    common = (Counter(guessed) & Counter(true)).total()
    return 2 * common / (len(guessed) + len(true))


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]], version_2: bool) -> dict[str, float]:
    """Means over rows of the best F1 and exact match against any of a row's answers (none: the empty string is right).

    `version_2` adds the same numbers over the rows with and without an answer, where there are such rows.
    """
    f1: list[float] = []
    exact: list[float] = []
    answerable: list[bool] = []
    for prediction, texts in zip(predictions, answers, strict=True):
        guessed = normalize_answer(prediction)
        # An answer that normalises to nothing ("the") could only be matched by not answering: left out, as in 2.0.
        golds = [gold for gold in map(normalize_answer, texts) if gold] or [""]
        f1.append(max(token_f1(guessed, gold) for gold in golds))
        exact.append(float(guessed in golds))
        answerable.append(golds != [""])
    scores = {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}
    if version_2:
        has_answer = np.array(answerable)
        for name, rows in (("has_answer", has_answer), ("no_answer", ~has_answer)):
            if rows.any():
                scores[f"{name}_f1"] = float(np.mean(np.array(f1)[rows]))
                scores[f"{name}_exact_match"] = float(np.mean(np.array(exact)[rows]))
    return scores
