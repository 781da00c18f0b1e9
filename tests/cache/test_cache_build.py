"""Building: what is made anew and what is not, bad data, several processes, and builds that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.cache import build, keys
from trainer.cache.build import build_cache
from trainer.cache.store import CachedSplit
from trainer.cache.text import EncodeOptions
from trainer.errors import DataError, ModelError, RunError
from trainer.tasks.spec import TaskSpec

MakeTask = Callable[..., TaskSpec]
OPTIONS = EncodeOptions("encoder", 32, 12, 8, 2)
ROOT = Path(__file__).resolve().parents[2]


def moods(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"the fox number {first + i} jumps over the dog", "label": i % 2} for i in range(count)]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".json")


def test_rows_come_back_in_order(make_task: MakeTask, minilm_path: str, tmp_path: Path) -> None:
    task = make_task(train=moods(2500), dev=moods(3, first=9000))
    seen: list[tuple[str, int, int]] = []
    paths = build_cache(
        [(task, "train"), (task, "dev")], minilm_path, OPTIONS, tmp_path / "c", 1, lambda *args: seen.append(args)
    )
    train = CachedSplit(paths["mood", "train"], task)
    assert train.column("row").tolist() == list(range(2500))
    assert train.column("label").tolist() == [i % 2 for i in range(2500)]
    assert len(CachedSplit(paths["mood", "dev"], task)) == 3
    assert seen[-1] == ("mood/dev: 3 rows", 2, 2)
    assert [p.split("-")[0] for p in files(tmp_path / "c")] == ["mood/dev", "mood/train"]
    assert (os.stat(paths["mood", "train"]).st_mode & 0o777) == 0o644  # others may share the cache


def test_second_start_reads_and_writes_nothing(
    make_task: MakeTask, minilm_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(train=moods(5), dev=moods(5, 10))
    requests = [(task, "train"), (task, "dev")]
    first = build_cache(requests, minilm_path, OPTIONS, tmp_path / "c")
    before = {p: (tmp_path / "c" / p).stat().st_mtime_ns for p in files(tmp_path / "c")}

    def never(*args: Any) -> Any:
        raise AssertionError("a warm start opened a source or a tokenizer")

    monkeypatch.setattr(keys, "open_source", never)
    monkeypatch.setattr(build, "open_source", never)
    monkeypatch.setattr(build, "load_tokenizer", never)
    assert build_cache(requests, minilm_path, OPTIONS, tmp_path / "c") == first
    assert {p: (tmp_path / "c" / p).stat().st_mtime_ns for p in files(tmp_path / "c")} == before


def test_changed_rows_are_tokenised_again(make_task: MakeTask, minilm_path: str, tmp_path: Path) -> None:
    paths = []
    for rows in (moods(5), moods(5, first=1), moods(5)):
        task = make_task(train=rows)
        paths.append(build_cache([(task, "train")], minilm_path, OPTIONS, tmp_path / "c")["mood", "train"])
    assert paths[0] == paths[2] != paths[1]
    assert len(files(tmp_path / "c")) == 2


def test_forgotten_fingerprints_only_cost_time(make_task: MakeTask, minilm_path: str, tmp_path: Path) -> None:
    task = make_task(train=moods(5))
    first = build_cache([(task, "train")], minilm_path, OPTIONS, tmp_path / "c")
    for content in ("", "[1]", '{"a": 1'):
        (tmp_path / "c" / "fingerprints.json").write_text(content)
        assert build_cache([(task, "train")], minilm_path, OPTIONS, tmp_path / "c") == first


def test_dev_without_a_source_is_train_as_evaluation_reads_it(
    make_task: MakeTask, minilm_path: str, tmp_path: Path
) -> None:
    scores = make_task("score", "regression", train=[{"text_a": f"fox {i}", "score": i / 9} for i in range(10)])
    paths = build_cache([(scores, "train"), (scores, "dev")], minilm_path, OPTIONS, tmp_path / "c")
    train, dev = (CachedSplit(paths["score", split], scores) for split in ("train", "dev"))
    assert train.column("key").tolist() == dev.column("key").tolist()
    assert train.references(train.column("row"))[3] is None
    assert dev.references(dev.column("row"))[3] == {"score": 3 / 9}
    mood = make_task(train=moods(10))  # nothing to keep: the same file
    paths = build_cache([(mood, "train"), (mood, "dev")], minilm_path, OPTIONS, tmp_path / "c")
    assert paths["mood", "train"] == paths["mood", "dev"]


def test_missing_test_source_is_named(make_task: MakeTask, minilm_path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task 'mood': has no test source"):
        build_cache([(make_task(train=moods(3)), "test")], minilm_path, OPTIONS, tmp_path / "c")


@pytest.mark.parametrize("workers", [1, 2])
def test_all_bad_rows_are_named_and_nothing_stays(
    make_task: MakeTask, minilm_path: str, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_POOL_BYTES", 0)
    rows = moods(2100)
    rows[4]["label"] = 7
    rows[2050]["text"] = " "
    bad = make_task(train=rows, dev=[*moods(2), {"text": "no label"}])
    many = make_task("many", train=[{"text": "x", "label": 9}] * 1200)
    good = make_task("good", train=moods(3))
    empty = make_task("empty", train=[])
    requests = [(bad, "train"), (bad, "dev"), (many, "train"), (empty, "train"), (good, "train")]
    with pytest.raises(DataError) as caught:
        build_cache(requests, minilm_path, OPTIONS, tmp_path / "c", workers)
    message = str(caught.value)
    assert "task 'mood', train: 2 bad rows\n  mood.train.jsonl:5: label 7" in message
    assert "mood.train.jsonl:2051: text is empty" in message
    assert "task 'mood', dev: 1 bad row\n  mood.dev.jsonl:3: missing column 'label'" in message
    assert "task 'many', train: 1200 bad rows" in message
    assert message.count("many.train.jsonl:") == 50
    assert "task 'empty', train:" in message
    assert "has no rows" in message
    assert [p.split("-")[0] for p in files(tmp_path / "c")] == ["good/train"]  # whole, and right


def test_unreadable_source_does_not_hide_other_problems(make_task: MakeTask, minilm_path: str, tmp_path: Path) -> None:
    array = tmp_path / "array.json"
    array.write_text('[{"text": "a", "label": 0}]')
    first = TaskSpec(name="array", family="classification", num_labels=2, train=str(array))  # type: ignore[arg-type]
    second = make_task(train=[{"text": "x", "label": 9}])
    with pytest.raises(DataError) as caught:
        build_cache([(first, "train"), (second, "train")], minilm_path, OPTIONS, tmp_path / "c")
    assert "one JSON array" in str(caught.value)
    assert "mood.train.jsonl:1: label 9" in str(caught.value)
    assert files(tmp_path / "c") == []


def test_workers_write_the_same_bytes(
    make_task: MakeTask, minilm_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_POOL_BYTES", 0)
    words = "the quick brown fox jumps over the lazy dog again and again"
    context = {"context": words * 9, "question": "Who?", "answers": [{"text": "fox", "start": 16}]}
    tasks = [
        make_task(train=moods(2345)),
        make_task("span", "span", train=[{**context, "question": f"Who {i}?"} for i in range(1234)]),
        make_task("lm", "masked_lm", train=[{"text": f"{i} {words * 5}"} for i in range(1100)]),
    ]
    requests = [(task, split) for task in tasks for split in ("train", "dev")]
    one, three = (build_cache(requests, minilm_path, OPTIONS, tmp_path / str(n), n) for n in (1, 3))
    assert [p.name for p in one.values()] == [p.name for p in three.values()]
    for request, path in one.items():
        assert path.read_bytes() == three[request].read_bytes()
    assert len(CachedSplit(one["lm", "train"], tasks[2])) > 2200


def test_two_builds_at_once(make_task: MakeTask, minilm_path: str, tmp_path: Path) -> None:
    task = make_task(train=moods(3000))
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(build_cache, [(task, "train")], minilm_path, OPTIONS, tmp_path / "c", 1) for _ in range(4)]
        paths = {run.result()["mood", "train"] for run in runs}
    assert len(paths) == 1
    assert files(tmp_path / "c") == [str(paths.pop().relative_to(tmp_path / "c"))]


def test_interrupted_build_leaves_nothing(make_task: MakeTask, minilm_path: str, tmp_path: Path) -> None:
    def interrupt(text: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache([(make_task(train=moods(2000)), "train")], minilm_path, OPTIONS, tmp_path / "c", 1, interrupt)
    assert files(tmp_path / "c") == []


def test_full_disk_is_named(
    make_task: MakeTask, minilm_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*SETT_CACHE"):
        build_cache([(make_task(train=moods(3)), "train")], minilm_path, OPTIONS, tmp_path / "c")
    assert files(tmp_path / "c") == []


def test_cache_folder_that_is_a_file_is_named(make_task: MakeTask, minilm_path: str, tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(RunError, match=r"token cache .*/c cannot be used"):
        build_cache([(make_task(train=moods(3)), "train")], minilm_path, OPTIONS, tmp_path / "c")


def test_folder_without_tokenizer_is_named(make_task: MakeTask, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="model: its tokenizer cannot be loaded"):
        build_cache([(make_task(train=moods(3)), "train")], str(tmp_path / "model"), OPTIONS, tmp_path / "c")


_SCRIPT = """
import sys, resource
from pathlib import Path
from trainer.cache import build
from trainer.cache.build import EncodeOptions, build_cache
from trainer.tasks.spec import TaskSpec

def report(text, done, total):
    print(text, flush=True)

if __name__ == "__main__":
    build._POOL_BYTES = 0
    _, tokenizer, cache, workers, *sources = sys.argv
    for source in sources:
        task = TaskSpec(name="lm", family="masked_lm", train=source)
        options = EncodeOptions("encoder", 64, 8, 4, 2)
        build_cache([(task, "train")], tokenizer, options, Path(cache), int(workers), report)
        print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)
"""


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    script = tmp_path / "build_it.py"
    script.write_text(_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


def corpus(path: Path, lines: int) -> Path:
    with path.open("w") as file:
        for i in range(lines):
            file.write(f"line {i} of a corpus that does not fit into memory, were it only long enough\n")
    return path


def test_killed_build_leaves_no_file_and_no_process(minilm_path: str, tmp_path: Path) -> None:
    source = corpus(tmp_path / "text.txt", 60_000)
    cache = tmp_path / "c"
    run = start(tmp_path, minilm_path, str(cache), "2", str(source))
    assert run.stdout is not None
    assert run.stdout.readline().startswith("lm/train:")
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) >= 3  # the fork server and two workers
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not [p for p in files(cache) if p.endswith(".arrow")]
    _, alive = psutil.wait_procs(children, timeout=30)
    for process in alive:  # nothing is left behind by a failing test either
        process.kill()
    assert not alive
    task = TaskSpec(name="lm", family="masked_lm", train=str(corpus(tmp_path / "other.txt", 5)))  # type: ignore[arg-type]
    paths = build_cache([(task, "train")], minilm_path, OPTIONS, cache)
    assert files(cache) == [str(paths["lm", "train"].relative_to(cache))]


def test_memory_does_not_grow_with_the_corpus(minilm_path: str, tmp_path: Path) -> None:
    """200,000 lines (15 MB) cost at most 32 MiB more than 20,000; held as Python objects they would cost 200."""
    small, large = (corpus(tmp_path / f"{n}.txt", n) for n in (20_000, 200_000))
    run = start(tmp_path, minilm_path, str(tmp_path / "c"), "1", str(small), str(large))
    output, _ = run.communicate(timeout=300)
    peaks = [int(line.split()[1]) for line in output.splitlines() if line.startswith("peak")]
    assert len(peaks) == 2
    assert peaks[1] - peaks[0] < 32


def test_a_folder_of_datasets_is_known_again(minilm_path: str, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(moods(20)).save_to_disk(str(tmp_path / "saved"))
    task = TaskSpec(name="mood", family="classification", num_labels=2, train=str(tmp_path / "saved"))  # type: ignore[arg-type]
    first = build_cache([(task, "train")], minilm_path, OPTIONS, tmp_path / "c")
    assert len(CachedSplit(first["mood", "train"], task)) == 20
    known = json.loads((tmp_path / "c" / "fingerprints.json").read_text())
    assert list(known) == [f"{tmp_path / 'saved'}@train"]
    time.sleep(0.02)
    assert build_cache([(task, "train")], minilm_path, OPTIONS, tmp_path / "c") == first
