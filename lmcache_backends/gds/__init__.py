"""`gds`: sealed objects on a disk, by direct I/O into the core's own memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lmcache_backends.gds.backend import DiskBackend, FileBackend, SegmentBackend
from lmcache_backends.gds.cufile import CufileMover
from lmcache_backends.gds.files import FileVolume, file_footprint, least_capacity
from lmcache_backends.gds.folder import Folder, Io
from lmcache_backends.gds.geometry import Geometry, TooSmall
from lmcache_backends.gds.mover import Movement, Mover, MoverError, Wanted
from lmcache_backends.gds.nixl import NixlMover
from lmcache_backends.gds.segments import SegmentVolume
from lmcache_core.errors import BackendUnavailable, ConfigError, Problem
from lmcache_core.hookspecs import hookimpl
from lmcache_core.isolation import storage as isolation
from lmcache_core.isolation.mounts import network_file_system
from lmcache_core.isolation.storage import IsolatedStorage
from lmcache_core.protocols import BackendConfig, BuildContext
from lmcache_core.units import ByteSize, Percent, Size

DEFAULT_INODES = 1_000_000
_MOVERS: dict[Wanted, Callable[[], Mover]] = {"auto": CufileMover, "cufile": CufileMover, "nixl": NixlMover}


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


class GdsConfig(BackendConfig):
    """A directory on a local disk or a network file system."""

    lane_threads: ClassVar[int] = 8
    """While some threads check what they read, or seal what they write, others keep the device busy."""

    type: Literal["gds"] = "gds"
    path: Annotated[Path, AfterValidator(_absolute)]
    """Directory of this tier alone, made (0700) where missing."""
    mode: Literal["segments", "files"] = "segments"
    """`segments`: few large preallocated files, for one process. `files`: one file per chunk, for network file systems
    and for several processes sharing the directory."""
    io: Io = "auto"
    """`direct` bypasses the page cache, `buffered` does not, `auto` is direct where the file system allows it."""
    free_floor: Size = Percent(5)
    """Space to leave free on the file system: the tier does not grow below it."""
    mover: Wanted = "auto"
    """What moves the bytes in mode `segments`: `host` (system calls), `cufile` (GPUDirect Storage) or `nixl` (its POSIX
    and GDS plugins). What a library cannot move, the host path does, and the reason is counted. `auto`: `host` for host
    memory, where all slots are, and `cufile` for device memory of whoever registers some."""
    segment_bytes: ByteSize | None = None
    """Size of one segment file; by default a 64th of the capacity, within reason."""
    inodes: Annotated[int, Field(ge=64)] | None = None
    """Most files and directories in `mode: files`, a million by default."""
    isolate: Literal["auto", "always", "never"] = "auto"
    """Do the I/O in a process of its own: a hung file system may then hold that one for ever, and not the engine.
    `auto`: on network and FUSE file systems. Takes one chunk of memory for each thread of the lane."""

    @model_validator(mode="after")
    def _options_of_the_mode(self) -> Self:
        if self.mode == "files" and self.segment_bytes is not None:
            raise ValueError("segment_bytes has no meaning in mode `files`; remove it, or use mode `segments`")
        if self.mode == "segments" and self.inodes is not None:
            raise ValueError("inodes has no meaning in mode `segments`; remove it, or use mode `files`")
        if self._library and self.mode == "files":
            raise ValueError(f"mover `{self.mover}` is for files that stay open; remove it, or use mode `segments`")
        if self._library and self.isolate == "always":
            raise ValueError(f"mover `{self.mover}` needs the engine's own memory; remove it, or do not isolate")
        return self

    def local_directory(self) -> Path | None:
        return self.path

    @property
    def _library(self) -> bool:
        return self.mover in ("cufile", "nixl")

    @property
    def isolated(self) -> bool:
        """Whether the I/O runs in a process of its own."""
        if self.isolate == "auto":
            return not self._library and network_file_system(self.path) is not None
        return self.isolate == "always"

    def memory_bytes(self, context: BuildContext) -> int:
        return isolation.memory_bytes(context) if self.isolated else 0

    def build(self, context: BuildContext) -> DiskBackend | IsolatedStorage:
        """Open the directory. Raise `ConfigError` for a capacity that is missing or too small, `BackendUnavailable`."""
        if self.isolated:
            return IsolatedStorage(self.model_copy(update={"isolate": "never"}), context)
        capacity = context.capacity
        if capacity is None:
            raise _error(
                context,
                "capacity",
                what="a disk tier needs a capacity",
                why="without one it would fill the file system",
                fix="write one, e.g. `capacity: 20GiB`",
            )
        turns = max(2, context.threads // 4)  # half of the threads of each direction
        if self.mode == "files":
            inodes = self.inodes or DEFAULT_INODES
            least = least_capacity(context.object_bytes)
            if capacity < least:
                raise _too_small(context, TooSmall("capacity", capacity, least))

            def open_files(device: int | None) -> FileVolume:
                return FileVolume(Folder(self.path, device), capacity, inodes, self.io, self.free_floor)

            return FileBackend(open_files, file_footprint, turns=turns)
        try:
            geometry = Geometry.plan(capacity, context.object_bytes, self.segment_bytes)
        except TooSmall as error:
            raise _too_small(context, error) from error

        try:
            movement = Movement(self.mover, _MOVERS.get(self.mover))
        except MoverError as error:
            raise BackendUnavailable(f"mover `{self.mover}` cannot be used: {error}") from error

        def open_segments(device: int | None) -> SegmentVolume:
            return SegmentVolume(Folder(self.path, device), geometry, self.io, self.free_floor, movement)

        try:
            return SegmentBackend(open_segments, geometry.footprint, turns=turns, movement=movement)
        except BaseException:
            movement.close()
            raise


def _too_small(context: BuildContext, error: TooSmall) -> ConfigError:
    return _error(
        context,
        error.setting,
        what=f"{error.value} bytes",
        why=f"one object takes {context.object_bytes} bytes, and the tier's own files and directories their share",
        fix=f"set it to at least {error.least} bytes, or lower chunk_tokens",
    )


def _error(context: BuildContext, setting: str, *, what: str, why: str, fix: str) -> ConfigError:
    return ConfigError([Problem(where="build", path=f"tiers.{context.tier}.{setting}", what=what, why=why, fix=fix)])


@hookimpl
def lmcache_backends() -> list[type[BackendConfig]]:
    return [GdsConfig]
