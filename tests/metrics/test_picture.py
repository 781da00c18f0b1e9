import math
import struct

import numpy as np
import pytest

from trainer.errors import RunError
from trainer.metrics.curves import Series, load_curves, smooth
from trainer.metrics.log import MetricsLog
from trainer.metrics.picture import draw_curves


def size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def write_run(folder, tasks, steps=40, perplexity=False):
    generator = np.random.default_rng(0)
    names = [f"a_task_with_a_long_name_{i}" for i in range(tasks)]
    with MetricsLog(folder, None) as log:

        def evaluate(step, gain):
            scores = {f"eval/{name}/macro_f1": 0.2 + gain * generator.random() for name in names}
            scores |= {f"eval/{name}/accuracy": 0.9 for name in names}
            if perplexity:
                scores["eval/lm/perplexity"] = 50.0 - 40 * gain
            log.write(step, scores | {"eval/mean": 0.3})

        evaluate(0, 0.0)
        for step in range(1, steps + 1):
            losses = {f"train/loss/{name}": generator.random() for name in names if generator.random() < 0.5}
            rates = {"train/lr": 5e-5 * (1 - step / steps), "train/lr_heads": 1e-3 * (1 - step / steps)}
            log.write(step, {"train/loss": 1 / step} | losses | rates)
        evaluate(steps, 0.5)
    return folder / "metrics.jsonl"


@pytest.mark.parametrize("tasks", [1, 8, 117])
def test_pictures_grow_with_the_tasks(tmp_path, tasks):
    out = tmp_path / "curves.png"
    path = write_run(tmp_path, tasks, perplexity=tasks == 8)
    draw_curves(path, out, {"a_task_with_a_long_name_0": 0.3})
    width, height = size(out)
    assert width == 1690
    assert {1: 400, 8: 900, 117: 4000}[tasks] < height < {1: 600, 8: 1300, 117: 5000}[tasks]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def write_lines(folder, *lines):
    with MetricsLog(folder, None) as log:
        for step, values in lines:
            log.write(step, values)
    return folder / "metrics.jsonl"


@pytest.mark.parametrize(
    "lines",
    [
        [(1, {"train/loss": 0.5})],
        [(0, {"eval/x/f1": 0.5})],
        [(0, {"eval/lm/perplexity": math.inf}), (5, {"eval/lm/perplexity": 3.0})],
        [(1, {"train/loss": math.nan, "train/loss/x": math.nan}), (2, {"train/loss": 1.0, "train/loss/y": 2.0})],
        [(1, {"train/loss": 1.0, "train/lr": 0.0, "train/lr_heads": 0.0})],
        [(0, {"eval/x/mcc": -0.5}), (1, {"train/loss": 1e30}), (2, {"train/loss": 1e30, "eval/x/mcc": 0.5})],
    ],
    ids=["one step", "only evaluation", "infinite perplexity", "not a number", "no rate", "huge and negative"],
)
def test_odd_runs_are_drawn_without_warnings(tmp_path, lines, recwarn):
    draw_curves(write_lines(tmp_path, *lines), tmp_path / "out.png")
    assert size(tmp_path / "out.png")[1] > 100
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("lines", [[], [(1, {"train/lr": 1.0})], [(1, {"train/loss": math.nan})]])
def test_nothing_to_draw_is_an_error(tmp_path, lines):
    with pytest.raises(RunError, match=r"metrics\.jsonl: neither training losses nor evaluations"):
        draw_curves(write_lines(tmp_path, *lines), tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_the_first_metric_logged_of_a_task_is_its_main_one(tmp_path):
    path = write_lines(
        tmp_path,
        (0, {"eval/x/f1": 0.1, "eval/x/accuracy": 0.5, "eval/mean": 0.1}),
        (5, {"eval/x/f1": 0.2, "eval/x/accuracy": 0.6, "eval/y/map": 0.7}),
        (9, {"eval/x/f1": 0.3, "eval/x/accuracy": 0.7, "eval/y/map": 0.8}),
    )
    assert load_curves(path).evaluations == [("x", "f1", 0.1, 0.3), ("y", "map", None, 0.8)]


def test_series_skip_what_was_not_logged_or_not_a_number(tmp_path):
    path = write_lines(tmp_path, (1, {"train/loss": 1.0}), (2, {"train/loss": math.nan}), (4, {"train/loss": 3.0}))
    curves = load_curves(path)
    assert curves.loss.steps.tolist() == [1, 4]
    assert curves.loss.values.tolist() == [1, 3]
    assert curves.last_step == 4


def test_smoothing_keeps_a_constant_and_follows_a_step_without_lag_at_the_start():
    steps = np.arange(100.0)
    constant = smooth(Series(steps, np.full(100, 2.5)))
    assert constant.values == pytest.approx(np.full(100, 2.5))
    values = np.where(steps < 50, 1.0, 0.0)
    smoothed = smooth(Series(steps, values)).values
    assert smoothed[0] == 1.0
    assert smoothed[49] == pytest.approx(1.0)
    assert 0.2 < smoothed[53] < 0.7
    assert smoothed[-1] < 1e-3


def test_smoothing_weighs_by_distance_in_steps():
    # The memory is 5 steps (a twentieth of the run), so 97 steps later the old points are all but forgotten.
    smoothed = smooth(Series(np.array([0.0, 1, 2, 3, 100]), np.array([1.0, 1, 1, 1, 0]))).values
    assert 0 < smoothed[-1] < 1e-7
