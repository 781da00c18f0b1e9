"""A lock left by a killed build goes; one that a build holds stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from trainer.engine import stale_locks
from trainer.engine.stale_locks import clear_stale_locks


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    return tmp_path


def test_a_lock_nobody_holds_is_removed(root: Path) -> None:
    baton = FileBaton(str(root / "op" / "lock"))
    assert baton.try_acquire()
    os.close(baton.fd)  # what the death of its process does
    assert clear_stale_locks() == [root / "op" / "lock"]
    assert not (root / "op" / "lock").exists()


def test_a_lock_that_is_held_stays(root: Path) -> None:
    baton = FileBaton(str(root / "op" / "lock"))
    assert baton.try_acquire()
    assert clear_stale_locks() == []
    baton.release()


def test_a_young_lock_on_a_network_file_system_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale_locks, "_is_network", lambda folder: True)
    lock = root / "op" / "lock"
    lock.touch()
    assert clear_stale_locks() == []
    os.utime(lock, (1, 1))
    assert clear_stale_locks() == [lock]


def test_without_a_build_folder_there_is_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    assert clear_stale_locks() == []
