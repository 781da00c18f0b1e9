"""Scores along a number: the order of the points, where a curve begins to pay, and the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trainer.study.curve import critical_point, curves_of
from trainer.study.report import CURVES, to_markdown
from trainer.study.result import Result
from trainer.study.schema import Study
from trainer.study.summary import Summary, summarise


def made(scores: dict[float, float | None], metric: str = "accuracy") -> tuple[Study, Summary]:
    """A study of one task and two seeds with an arm for each x."""
    arms = {f"n{x:g}": {"recipe": "r.yaml", "x": x, "curve": "all"} for x in reversed(scores)}
    study = Study(
        name="s", output=Path("out"), seeds=2, baseline="n0", x_label="tasks", tasks={"a": None},
        arms={**arms, "other": {"recipe": "r.yaml"}},  # type: ignore[arg-type, dict-item]
    )  # fmt: skip
    one = Result("a", "", 0, metric, None, 0.4, 60.0, 1.5, "a CPU", "2026-01-01T00:00:00+00:00", "abc")
    found = [
        replace(one, arm=f"n{x:g}", seed=seed, value=score)
        for x, score in scores.items()
        for seed in (0, 1)
        if score is not None
    ]
    return study, summarise(study, found)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({0: 0.5, 4: 0.4, 8: 0.55, 16: 0.6}, 8),
        ({0: 0.5, 4: 0.6, 8: 0.45, 16: 0.6}, 16),  # not 4: it has to stay above
        ({0: 0.5, 4: 0.6, 8: 0.7}, 4),
        ({0: 0.5, 4: 0.6, 8: 0.5}, None),
        ({0: 0.5, 4: None, 8: 0.7}, 8),
        ({0: 0.5, 4: None, 8: None}, None),
    ],
)
def test_where_it_begins_to_pay(scores: dict[float, float | None], expected: float | None) -> None:
    study, summary = made(scores)
    assert critical_point(study, summary.rows[0], "all") == expected
    assert curves_of(study) == {"all": [f"n{x}" for x in scores]}


def test_lower_is_better_for_perplexities() -> None:
    study, summary = made({0: 12.0, 4: 13.0, 8: 9.0}, "perplexity")
    assert critical_point(study, summary.rows[0], "all") == 8


def test_the_report_says_and_shows_it(tmp_path: Path) -> None:
    from trainer.study.curve import draw_curves

    study, summary = made({0: 0.5, 4: 0.4, 8: 0.55})
    text = to_markdown(study, summary)
    assert "- all: better than n0 from tasks = a 8" in text
    assert f"]({CURVES})" in text
    draw_curves(study, summary, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
