"""What only this machine can say about a valid configuration: does it fit, and are its directories safe."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lmcache_core.config import machine
from lmcache_core.config.findings import Code, Finding, Loc
from lmcache_core.config.models import PipelineConfig, TierConfig
from lmcache_core.units import format_bytes

_SYSTEM = [Path(p) for p in ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr")]
_SHARED_ROOTS = [
    Path(p) for p in ("/", "/home", "/opt", "/root", "/run", "/srv", "/tmp", "/var", "/var/cache", "/var/tmp")
]
_MEMORY_FS = Path("/dev/shm")


def machine_findings(config: PipelineConfig) -> list[Finding]:
    """Every reason not to start this configuration here."""
    found = list(_memory(config))
    directories: list[tuple[int, Path]] = []
    for i, tier in enumerate(config.tiers):
        directory = tier.backend.local_directory()
        if directory is None:
            continue
        loc: Loc = ("tiers", i, "backend", "path")
        problem = (
            _directory(loc, directory)
            or _writable(loc, tier, directory)
            or _overlap(loc, directory, directories)
            or _disk(i, tier, directory)
        )
        if problem is not None:
            found.append(problem)
        directories.append((i, directory))
    return found


def _memory(config: PipelineConfig) -> list[Finding]:
    wanted = config.host_tiers[0].capacity or 0
    available = machine.memory_available()
    if wanted <= available:
        return []
    what = f"{format_bytes(wanted)} of memory are more than the {format_bytes(available)} that can be allocated now"
    why = "the arena is allocated and touched at start-up: the kernel would kill the process"
    fix = f"lower it to at most {format_bytes(available // 2).replace(' ', '')} and leave room for the engine"
    at = config.tiers.index(config.host_tiers[0])
    return [Finding(("tiers", at, "capacity"), what, why, fix, code=Code.MACHINE)]


def _disk(i: int, tier: TierConfig, directory: Path) -> Finding | None:
    disk = machine.disk(directory)
    if tier.capacity is None or tier.capacity <= disk.total:
        return None
    what = f"{format_bytes(tier.capacity)} are more than the whole file system has ({format_bytes(disk.total)})"
    why = "the tier would fill the file system before its limit stops it"
    return Finding(("tiers", i, "capacity"), what, why, "write a share, e.g. `capacity: 60%`", code=Code.MACHINE)


def _directory(loc: Loc, directory: Path) -> Finding | None:
    """Why objects must not be stored in this directory."""
    if not directory.is_absolute():
        why = "it would mean another place in every working directory"
        return Finding(loc, "must be an absolute path", why, f"write `{directory.absolute()}`", code=Code.MACHINE)
    plain = Path(os.path.normpath(directory))
    inside = next((root for root in _SYSTEM if plain == root or root in plain.parents), None)
    if (inside is not None and _MEMORY_FS not in plain.parents) or plain in _SHARED_ROOTS:
        why = "the tier owns its directory: it deletes what it does not know"
        fix = "give it a directory of its own, e.g. `/var/cache/lmcache`"
        return Finding(loc, "is a directory of the system", why, fix, code=Code.MACHINE)
    nearest = machine.existing(plain)
    info = nearest.stat()
    if not stat.S_ISDIR(info.st_mode):
        return Finding(
            loc, f"`{nearest}` is not a directory", "nothing could be stored", "choose another", code=Code.MACHINE
        )
    if nearest == plain:
        planted = "other users could plant or replace objects"
        if info.st_uid not in (os.geteuid(), 0):
            fix = f"`chown {_user()} {nearest}`, or choose another directory"
            return Finding(loc, f"belongs to another user (uid {info.st_uid})", planted, fix, code=Code.MACHINE)
        if info.st_mode & 0o022:
            mode = stat.filemode(info.st_mode)
            return Finding(
                loc, f"others may write to it ({mode})", planted, f"`chmod 700 {nearest}`", code=Code.MACHINE
            )
    return None


def _writable(loc: Loc, tier: TierConfig, directory: Path) -> Finding | None:
    nearest = machine.existing(directory)
    if tier.write == "never" or os.access(nearest, os.W_OK | os.X_OK):
        return None
    what = f"this user (uid {os.geteuid()}) cannot write to `{nearest}`"
    fix = f"`chown {_user()} {nearest}`, or choose another directory"
    return Finding(loc, what, "nothing could be stored", fix, code=Code.MACHINE)


def _overlap(loc: Loc, directory: Path, others: list[tuple[int, Path]]) -> Finding | None:
    here = Path(os.path.realpath(directory))
    for i, other in others:
        there = Path(os.path.realpath(other))
        if here == there or here in there.parents or there in here.parents:
            why = "each would delete the other's files"
            what = f"overlaps the directory of tiers[{i}]"
            return Finding(loc, what, why, "give every tier a directory of its own", code=Code.MACHINE)
    return None


def _user() -> str:
    return str(os.geteuid())
