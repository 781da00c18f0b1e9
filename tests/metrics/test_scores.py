"""Every metric against hand-worked numbers or the library that defines it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics

from trainer.errors import DataError
from trainer.metrics.ranking import map_mrr
from trainer.metrics.scores import PRIMARY, check_metric, compute, higher_is_better, majority, mean_score
from trainer.tasks.spec import FAMILIES, Family, TaskSpec


def spec(family: str = "classification", classes: int = 3, **more) -> TaskSpec:
    labels = {"num_labels": classes} if "classification" in family else {}
    return TaskSpec(name="t", family=family, **labels, **more)


def one_hot(labels, classes=3):
    return [np.eye(classes)[label] for label in labels]


def example_of(family: Family):
    """Two predictions and references of a family in the documented formats."""
    if FAMILIES[family].has_classes:
        return one_hot([1, 0], 2), [1, 1]
    return {
        Family.REGRESSION: ([1.0, 2.0], [{"score": 3.0}, {"score": 4.0}]),
        Family.MULTIPLE_CHOICE: ([np.array([0.1, 0.9]), np.array([3.0, 1.0, 2.0])], [1, 2]),
        Family.SPAN: (["x", ""], [{"answers": ["x"], "context": "x y"}, {"answers": [], "context": "z"}]),
        Family.SEQ2SEQ: (["a b c d", "e"], [{"references": ["a b c d"], "source": "a"}] * 2),
        Family.MASKED_LM: ([(1.0, 2), (3.0, 4)], [None, None]),
        Family.CAUSAL_LM: ([(1.0, 2), (3.0, 4)], [None, None]),
    }[family]


@pytest.mark.parametrize(("family", "metric"), [(f, m) for f in Family for m in FAMILIES[f].metrics])
def test_each_metric_a_family_may_have_is_computed_primary_number_first(family, metric):
    predictions, references = example_of(family)
    if metric == "perplexity":
        predictions = [(1.0, 2), (3.0, 4)]
    if metric == "map_mrr":
        references = [{"group": "q", "label": 1}, {"group": "q", "label": 0}]
    scores = compute(metric, predictions, references, spec(family.value, 2, metric=metric))
    assert next(iter(scores)) == PRIMARY[metric]
    assert all(isinstance(value, float) and math.isfinite(value) for value in scores.values())
    assert higher_is_better(metric) == (metric != "perplexity")


TRUE = [0, 0, 0, 1, 1, 2]
GUESS = [0, 0, 1, 1, 2, 2]
# Class F1: 0 has 2 of 2 guessed and 3 true: 4/5; 1 has 1 of 2 and 2: 1/2; 2 has 1 of 2 and 1: 2/3.


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", 4 / 6),
        ("micro_f1", 4 / 6),
        ("macro_f1", (4 / 5 + 1 / 2 + 2 / 3) / 3),
        ("weighted_f1", (3 * 4 / 5 + 2 * 1 / 2 + 1 * 2 / 3) / 6),
    ],
)
def test_classification_by_hand(metric, expected):
    scores = compute(metric, one_hot(GUESS), TRUE, spec())
    assert scores[metric] == pytest.approx(expected, abs=1e-12)
    assert scores["accuracy"] == pytest.approx(4 / 6, abs=1e-12)


def test_binary_f1_and_mcc_by_hand():
    true, guess = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]  # tp 2, fn 1, fp 1, tn 1
    for metric in ("f1", "f1_positive"):
        assert compute(metric, one_hot(guess, 2), true, spec(classes=2))[metric] == pytest.approx(4 / 6)
    expected = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert compute("mcc", one_hot(guess, 2), true, spec(classes=2))["mcc"] == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_classification_equals_scikit_learn(pairs):
    true, guess = zip(*pairs, strict=True)
    for metric, average in (("macro_f1", "macro"), ("micro_f1", "micro"), ("weighted_f1", "weighted")):
        expected = sklearn_metrics.f1_score(true, guess, average=average, zero_division=0)
        assert compute(metric, one_hot(guess, 4), true, spec(classes=4))[metric] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", ["f1", "f1_positive"])
def test_binary_metrics_refuse_more_classes_by_name(metric):
    task = spec(classes=3, metric=metric)
    with pytest.raises(DataError, match=f"task 't': metric '{metric}' is for two classes.*3; use macro_f1"):
        check_metric(task)
    with pytest.raises(DataError, match="two classes"):
        compute(metric, one_hot([0]), [0], task)
    check_metric(spec(classes=2, metric=metric))


def test_multiple_choice_takes_rows_of_different_lengths():
    scores = [np.array([0.1, 0.9]), np.array([3.0, 1.0, 2.0, 0.0]), np.array([0.0, 0.0, 1.0])]
    task = spec("multiple_choice")
    assert compute("accuracy", scores, [1, 2, 2], task) == {"accuracy": pytest.approx(2 / 3)}
    assert compute("recall@1", scores, [1, 2, 2], task) == {"recall@1": pytest.approx(2 / 3)}


def test_correlations_equal_scipy_on_both_sides():
    generator = np.random.default_rng(0)
    x = generator.normal(size=50)
    y = np.round(x + generator.normal(size=50))
    scores = compute("pearson_spearman", list(x), [{"score": v} for v in y], spec("regression"))
    pearson, spearman = stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic
    assert scores["pearson"] == pytest.approx(pearson, abs=1e-12)
    assert scores["spearman"] == pytest.approx(spearman, abs=1e-12)
    assert scores["pearson_spearman"] == pytest.approx((pearson + spearman) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("predictions", "truth"),
    [([2.0] * 3, [1, 2, 3]), ([1, 2, 3], [2.0] * 3), ([math.nan, 1, 2], [1, 2, 3]), ([1.0], [1.0])],
)
def test_constant_or_broken_regression_has_correlation_zero(predictions, truth):
    scores = compute("pearson_spearman", predictions, [{"score": v} for v in truth], spec("regression"))
    assert scores == {"pearson_spearman": 0.0, "pearson": 0.0, "spearman": 0.0}


def test_correlation_of_tiny_differences():
    predictions = [1e-200, 2e-200, 3e-200]
    scores = compute("pearson_spearman", predictions, [{"score": v} for v in (1, 2, 3)], spec("regression"))
    assert scores["pearson"] == pytest.approx(1.0)


def test_map_mrr_by_hand():
    # Query a ranks: wrong, right, right -> AP (1/2 + 2/3) / 2, RR 1/2. Query b: right first. c has no right answer.
    rows = [("a", 0.9, 0), ("b", 0.8, 1), ("a", 0.5, 1), ("c", 0.7, 0), ("a", 0.4, 1), ("b", 0.1, 0)]
    predictions = [np.array([1 - p, p]) for _, p, _ in rows]
    references = [{"group": g, "label": y} for g, _, y in rows]
    scores = compute("map_mrr", predictions, references, spec("pair_classification", 2, metric="map_mrr"))
    assert scores == {"map": pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2), "mrr": pytest.approx((1 / 2 + 1) / 2)}


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_ties_are_the_mean_over_all_orders(rows):
    scores, positive = (np.array(column) for column in zip(*rows, strict=True))
    result = map_mrr(scores.astype(float), positive.astype(bool), ["q"] * len(rows))
    if not positive.any():
        assert result == {"map": 0.0, "mrr": 0.0}
        return
    precisions, reciprocals = [], []
    for order in itertools.permutations(range(len(rows))):
        hits = positive[sorted(order, key=lambda i: (-scores[i], order.index(i)))]
        ranks = np.flatnonzero(hits) + 1
        precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
        reciprocals.append(1 / ranks[0])
    assert result == {"map": pytest.approx(np.mean(precisions)), "mrr": pytest.approx(np.mean(reciprocals))}


def test_a_score_that_is_not_a_number_ranks_last():
    assert map_mrr(np.array([math.nan, 0.1]), np.array([True, False]), ["q", "q"])["mrr"] == 0.5


def test_perplexity_counts_each_token_once():
    # Two rows of very different length: a mean of the rows' perplexities would be far off.
    rows = [(2.0, 1), (3.0, 99)]
    scores = compute("perplexity", rows, [None, None], spec("causal_lm"))
    assert scores == {"perplexity": pytest.approx(math.exp(5 / 100)), "nll_per_token": pytest.approx(0.05)}


def test_perplexity_that_overflows_is_infinite():
    assert compute("perplexity", [(1e6, 1)], [None], spec("causal_lm"))["perplexity"] == math.inf


def test_nothing_to_score_is_an_error_that_names_the_task():
    with pytest.raises(DataError, match="task 't': no rows"):
        compute("accuracy", [], [], spec())
    with pytest.raises(DataError, match="task 't': no target tokens"):
        compute("perplexity", [(0.0, 0)], [None], spec("causal_lm"))
    with pytest.raises(DataError, match=r"unknown metric 'acuracy' \(did you mean 'accuracy'\?\)"):
        compute("acuracy", [1], [1], spec())
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        compute("accuracy", one_hot([0]), [0, 1], spec())


def test_majority_of_classification_uses_the_training_rows():
    # Class 2 leads in training and is right in one of four dev rows.
    assert majority("accuracy", spec(), [2, 2, 2, 0, 1], [0, 0, 1, 2]) == pytest.approx(1 / 4)
    assert majority("macro_f1", spec(), [2, 2, 0], [0, 0, 1, 2]) == pytest.approx((0 + 0 + 2 / 5) / 3)
    assert majority("f1", spec(classes=2), [1, 1, 0], [1, 0, 1, 1]) == pytest.approx(6 / 7)
    assert majority("f1", spec(classes=2), [0, 0, 1], [1, 0, 1, 1]) == 0.0
    assert majority("mcc", spec(classes=2), [0, 0, 1], [1, 0]) == 0.0
    assert majority("accuracy", spec(), [], [0]) is None


def test_majority_of_equal_counts_is_the_first_class():
    assert majority("accuracy", spec(), [1, 0, 0, 1], [0, 0, 0, 1]) == majority(
        "accuracy", spec(), [0, 1], [0, 0, 0, 1]
    )


def test_majority_of_ranking_is_a_random_order():
    references = [{"group": "q", "label": y} for y in (0, 1, 0, 0)]
    task = spec("pair_classification", 2, metric="map_mrr")
    assert majority("map_mrr", task, [0, 0, 1], references) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_majority_of_the_other_families():
    assert majority("accuracy", spec("multiple_choice"), [3, 3, 0], [3, 0, 1, 1]) == pytest.approx(1 / 4)
    assert majority("pearson_spearman", spec("regression"), [], [{"score": 1.0}]) == 0.0
    assert majority("rouge_l", spec("seq2seq"), [], [{"references": ["x"], "source": "y"}]) is None
    assert majority("perplexity", spec("causal_lm"), [], [None]) is None


def test_majority_of_spans_is_the_better_of_silence_and_everything():
    context = "one two three four"
    answered = {"answers": ["two three"], "context": context}
    empty = {"answers": [], "context": context}
    task = spec("span")
    assert majority("squad_f1_em", task, [], [answered] * 3) == pytest.approx(2 * (2 / 4) * 1 / (2 / 4 + 1))
    assert majority("squad_v2_f1_em", task, [], [answered, empty, empty]) == pytest.approx(2 / 3)


def test_mean_leaves_perplexities_out():
    assert mean_score([("accuracy", 0.5), ("perplexity", 300.0), ("rouge", 0.1)]) == pytest.approx(0.3)
    assert mean_score([("perplexity", 300.0)]) is None
