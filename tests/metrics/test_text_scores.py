"""Metrics of generated and extracted text against published examples and numbers worked out by hand."""

import gzip
import json
import math
from pathlib import Path

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from trainer.metrics import text
from trainer.metrics.squad import normalize_answer, squad_scores, token_f1

words = st.lists(st.sampled_from("abcde"), min_size=1, max_size=8).map(" ".join)


def test_squad_normalisation():
    assert normalize_answer("The  Cat's, an old-Hat!") == "cats oldhat"
    assert normalize_answer("theatre an") == "theatre"
    assert normalize_answer("The") == ""


def test_squad_by_hand():
    # Best of the answers: "cat sat" shares 2 of 3 words with the prediction "cat sat down": 2*2/(3+2).
    scores = squad_scores(["the cat sat down"], [["dog", "The cat sat"]], version_2=False)
    assert scores == {"f1": pytest.approx(4 / 5), "exact_match": 0.0}
    assert squad_scores(["The Cat"], [["cat!"]], version_2=False) == {"f1": 1.0, "exact_match": 1.0}


def test_repeated_words_count_as_often_as_they_stand_on_both_sides():
    assert token_f1("x x x", "x x y") == pytest.approx(2 * 2 / 6)


def test_squad_2_with_and_without_answers():
    predictions = ["", "wrong", "right one", ""]
    answers = [[], [], ["right"], ["missed"]]
    scores = squad_scores(predictions, answers, version_2=True)
    assert scores["no_answer_f1"] == scores["no_answer_exact_match"] == 0.5
    assert scores["has_answer_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert scores["has_answer_exact_match"] == 0.0
    assert scores["f1"] == pytest.approx((1 + 0 + 2 / 3 + 0) / 4)
    assert scores["exact_match"] == 0.25


def test_squad_2_leaves_out_parts_without_rows():
    assert set(squad_scores(["x"], [["x"]], version_2=True)) == {
        "f1",
        "exact_match",
        "has_answer_f1",
        "has_answer_exact_match",
    }


def test_answers_that_normalise_to_nothing_are_no_answers():
    assert squad_scores(["x", ""], [["the", "x"]] * 2, version_2=True)["f1"] == 0.5
    assert squad_scores([""], [["the"]], version_2=True)["no_answer_f1"] == 1.0


def test_exact_match_counts_white_space_runs_as_one_space():
    predictions = ["a  b\n", "A b", "a b"]
    references = [["x", "a b"], ["a b"], ["ab"]]
    assert text.exact_match(predictions, references, [""] * 3)["exact_match"] == pytest.approx(1 / 3)


def test_rouge_is_the_best_reference_of_the_library():
    prediction, references = "the cat was running", ["a dog ran", "the cat runs away"]
    scores = text.rouge([prediction, "x"], [references, ["x"]], ["", ""])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        best = max(scorer.score(r, prediction)[kind].fmeasure for r in references)
        alone = 0.0 if kind == "rouge2" else 1.0  # "x" has no bigram
        assert scores[kind] == pytest.approx((best + alone) / 2)
    # By hand: "runs" and "running" have one stem, so "the cat _ run" shares 3 of 4 and 4 words.
    assert scores["rouge1"] == pytest.approx((3 / 4 + 1) / 2)
    assert text.rouge_l([prediction, "x"], [references, ["x"]], ["", ""]) == {"rouge_l": scores["rougeL"]}


def test_bleu_is_the_corpus_score_of_sacrebleu():
    predictions = ["the cat sat on the mat today", "it rains cats and dogs"]
    references = [["the cat sat on a mat today", "a cat sat on the mat"], ["it rains cats and dogs now"]]
    # A row's own reference twice is the same as a row with one reference.
    streams = [[r[0] for r in references], [references[0][1], references[1][0]]]
    expected = sacrebleu.corpus_bleu(predictions, streams).score / 100
    assert 0.3 < expected < 1
    assert text.bleu(predictions, references, ["", ""])["bleu"] == pytest.approx(expected, abs=1e-12)


def test_sari_by_hand():
    # Unigrams of "a b" -> "a c" with reference "a d": kept a, rightly: 1; deleted b, rightly: 1; added c, wrongly: 0.
    # Bigrams: deleted "a b", rightly: 1; added "a c", wrongly: 0; nothing kept: 0. Longer ones do not exist: 0.
    assert text.sari(["a c"], [["a d"]], ["a b"])["sari"] == pytest.approx((1 / 4 + 2 / 4 + 0) / 3, abs=1e-12)


def test_sari_counts_fractions_of_references():
    # "a b" -> "a", references "a" and "a b". Keep: a (2 votes of 2), b should have been (1 vote): P 1, R 2/3, F 4/5.
    # Delete: b and "a b", each with 1 vote of 2: P 1/2, R 1, F 2/3. Add: nothing.
    expected = (4 / 5 / 4 + 2 * (2 / 3) / 4 + 0) / 3
    assert text.sari(["A"], [["a", "a b"]], ["a b"])["sari"] == pytest.approx(expected, abs=1e-12)


def test_sari_sums_counts_over_the_corpus():
    # Added words: "x" of the wanted {x, y, z} and then "p", not wanted: P 1/2, R 1/4 (of x, y, z and q), F 1/3.
    # Everything is kept, rightly (a, b and "a b"), and nothing is deleted.
    predictions, references, sources = ["a b x", "a b p"], [["a b x y z"], ["a b q"]], ["a b", "a b"]
    added = (1 / 3 + 2 * 1 / (2 + 4) + 2 * 1 / (2 + 4) + 0) / 4  # "b x" and "a b x" are right, no 4-gram is added
    assert text.sari(predictions, references, sources)["sari"] == pytest.approx((2 / 4 + 0 + added) / 3, abs=1e-12)


def test_sari_weighs_rows_alike_however_many_references_they_have():
    rows = (["a b", "c d"], [["a"], ["c d e"]], ["a b", "c d"])
    doubled = (rows[0], [["a"], ["c d e"] * 2], rows[2])
    assert text.sari(*doubled)["sari"] == pytest.approx(text.sari(*rows)["sari"], abs=1e-12)


def test_sari_of_a_perfect_rewrite_is_one():
    source, rewrite = "a b c d e f g h", "a b c d w x y z"
    assert text.sari([rewrite], [[rewrite]], [source])["sari"] == pytest.approx(1.0)


@given(words, st.lists(words, min_size=1, max_size=3), words)
@settings(max_examples=60, deadline=None)
def test_sari_and_gleu_stay_fractions(prediction, references, source):
    assert 0 <= text.sari([prediction], [references], [source])["sari"] <= 1 + 1e-12
    assert 0 <= text.gleu([prediction], [references], [source])["gleu"] <= 1 + 1e-12


def test_gleu_by_hand():
    # Source "a b c d e", reference "a b c d f", output "a b c d e": n-grams shared with the reference 4, 3, 2, 1 of
    # 5, 4, 3, 2; left uncorrected (in source, not in reference): 1 at each order.
    source, reference = "a b c d e", "a b c d f"
    assert text.gleu([source], [[reference]], [source])["gleu"] == 0.0  # 4-grams: 1 shared - 1 uncorrected
    output = "a b c d g"
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert text.gleu([output], [[reference]], [source])["gleu"] == pytest.approx(expected, abs=1e-12)
    # Uncorrected text costs at corpus level: 4+5-1 of 10, 3+4-1 of 8, 2+3-1 of 6, 1+2-1 of 4.
    corpus = text.gleu([source, reference], [[reference]] * 2, [source] * 2)["gleu"]
    assert corpus == pytest.approx((8 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25, abs=1e-12)


def test_gleu_brevity_penalty():
    output, reference = "a b c d", "a b c d e f"
    assert text.gleu([output], [[reference]], [reference])["gleu"] == pytest.approx(math.exp(1 - 6 / 4), abs=1e-12)


def test_gleu_of_several_references_is_a_mean_over_draws():
    good, bad = "a b c d e", "v w x y z"
    both = text.gleu([good], [[good, bad]], ["s"])["gleu"]
    # One sentence: a draw gives 1 or 0, so the mean is the share of good draws.
    assert both * text.GLEU_DRAWS == pytest.approx(round(both * text.GLEU_DRAWS))
    assert 0.4 < both < 0.6
    assert text.gleu([good], [[good, bad]], ["s"])["gleu"] == both
    assert text.gleu([good], [[good, good]], ["s"])["gleu"] == pytest.approx(1.0)


DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("task", "metric", "published"),
    [("jfleg_gec", text.gleu, 40.54), ("asset_simplification", text.sari, 20.73)],
)
def test_published_scores_of_copying_the_source(task, metric, published):
    """The SOURCE line of JFLEG's leader board and the identity baseline of ASSET, on the same test sets."""
    path = DATA / task / "test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the task collection is not beside the checkout: no {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sources = [row["source"] for row in rows]
    (score,) = metric(sources, [row["references"] for row in rows], sources).values()
    assert round(100 * score, 2) == published
