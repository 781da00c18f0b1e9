"""Whose a run is while it runs: a claim file in its directory, so that two studies never run the same one.

Owns: the file, its heartbeat (its mtime), and when it is stale. The studies may be on machines that share nothing but a
file system: the claim is made with O_EXCL, and its age is told by the clock of the file system, not of a machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from trainer.study.process import kill_all, processes_of

FILE_NAME = "study-claim.json"
BEAT_SECONDS = 10.0
OLD_SECONDS = 120.0
"""A claim without a heartbeat for so long has lost its owner."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from any later one with its number, and from one of another machine or container."""

    host: str
    machine: str
    pid: int
    started: float

    @classmethod
    def me(cls) -> Owner:
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, psutil.Process(pid).create_time())

    @property
    def is_here(self) -> bool:
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def lives(self) -> bool:
        """Whether the process is still there; only asked on its own machine."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        except psutil.NoSuchProcess:
            return False


class Standing(StrEnum):
    """What a claim that is there means to others."""

    HELD = "held"
    ENDING = "ending"
    """Its owner is dead, but processes of the run are not yet."""
    STALE = "stale"


class Claim:
    """The claim of this process on one run; made by `take`."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path = path
        self.owner = owner

    @classmethod
    def take(cls, directory: Path) -> Claim | Standing:
        """Claim the run of `directory`, or say why not."""
        path = directory / FILE_NAME
        directory.mkdir(parents=True, exist_ok=True)
        owner = Owner.me()
        if _create(path, owner):
            return cls(path, owner)
        standing = _standing(path)
        if standing is not Standing.STALE:
            return standing
        return cls(path, owner) if _take_over(path, owner) else Standing.HELD

    def beat(self) -> bool:
        """Show that the owner lives; False when the claim has gone to another."""
        if _read(self.path) != self.owner:
            return False
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path)
        return True

    def release(self) -> None:
        """Give the run back."""
        if _read(self.path) == self.owner:
            self.path.unlink(missing_ok=True)


def holder(directory: Path) -> str:
    """`HOST, process N` of a run's claim, for people; empty without one."""
    owner = _read(directory / FILE_NAME)
    return f"{owner.host}, process {owner.pid}" if owner else ""


def _create(path: Path, owner: Owner) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(asdict(owner)) + "\n")
    return True


def _take_over(path: Path, owner: Owner) -> bool:
    """Replace a stale claim. Of several that found it stale, one gets the lock; those after it see its claim."""
    lock = path.with_name(path.name + ".takeover")
    if not _create(lock, owner):
        if (_age(lock) or 0.0) > OLD_SECONDS:  # whoever made it died in the lines below
            lock.unlink(missing_ok=True)
        return False
    try:
        if _standing(path) is not Standing.STALE:
            return False
        aside = path.with_name(f"{path.name}.{owner.pid}")
        aside.write_text(json.dumps(asdict(owner)) + "\n")
        os.replace(aside, path)
        return True
    finally:
        lock.unlink(missing_ok=True)


def _standing(path: Path) -> Standing:
    age = _age(path)
    if age is None:  # released just now: the next attempt will get it
        return Standing.HELD
    old = age > OLD_SECONDS
    owner = _read(path)
    if owner is None or not owner.is_here:  # without content: just being made, unless it is old
        return Standing.STALE if old else Standing.HELD
    if owner.lives:
        return Standing.HELD
    if not processes_of(path.parent):
        return Standing.STALE
    if not old:
        return Standing.ENDING  # they were told to stop when their owner died, and may be saving a checkpoint
    kill_all(path.parent)
    return Standing.STALE


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _age(path: Path) -> float | None:
    """Seconds since the last heartbeat; None when there is no such file."""
    probe = path.with_name(f"{path.name}.clock-{socket.gethostname()}-{os.getpid()}")
    try:
        probe.write_text("")
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    except OSError:
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _machine() -> str:
    """What tells machines and containers with the same host name apart, where the system says it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
