"""The picture of learned weights."""

import json
from pathlib import Path

import pytest
from PIL import Image

from trainer.metrics.weights_picture import draw_weights


def write(path: Path, tasks: int, alignment: bool) -> Path:
    with path.open("w") as file:
        for step in range(10, 210, 10):
            record: dict[str, float] = {"step": step, "time": 0.0, "train/loss": 1.0}
            for t in range(tasks):
                record[f"weight/task-{t}"] = (1 + (t + 1) * step / 400) / tasks
                if alignment and step > 10 * (t % 3):
                    record[f"alignment/task-{t}"] = 0.1 * t - 0.2
                    record[f"alignment_error/task-{t}"] = 1.0 / step
            file.write(json.dumps(record) + "\n")
    return path


@pytest.mark.parametrize(("tasks", "alignment", "panels"), [(3, True, 2), (40, True, 2), (5, False, 1), (1, True, 2)])
def test_it_is_drawn(tmp_path: Path, tasks: int, alignment: bool, panels: int) -> None:
    out = tmp_path / "weights.png"
    assert draw_weights(write(tmp_path / "metrics.jsonl", tasks, alignment), out)
    with Image.open(out) as image:
        assert image.width > (1000 if panels == 2 else 600)
        assert len(image.convert("RGB").getcolors(10**6)) > 50


def test_a_run_without_weights_has_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "train/loss": 2.0}\n')
    assert not draw_weights(tmp_path / "metrics.jsonl", tmp_path / "weights.png")
    assert not (tmp_path / "weights.png").exists()
