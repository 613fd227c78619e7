"""What this machine has: memory (as the container sees it) and file systems."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Disk:
    """One file system, in bytes."""

    total: int
    free: int
    """What an unprivileged process may still allocate."""


def memory_total() -> int:
    """Bytes of memory this process may use at all: the machine's, or its cgroup's limit where that is lower."""
    limits = [limit for limit, _ in _cgroup_limits()]
    return min([_meminfo()["MemTotal"], *limits])


def memory_available() -> int:
    """Bytes of memory that can be allocated now without swapping or hitting a cgroup limit."""
    room = [max(0, limit - used) for limit, used in _cgroup_limits()]
    return min([_meminfo()["MemAvailable"], *room])


def disk(path: Path) -> Disk:
    """The file system that holds `path`, or would once it is created."""
    stats = os.statvfs(existing(path))
    return Disk(stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize)


def existing(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _meminfo() -> dict[str, int]:
    lines = (_PROC / "meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, bytes used that cannot be reclaimed) of every cgroup of this process, v1 or v2, that has a limit."""
    found: list[tuple[int, int]] = []
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = (
                _CGROUP / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        group = root / name.lstrip("/")
        # In a container the path may be the host's; its own root is then mounted at the top.
        for directory in [group, *group.parents] if group.is_dir() else [root]:
            found += _limit(directory, *names)
            if directory == root:
                break
    return found


def _limit(directory: Path, limit_file: str, usage_file: str, reclaimable: str) -> list[tuple[int, int]]:
    try:
        limit = (directory / limit_file).read_text().strip()
        used = int((directory / usage_file).read_text())
        stats = (directory / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return []
    if limit == "max" or int(limit) >= 1 << 60:
        return []
    cached = int(stats[stats.index(reclaimable) + 1]) if reclaimable in stats else 0
    return [(int(limit), max(0, used - cached))]
