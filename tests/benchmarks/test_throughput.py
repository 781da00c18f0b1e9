"""The throughput benchmark: both sides train, on the same examples. How fast is not asked here."""

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASKS = ["comve_a", "emobank_valence", "qamr"]  # sequences, scores and spans: the three kinds of target
PATHS = [str(ROOT / "data" / name) for name in TASKS]


@pytest.mark.distributed
def test_both_sides_train_and_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--tasks", *PATHS, "--exclude"]
    command += ["--rounds", "1", "--steps", "2", "--warmup", "1", "--out", str(tmp_path)]
    command += ["--window-tokens", "128", "--micro-batches", "4"]
    environment = {**os.environ, "SETT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("throughput-*.json")
    results = json.loads(path.read_text())
    assert {"cpu", "cores", "date", "torch", "deepspeed", "transformers"} <= results["machine"].keys()
    assert results["settings"]["tasks"] == TASKS
    assert list(results["sides"]) == ["Sett", "Trainer"]
    for name, side in results["sides"].items():
        assert f"{side['tokens_per_second']:,.0f}" in done.stdout, name
        (run,) = side["rounds"]
        assert run["steps"] == 2
        assert run["world"] == 2
        assert 0 < run["real_tokens"] <= run["padded_tokens"]
        assert run["examples"] > 0
    rows = results["settings"]["trainer_examples_per_micro_batch"]
    assert results["sides"]["Trainer"]["examples_per_step"] == rows * 4


def test_the_rival_gets_the_rows_that_sett_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("SETT_CACHE", str(tmp_path))
    import throughput
    from throughput_hf import Collator

    from trainer.config import recipe_from
    from trainer.run.prepare import prepare

    monkeypatch.setattr(sys, "argv", ["throughput.py", "--tasks", *PATHS, "--exclude"])
    options: argparse.Namespace = throughput._parse()
    job = prepare(recipe_from(throughput.recipe_values(options, 0)))
    examples: dict[str, list[dict[str, object]]] = {name: [] for name in TASKS}
    for example in throughput.exported(job):
        examples[example["task"]].append(example)
    for task, name, split in zip(job.tasks, TASKS, job.train, strict=True):
        assert len(examples[name]) == len(split)
        with gzip.open(ROOT / "data" / name / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        for place in range(0, len(split), 97):
            row, example = rows[split.rows([place])[0]["row"]], examples[name][place]
            assert example["target"] == _target(task.family.value, row, example, job.tokenizer)
        batch = Collator(job.tokenizer)(examples[name][:4])
        assert batch["input_ids"].shape == batch["token_type_ids"].shape
        assert len(batch["input_ids"]) == sum(batch["choices"])


def _target(family: str, row: dict[str, object], example: dict[str, object], tokenizer: object) -> object:
    """What the row of the file says the example's target is."""
    match family:
        case "multiple_choice":
            return row["label"]
        case "regression":
            low, high = json.loads((ROOT / "data" / "emobank_valence" / "task.json").read_text())["score_range"]
            return pytest.approx((row["score"] - low) / (high - low))
        case _:
            first, last = example["target"]
            text = tokenizer.decode(example["sequences"][0][first : last + 1])
            wanted = tokenizer.decode(tokenizer(row["answers"][0]["text"], add_special_tokens=False)["input_ids"])
            assert text == wanted
            return [first, last]
