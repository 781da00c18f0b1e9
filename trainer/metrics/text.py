"""Metrics of generated text: predictions, references (one or several a row) and sources in, fractions out.

Owns: ROUGE and BLEU through `rouge_score` and `sacrebleu`, and SARI and GLEU written after their papers, because no
kept package has them. All functions take (predictions, references, sources).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import sacrebleu
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

Grams = Counter[tuple[str, ...]]

ORDER = 4
"""Longest n-grams of SARI and GLEU."""

GLEU_DRAWS = 500
"""Draws of one reference a sentence that GLEU is a mean over, as in its authors' evaluation."""


def exact_match(
    predictions: Sequence[str], references: Sequence[list[str]], sources: Sequence[str]
) -> dict[str, float]:
    """Share of predictions equal to a reference when runs of white space count as one space."""
    hits = [
        " ".join(p.split()) in {" ".join(r.split()) for r in refs}
        for p, refs in zip(predictions, references, strict=True)
    ]
    return {"exact_match": float(np.mean(hits))}


def rouge(predictions: Sequence[str], references: Sequence[list[str]], sources: Sequence[str]) -> dict[str, float]:
    """Mean F-measures with Porter stemming, the best reference of a row for each; sentences of Lsum are lines."""
    return _rouge(("rougeL", "rouge1", "rouge2", "rougeLsum"), predictions, references)


def rouge_l(predictions: Sequence[str], references: Sequence[list[str]], sources: Sequence[str]) -> dict[str, float]:
    """The rougeL of `rouge` alone."""
    return {"rouge_l": _rouge(("rougeL",), predictions, references)["rougeL"]}


def _rouge(kinds: tuple[str, ...], predictions: Sequence[str], references: Sequence[list[str]]) -> dict[str, float]:
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    rows = [scorer.score_multi(refs, p) for p, refs in zip(predictions, references, strict=True)]
    return {kind: float(np.mean([row[kind].fmeasure for row in rows])) for kind in kinds}


def bleu(predictions: Sequence[str], references: Sequence[list[str]], sources: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU of sacrebleu's defaults (13a tokens, case kept, exponential smoothing)."""
    most = max(len(refs) for refs in references)
    # sacrebleu wants the k-th reference of all rows together; None fills up rows with fewer.
    streams = [[refs[k] if k < len(refs) else None for refs in references] for k in range(most)]
    # `force` only silences the warning about text that is tokenised already.
    return {"bleu": float(sacrebleu.corpus_bleu(list(predictions), streams, force=True).score) / 100}


def sari(predictions: Sequence[str], references: Sequence[list[str]], sources: Sequence[str]) -> dict[str, float]:
    """SARI (Xu et al. 2016, "Optimizing Statistical Machine Translation for Text Simplification") of the corpus.

    How well n-grams of the source are kept and deleted and new ones added: the mean of the three F1s, each a mean over
    n = 1..4. A reference's say is one over the number of them. The variant of EASSE (Alva-Manchego et al. 2019), in
    which the baselines of ASSET are given: counts are summed over the corpus, deletion is an F1 too, 0/0 is 0, and text
    is lower-cased and split by sacrebleu's 13a tokenizer. (Sentence-level variants with 0/0 = 1 give a copy of the
    source more points than a human simplification.)
    """
    counts = np.zeros((3, ORDER, 3))
    for p, refs, source in zip(predictions, references, sources, strict=True):
        counts += _sari_counts(_words(source), _words(p), [_words(r) for r in refs])
    hits, done, wanted = np.moveaxis(counts, -1, 0)
    # 2PR / (P + R) with P = hits / done and R = hits / wanted.
    f1 = np.divide(2 * hits, done + wanted, out=np.zeros_like(hits), where=hits > 0)
    return {"sari": float(f1.mean())}


@cache
def _tokenizer() -> Tokenizer13a:
    return Tokenizer13a()


def _words(text: str) -> list[str]:
    words: list[str] = _tokenizer()(text.lower()).split()
    return words


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _sari_counts(source: list[str], output: list[str], references: list[list[str]]) -> NDArray[np.float64]:
    """[keep, delete, add] x n x [done rightly, done, should be done]."""
    counts = np.zeros((3, ORDER, 3))
    for n in range(1, ORDER + 1):
        wanted: Grams = sum((_grams(reference, n) for reference in references), Counter())
        # Source and output count once for each reference, so that they compare with the references' summed counts.
        before, after = (
            Counter({gram: count * len(references) for gram, count in _grams(words, n).items()})
            for words in (source, output)
        )
        for row, done, right in ((0, before & after, before & wanted), (1, before - after, before - wanted)):
            counts[row, n - 1] = (done & right).total(), done.total(), right.total()
        counts[:, n - 1] /= len(references)
        added, right_to_add = after.keys() - before.keys(), wanted.keys() - before.keys()
        counts[2, n - 1] = len(added & right_to_add), len(added), len(right_to_add)
    return counts


def gleu(predictions: Sequence[str], references: Sequence[list[str]], sources: Sequence[str]) -> dict[str, float]:
    """GLEU of grammatical error correction (Napoles et al. 2015, in the 2016 form without tuning).

    BLEU that takes off what was left uncorrected: n-grams of the output that stand in the source but not in the
    reference. Corpus level, words split at white space. With several references it is the mean over 500 seeded draws
    of one reference a sentence. (Not the sentence metric of the same name in machine translation.)
    """
    counts = [
        np.array([_gleu_counts(p.split(), r.split(), source.split()) for r in refs], dtype=np.float64)
        for p, refs, source in zip(predictions, references, sources, strict=True)
    ]
    draws = [_corpus_gleu(total) for total in _drawn_totals(counts)]
    return {"gleu": math.fsum(draws) / len(draws)}


def _gleu_counts(output: list[str], reference: list[str], source: list[str]) -> list[int]:
    """[output length, reference length, then numerator and denominator of each n-gram precision]."""
    counts = [len(output), len(reference)]
    for n in range(1, ORDER + 1):
        out, ref, src = _grams(output, n), _grams(reference, n), _grams(source, n)
        uncorrected = Counter({gram: count for gram, count in src.items() if gram not in ref})
        counts += [max((out & ref).total() - (out & uncorrected).total(), 0), max(len(output) - n + 1, 0)]
    return counts


def _drawn_totals(counts: list[NDArray[np.float64]]) -> Iterator[NDArray[np.float64]]:
    """The corpus' summed counts for each draw of one reference a sentence."""
    choices = np.array([len(row) for row in counts])
    start = np.concatenate([[0], np.cumsum(choices)[:-1]])
    flat = np.concatenate(counts)
    if (choices == 1).all():
        yield flat.sum(0)
        return
    generator = np.random.default_rng(0)
    for _ in range(GLEU_DRAWS):
        yield flat[start + generator.integers(choices)].sum(0)


def _corpus_gleu(total: NDArray[np.float64]) -> float:
    if (total == 0).any():
        return 0.0
    output, reference = total[:2]
    precision = np.log(total[2::2] / total[3::2]).mean()
    return float(np.exp(min(0.0, 1 - reference / output) + precision))
