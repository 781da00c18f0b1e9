import json
import math

import numpy as np
import pytest
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from trainer.errors import RunError
from trainer.metrics.log import MetricsLog, read_metrics


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def test_lines_are_whole_valid_json_as_soon_as_written(tmp_path):
    with MetricsLog(tmp_path / "run", None) as log:
        log.write(3, {"train/loss": np.float32(0.5), "train/grad_norm": math.nan, "train/lr": math.inf})
        line = (tmp_path / "run" / "metrics.jsonl").read_text()  # not closed yet
    assert line.endswith("\n")
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record.pop("time") > 1e9
    assert record == {"step": 3, "train/loss": 0.5, "train/grad_norm": None, "train/lr": None}
    assert list(json.loads(line))[:2] == ["step", "time"]


def test_opening_again_appends(tmp_path):
    for step in (1, 2):
        with MetricsLog(tmp_path, None) as log:
            log.write(step, {"train/loss": 1.0})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_half_a_line_left_by_a_kill_is_dropped_and_not_glued_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": 1.0}\n{"step": 2, "tra')
    assert steps(path) == [1]
    with MetricsLog(tmp_path, None) as log:
        log.write(3, {})
    assert steps(path) == [1, 3]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    with MetricsLog(tmp_path, None) as log:
        log.write(3, {})
    assert steps(path) == [1, 2, 3]


@pytest.mark.parametrize("tail", [b"", b'{"step": 9, "tr', b"\xff\xfe"])
def test_truncating_drops_later_steps_and_writing_goes_on(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, None) as log:
        for step in (0, 10, 10, 20, 30):
            log.write(step, {"train/loss": 1.0 / 3, "eval/x": math.nan})
        kept = path.read_bytes().splitlines()[:3]
    path.write_bytes(path.read_bytes() + tail)
    with MetricsLog(tmp_path, None) as log:
        log.truncate_after(10)
        assert path.read_bytes().splitlines() == kept
        log.write(11, {})
    assert steps(path) == [0, 10, 10, 11]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("last", "left"), [(100, [1, 2]), (0, [])])
def test_truncating_may_keep_all_or_nothing(tmp_path, last, left):
    with MetricsLog(tmp_path, None) as log:
        log.write(1, {})
        log.write(2, {})
        log.truncate_after(last)
    assert steps(tmp_path / "metrics.jsonl") == left


def test_truncating_an_empty_log(tmp_path):
    with MetricsLog(tmp_path, None) as log:
        log.truncate_after(5)
        log.write(6, {})
    assert steps(tmp_path / "metrics.jsonl") == [6]


@pytest.mark.parametrize("bad", ["not json", "[1]", '{"loss": 1}', '{"step": "one"}'])
def test_a_bad_line_in_the_middle_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_the_monitors_of_deepspeed_get_the_same_numbers(tmp_path, monkeypatch):
    # DeepSpeed's own monitor with its csv writer; only the rank it asks for is given, as no process group runs here.
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    section = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"}
    monitor = MonitorMaster(get_monitor_config({"csv_monitor": section}))
    with MetricsLog(tmp_path, monitor) as log:
        log.write(5, {"train/loss": 0.25, "train/lr": math.nan})
        log.write(6, {"train/loss": 0.125})
    assert (tmp_path / "csv/job/train_loss.csv").read_text().splitlines() == ["step,loss", "5,0.25", "6,0.125"]
    assert (tmp_path / "csv/job/train_lr.csv").read_text().splitlines() == ["step,lr", "5,nan"]
