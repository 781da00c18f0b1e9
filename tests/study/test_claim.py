"""One run, one owner: races, stale claims, heartbeats."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from trainer.study.claim import FILE_NAME, OLD_SECONDS, Claim, Owner, Standing, holder
from trainer.study.process import MARK, kill_all, processes_of

RACERS, RUNS = 3, 40


def race(folder: Path, barrier: Barrier, won: Any) -> None:
    for number in range(RUNS):
        barrier.wait(60)
        if isinstance(Claim.take(folder / str(number)), Claim):
            won.append((number, os.getpid()))
    barrier.wait(60)  # an owner that is gone would lose its claims


def racing(folder: Path) -> list[int]:
    """Runs by claims won, with several processes at each of them at once."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        won, barrier = manager.list(), context.Barrier(RACERS)
        racers = [context.Process(target=race, args=(folder, barrier, won)) for _ in range(RACERS)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(120)
            assert racer.exitcode == 0
        winners = list(won)
    assert len({pid for _, pid in winners}) > 1, "one process won everything: this was no race"
    return [number for number, _ in winners]


def write_claim(folder: Path, owner: Owner, age: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def dead_owner() -> Owner:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return replace(Owner.me(), pid=process.pid)


def test_of_racing_processes_one_gets_each_run(tmp_path: Path) -> None:
    assert sorted(racing(tmp_path)) == list(range(RUNS))


def test_of_processes_racing_for_stale_claims_one_gets_each(tmp_path: Path) -> None:
    owner = dead_owner()
    for number in range(RUNS):
        write_claim(tmp_path / str(number), owner)
    assert sorted(racing(tmp_path)) == list(range(RUNS))
    assert not list(tmp_path.rglob("*.takeover")) + list(tmp_path.rglob("*.clock-*"))


def test_a_claim_is_held_until_released(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path / "run")
    assert isinstance(claim, Claim)
    assert Claim.take(tmp_path / "run") is Standing.HELD
    assert f"process {os.getpid()}" in holder(tmp_path / "run")
    claim.release()
    assert list((tmp_path / "run").iterdir()) == []
    assert isinstance(Claim.take(tmp_path / "run"), Claim)


def test_a_later_process_with_the_number_of_the_owner_is_not_the_owner(tmp_path: Path) -> None:
    write_claim(tmp_path, replace(Owner.me(), started=Owner.me().started - 100))
    assert isinstance(Claim.take(tmp_path), Claim)


def test_on_another_machine_only_the_heartbeat_counts(tmp_path: Path) -> None:
    elsewhere = replace(dead_owner(), host="elsewhere")
    write_claim(tmp_path, elsewhere, age=OLD_SECONDS - 30)
    assert Claim.take(tmp_path) is Standing.HELD
    write_claim(tmp_path, elsewhere, age=OLD_SECONDS + 30)
    assert isinstance(Claim.take(tmp_path), Claim)


def test_a_claim_being_written_is_held(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    assert Claim.take(tmp_path) is Standing.HELD


def test_heartbeats_show_and_tell_of_a_lost_claim(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path)
    assert isinstance(claim, Claim)
    os.utime(claim.path, (0, 0))
    assert claim.beat()
    assert time.time() - claim.path.stat().st_mtime < 60
    other = replace(Owner.me(), host="elsewhere")
    write_claim(tmp_path, other)
    assert not claim.beat()
    claim.release()
    assert holder(tmp_path).startswith("elsewhere")  # not ours to release


def test_processes_left_by_a_dead_owner_are_waited_for_then_ended(tmp_path: Path) -> None:
    owner = dead_owner()
    code = "import time; time.sleep(600)"
    left = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, MARK: str(tmp_path)})
    try:
        write_claim(tmp_path, owner)
        assert Claim.take(tmp_path) is Standing.ENDING
        assert left.poll() is None
        write_claim(tmp_path, owner, age=OLD_SECONDS + 30)
        assert isinstance(Claim.take(tmp_path), Claim)
        assert not processes_of(tmp_path)
    finally:
        kill_all(tmp_path)
        left.wait()


def test_an_old_lock_of_a_takeover_does_not_stay(tmp_path: Path) -> None:
    write_claim(tmp_path, dead_owner())
    lock = tmp_path / f"{FILE_NAME}.takeover"
    lock.touch()
    assert Claim.take(tmp_path) is Standing.HELD
    os.utime(lock, (0, 0))
    assert Claim.take(tmp_path) is Standing.HELD
    assert isinstance(Claim.take(tmp_path), Claim)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to signal the children of a dead process")
def test_a_run_is_told_to_stop_when_its_study_is_killed(tmp_path: Path) -> None:
    child = "import signal, sys, time, pathlib; p = pathlib.Path(sys.argv[1]);"
    child += "signal.signal(signal.SIGTERM, lambda *_: ((p / 'told').touch(), sys.exit(0)));"
    child += "(p / 'ready').touch(); time.sleep(60)"
    study = (
        "import os, pathlib, signal, sys, time\nfrom trainer.study.process import Child\n"
        f"p = pathlib.Path({str(tmp_path)!r})\n"
        f"Child([sys.executable, '-c', {child!r}, str(p)], p, p / 'log', {{}})\n"
        "while not (p / 'ready').exists(): time.sleep(0.05)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", study], timeout=60, check=False)
    deadline = time.monotonic() + 20
    while not (tmp_path / "told").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
