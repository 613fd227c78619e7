"""One directory that is ours: opened once, safely, and addressed through its descriptor ever after.

Names are resolved relative to the open directory and never through a symbolic link, so that a directory that is
deleted, replaced or unmounted while we run can neither lead our writes elsewhere nor fill the file system below.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lmcache_core.errors import BackendUnavailable
from lmcache_core.types import PAGE
from lmcache_core.units import Percent

Io = Literal["auto", "direct", "buffered"]

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
BLOCK = 512
"""Unit of `st_blocks`, whatever the file system's own block is."""


class Fd:
    """An open descriptor, closed when nobody refers to it: a batch in flight keeps its files open through `clear`."""

    __slots__ = ("before_close", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.before_close: Callable[[int], None] | None = None
        """Told the number while it is still this file's."""

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        if self.before_close is not None:
            self.before_close(self.number)
        _close(self.number)

    @property
    def allocated(self) -> int:
        """Bytes the file occupies on the medium."""
        return os.fstat(self.number).st_blocks * BLOCK


class Folder:
    """The open directory of one backend."""

    def __init__(self, path: Path, device: int | None = None) -> None:
        """Open `path`, an absolute path, on that device; without one, make it (0700) and its parents where missing.

        Raise `BackendUnavailable` when it cannot be used, or when others could plant files in it.
        """
        self.path = path
        try:
            if device is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):  # checked below like any other
                    path.mkdir(mode=0o700)
            self.fd = Fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS))
            info = os.fstat(self.fd.number)
        except OSError as error:
            raise BackendUnavailable(_why_not(path, error)) from error
        self._identity = (info.st_dev, info.st_ino)
        self.device = info.st_dev
        if device is not None and device != self.device:
            raise BackendUnavailable(
                f"{path} is on another file system than when the tier started (device {self.device}, was {device}): "
                "mount the right one again, or restart to use this one"
            )
        if info.st_uid != os.geteuid():
            raise BackendUnavailable(
                f"{path} belongs to uid {info.st_uid}, this process runs as uid {os.geteuid()}; "
                f"use a directory of its own, or `chown {os.geteuid()} {path}`"
            )
        if info.st_mode & _OTHERS_MAY_WRITE:
            raise BackendUnavailable(
                f"{path} has mode {stat.S_IMODE(info.st_mode):04o}: others may write into it and so change what the "
                f"engine computes; `chmod 700 {path}`"
            )

    def in_place(self) -> bool:
        """Whether the path still leads to this very directory (not deleted, replaced, covered or unmounted)."""
        try:
            info = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return (info.st_dev, info.st_ino) == self._identity

    def refuse(self, name: str, mode: str) -> None:
        """Raise `BackendUnavailable` when the directory holds what only the other mode makes."""
        if name in os.listdir(self.fd.number):
            raise BackendUnavailable(
                f"{self.path} holds a store of `mode: {mode}`: use that mode, another path, or empty the directory"
            )

    def open(self, name: str, flags: int, within: Fd | None = None) -> Fd:
        """Open a regular file of ours by name. Raise `OSError`; `ELOOP` for a symbolic link."""
        at = (within or self.fd).number
        fd = Fd(os.open(name, flags | _FLAGS, 0o600, dir_fd=at))
        info = os.fstat(fd.number)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "not a regular file of this user", name)
        return fd

    def enter(self, name: str, within: Fd | None = None, *, create: bool = False) -> Fd:
        """Open a subdirectory by name, making it (0700) where asked. Raise `OSError`."""
        at = (within or self.fd).number
        flags = os.O_RDONLY | os.O_DIRECTORY | _FLAGS
        try:
            return Fd(os.open(name, flags, dir_fd=at))
        except FileNotFoundError:
            if not create:
                raise
        with contextlib.suppress(FileExistsError):  # another process sharing the directory was faster
            os.mkdir(name, 0o700, dir_fd=at)
        return Fd(os.open(name, flags, dir_fd=at))

    def unlink(self, name: str, within: Fd | None = None) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=(within or self.fd).number)

    def sync(self, within: Fd | None = None) -> None:
        """Make what was unlinked and renamed in the directory last through a power cut. Raise `OSError`."""
        os.fsync(self.fd.number)
        # An xfs that has shut itself down says yes to that and forgets; a file, here or in `within`, cannot be synced.
        name = _probe_name()
        try:
            fd = self.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, within)
            os.fsync(fd.number)
        finally:
            with contextlib.suppress(OSError):
                self.unlink(name, within)

    def free_bytes(self) -> int:
        """Bytes the file system has left for unprivileged users."""
        info = os.fstatvfs(self.fd.number)
        return info.f_bavail * info.f_frsize

    def floor_bytes(self, floor: int | Percent) -> int:
        """The free space to leave, in bytes."""
        if isinstance(floor, int):
            return floor
        info = os.fstatvfs(self.fd.number)
        return floor.of(info.f_blocks * info.f_frsize)

    def direct_flag(self, io: Io, within: Fd | None = None) -> int:
        """`O_DIRECT`, or 0 for buffered I/O: asked for, or (`auto`) because the file system refuses direct I/O.

        Tried with a file `probe-*.tmp` in the directory or in `within`; who is killed here leaves it behind.
        """
        if io == "buffered":
            return 0
        name = _probe_name()
        try:
            fd = self.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, within)
            with mmap.mmap(-1, PAGE) as page:
                os.pwrite(fd.number, page, 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, *NO_ROOM):
                raise BackendUnavailable(_why_not(self.path, error)) from error
            refused = error.errno not in NO_ROOM
            if io == "direct" and refused:
                raise BackendUnavailable(
                    f"the file system of {self.path} refuses direct I/O (O_DIRECT); use `io: auto` or `io: buffered`"
                ) from error
            # Nothing can be tried on a full disk: the page cache always works.
            return 0 if io == "auto" else os.O_DIRECT
        finally:
            with contextlib.suppress(OSError):  # on a read-only file system it was never made
                self.unlink(name, within)
        return os.O_DIRECT


def _probe_name() -> str:
    return f"probe-{secrets.token_hex(8)}.tmp"


def _why_not(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        return f"{path} is not a directory, or is a symbolic link: name the directory itself"
    if error.errno == errno.ENOENT:
        return f"{path} does not exist (any more): mount or create it again"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path} cannot be used by uid {os.geteuid()}: {error.strerror}"
    if error.errno == errno.EROFS:
        return f"{path} is on a read-only file system: remount it, or use another path"
    return f"{path} cannot be used: {error.strerror}"
