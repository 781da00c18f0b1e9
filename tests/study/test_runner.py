"""The loop: places, order, the limit, failures, kills, and a second study on the same runs; with stubs for training."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from study.stub import StubRunner, stub_runs

from trainer.study.claim import FILE_NAME, Claim
from trainer.study.grid import ORIGINS, Run
from trainer.study.machine import Slots
from trainer.study.process import processes_of
from trainer.study.result import PROVENANCE, Action, next_action
from trainer.study.runner import LOG

TWO = Slots(1, ({"PLACE": "0"}, {"PLACE": "1"}))


def runner(runs: list[Run], said: list[str], limit: float | None = None, **attributes: object) -> StubRunner:
    made = StubRunner(runs, "dev", TWO, limit, said.append)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def starts(run: Run) -> int:
    path = run.directory / LOG
    return path.read_text().count("$ ") if path.exists() else 0


def nothing_is_left(runs: list[Run]) -> bool:
    return not any(processes_of(run.directory) or (run.directory / FILE_NAME).exists() for run in runs)


def test_all_runs_are_done_once_in_order_and_nothing_is_left(tmp_path: Path) -> None:
    runs, said = stub_runs(tmp_path), list[str]()
    tally = runner(runs, said).work()
    assert sorted(run.label for run in tally.finished) == sorted(run.label for run in runs)
    assert [line.split()[1] for line in said if line.startswith("started")] == [run.label for run in runs]
    assert all(next_action(run, "dev") is Action.NOTHING and (run.directory / PROVENANCE).is_file() for run in runs)
    assert "4 of 4 done" in said[-1]
    assert any("left" in line for line in said)
    assert nothing_is_left(runs)
    assert runner(runs, said).work().finished == []
    assert [starts(run) for run in runs] == [1, 1, 1, 1]


def test_the_limit_stops_in_order_and_the_next_call_goes_on(tmp_path: Path) -> None:
    runs, said = stub_runs(tmp_path), list[str]()
    tally = runner(runs, said, limit=2 / 60, seconds=60).work()
    assert tally.finished == tally.failed == []
    assert [run.label for run in tally.stopped] == [run.label for run in runs[:2]]
    assert all("saved at" in (run.directory / LOG).read_text() for run in runs[:2])
    assert nothing_is_left(runs)
    (runs[0].directory / "progress").write_text("9")
    assert len(runner(runs, said).work().finished) == 4
    windows = [line for line in (runs[0].directory / LOG).read_text().splitlines() if line.startswith("window")]
    assert windows[-1] == "window 10"
    assert windows.count("window 10") == 1
    assert [starts(run) for run in runs] == [2, 2, 1, 1]


def test_a_failing_run_is_reported_does_not_stop_the_others_and_is_tried_again(tmp_path: Path) -> None:
    runs, said = stub_runs(tmp_path), list[str]()
    tally = runner(runs, said, codes={"t/one/seed-0": 7}).work()
    assert [run.label for run in tally.failed] == ["t/one/seed-0"]
    assert len(tally.finished) == 3
    at = next(index for index, line in enumerate(said) if line.startswith("FAILED"))
    assert "t/one/seed-0, exit code 7" in said[at]
    assert "    the reason" in said[at:]
    assert not any("$ " in line for line in said)  # of the log, only what the run printed
    assert nothing_is_left(runs)
    tally = runner(runs, said).work()
    assert [run.label for run in tally.finished] == ["t/one/seed-0"]


@pytest.mark.parametrize(
    ("signals", "saved"), [([signal.SIGTERM], True), ([signal.SIGINT], True), ([signal.SIGINT] * 2, False)]
)
def test_a_signal_stops_in_order_and_a_second_kills(tmp_path: Path, signals: list[signal.Signals], saved: bool) -> None:
    runs, said = stub_runs(tmp_path, seeds=1), list[str]()

    def send() -> None:
        while not all((run.directory / "started").exists() for run in runs):
            time.sleep(0.02)
        if not saved:  # deaf to being asked
            for run in runs:
                for process in processes_of(run.directory):
                    process.suspend()
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    sender = threading.Thread(target=send)
    sender.start()
    began = time.monotonic()
    tally = runner(runs, said, seconds=300).work()
    sender.join()
    assert time.monotonic() - began < 30
    assert {run.label for run in tally.stopped} == {run.label for run in runs}
    assert all(("saved at" in (run.directory / LOG).read_text()) == saved for run in runs)
    assert nothing_is_left(runs)


def test_runs_of_another_study_are_left_to_it(tmp_path: Path) -> None:
    runs, said = stub_runs(tmp_path), list[str]()
    claim = Claim.take(runs[0].directory)
    assert isinstance(claim, Claim)
    tally = runner(runs, said).work()
    assert [run.label for run in tally.elsewhere] == ["t/one/seed-0"]
    assert len(tally.finished) == 3
    assert claim.beat()
    assert starts(runs[0]) == 0


def test_a_run_whose_claim_is_lost_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.study.runner.BEAT_SECONDS", 0.2)
    runs, said = stub_runs(tmp_path, seeds=1, arms=("one",)), list[str]()

    def steal() -> None:
        while not (runs[0].directory / "started").exists():
            time.sleep(0.02)
        (runs[0].directory / FILE_NAME).write_text("{}")

    thief = threading.Thread(target=steal)
    thief.start()
    tally = runner(runs, said, seconds=300).work()
    thief.join()
    assert tally.stopped == runs
    assert any("the claim has gone to" in line for line in said)


def test_runs_wait_for_the_one_they_start_from(tmp_path: Path) -> None:
    plain, started = stub_runs(tmp_path, seeds=1)
    origin = replace(plain, task=ORIGINS, arm="pre", recipe=stub_runs(tmp_path / "o", 1)[0].recipe)
    runs, said = [origin, replace(started, origin=origin), plain], list[str]()
    tally = runner(runs, said).work()
    assert [run.label for run in tally.finished][-1] == started.label, "the other place was not left empty meanwhile"
    order = [line.split()[:2] for line in said]
    assert order.index(["finished", "origins/pre/seed-0"]) < order.index(["started", started.label])
    assert nothing_is_left(runs)


def test_runs_fail_with_the_one_they_start_from(tmp_path: Path) -> None:
    plain, started = stub_runs(tmp_path, seeds=1)
    origin = replace(plain, task=ORIGINS, arm="pre", recipe=stub_runs(tmp_path / "o", 1)[0].recipe)
    waiting = replace(started, origin=origin)
    said = list[str]()
    tally = runner([origin, waiting, plain], said, codes={origin.label: 7}).work()
    assert tally.failed == [origin, waiting]
    assert tally.finished == [plain]
    assert f"FAILED   {waiting.label}: not started, because origins/pre/seed-0 has failed" in said
    assert runner([origin, waiting, plain], said).work().finished == [origin, waiting]
