import io
import json
import math

import pytest
from rich.console import Console

from trainer.metrics.table import TaskResult, final_table, summary, to_markdown, write_results

RESULTS = [
    TaskResult("mrpc", "pair_classification", "f1", 408, 0.8, 0.5, 0.9),
    TaskResult("qamr", "span", "squad_v2_f1_em", 100, 0.4, 0.1, 0.3),
    TaskResult("wiki", "masked_lm", "perplexity", 50, None, 300.0, 12.5),
    TaskResult("geo", "seq2seq", "exact_match", 10, None, 0.2, 0.2),
    TaskResult("new", "regression", "pearson_spearman", 10, None, None, 0.25),
]


def rendered(results, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(final_table(results))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("metric", "majority", "before", "after", "mark"),
    [
        ("accuracy", 0.5, 0.4, 0.6, "✓"),
        ("accuracy", 0.5, 0.4, 0.5, "~"),
        ("accuracy", 0.5, 0.6, 0.55, "~"),
        ("accuracy", 0.5, 0.4, 0.4, "✗"),
        ("accuracy", None, 0.4, 0.5, "✓"),
        ("accuracy", 0.5, None, 0.4, "✗"),
        ("accuracy", None, None, 0.4, ""),
        ("accuracy", 0.5, 0.4, None, ""),
        ("perplexity", None, 10.0, 9.0, "✓"),
        ("perplexity", None, 10.0, 11.0, "✗"),
    ],
)
def test_marks(metric, majority, before, after, mark):
    assert TaskResult("t", "f", metric, 1, majority, before, after).mark == mark


def test_terminal_table():
    lines = rendered(RESULTS, 120)
    row = next(line for line in lines if "mrpc" in line)
    assert row.split() == ["mrpc", "pair", "f1", "408", "80.0", "50.0", "90.0", "+40.0", "✓"]
    perplexity = next(line for line in lines if "wiki" in line)
    assert perplexity.split()[-5:] == ["-", "300", "12.50", "-288", "✓"]
    # Majority (80 + 40) / 2, before (50 + 10 + 20) / 3, after (90 + 30 + 20 + 25) / 4, change (40 + 20 + 0) / 3.
    mean = next(line for line in lines if line.strip().startswith("mean"))
    assert mean.split() == ["mean", "578", "60.0", "26.7", "41.2", "+20.0"]


def test_eighty_characters_hold_every_number():
    lines = rendered([TaskResult("emobank_valence", "multiple_choice", "pearson_spearman", 12345, 0.5, 0.4, 0.987)], 80)
    assert max(len(line) for line in lines) <= 80
    text = "\n".join(lines)
    assert all(number in text for number in ("12345", "50.0", "40.0", "98.7", "+58.7"))
    assert "…" not in text


def test_a_task_named_like_markup_is_shown_as_it_is():
    assert any("a.b+c@d" in line for line in rendered([TaskResult("a.b+c@d", "span", "f1", 1, None, None, 0.1)], 100))


def test_markdown():
    lines = to_markdown(RESULTS).splitlines()
    assert lines[2] == "| mrpc | pair_classification | f1 | 408 | 80.0 | 50.0 | 90.0 | +40.0 | ✓ |"
    assert lines[6] == "| new | regression | pearson_spearman | 10 | - | - | 25.0 | - | |"
    assert all(line.count("|") == 10 for line in lines[:8])
    assert lines[7].startswith("| **mean** |")


def test_one_task_has_no_mean_line():
    assert "mean" not in to_markdown(RESULTS[:1])
    assert not any(line.strip().startswith("mean") for line in rendered(RESULTS[:1], 100))


def test_summary_counts_only_tasks_with_something_to_compare():
    assert summary(RESULTS).startswith("2 of 4 tasks")


def test_results_json(tmp_path):
    path = tmp_path / "results.json"
    broken = TaskResult("bad", "causal_lm", "perplexity", 5, None, math.inf, 3.0)
    write_results(path, [*RESULTS, broken])
    document = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first = document["tasks"][0]
    assert first["change"] == pytest.approx(0.4)
    assert {k: first[k] for k in ("task", "family", "metric", "rows", "majority", "before", "after")} == {
        "task": "mrpc",
        "family": "pair_classification",
        "metric": "f1",
        "rows": 408,
        "majority": 0.8,
        "before": 0.5,
        "after": 0.9,
    }
    assert first["better_than_before"] is True
    assert document["tasks"][1]["better_than_majority"] is False
    assert document["tasks"][2]["better_than_majority"] is None
    assert document["tasks"][-1]["before"] is None
    assert document["mean"]["after"] == pytest.approx((0.9 + 0.3 + 0.2 + 0.25) / 4)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_infinite_perplexity_in_the_table():
    row = to_markdown([TaskResult("x", "causal_lm", "perplexity", 1, None, math.inf, 1.5e7)]).splitlines()[2]
    assert row == "| x | causal_lm | perplexity | 1 | - | inf | 1.5e+07 | -inf | ✓ |"
