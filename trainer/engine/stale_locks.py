"""Locks that a killed build of a torch extension leaves behind.

Owns: `clear_stale_locks`. DeepSpeed compiles its ops with torch's extension builder, which waits for a file named
`lock` to go away and never asks who made it: after a start that was killed while it compiled, every later start hangs.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "virtiofs")
_LONGEST_BUILD = 15 * 60.0


def clear_stale_locks() -> list[Path]:
    """Remove the locks that no process holds; call it on every rank before DeepSpeed loads an op.

    A builder keeps its lock open, so a lock that nobody on this machine has open is stale. On a network file system
    another machine may have it open; there it must be older than any build takes.

    Returns:
        What was removed. Nothing where it cannot be known who has a file open (no /proc), or where nothing can be
        written: a builder could not have made a lock there either.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not os.access(root, os.W_OK) or not Path("/proc/self/fd").is_dir():
        return []
    # All ranks pass through here one by one: none can remove a lock that another, past this point, has just made.
    with (root / ".sett").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        found = [*root.glob("*/lock"), *root.glob("*/*/lock")]
        if not found:
            return []
        held = _open_files()
        age = _LONGEST_BUILD if _is_network(root) else 0.0
        return [lock for lock in found if str(lock.resolve()) not in held and _remove(lock, age)]


def _remove(lock: Path, age: float) -> bool:
    try:
        if time.time() - lock.stat().st_mtime < age:
            return False
        lock.unlink()
    except FileNotFoundError:  # its build has just ended
        return False
    return True


def _open_files() -> set[str]:
    """Files that this user's processes have open."""
    found: set[str] = set()
    for process in psutil.process_iter():
        try:
            links = list(Path(f"/proc/{process.pid}/fd").iterdir())
        except OSError:  # gone, or another user's, who has another build root
            continue
        for link in links:
            try:
                found.add(str(link.readlink()))
            except OSError:
                continue
    return found


def _is_network(folder: Path) -> bool:
    kinds = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    kind = next((kinds[p] for p in [place, *place.parents] if p in kinds), "")
    return kind.startswith(_NETWORK)
