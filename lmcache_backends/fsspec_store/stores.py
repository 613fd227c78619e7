"""What a filesystem can do for one path, as coroutines, whichever way its library works.

`Objects` is an object store that fsspec reaches asynchronously, `Files` anything else that fsspec opens, on threads,
and `LocalFiles` a directory of this machine. Paths are the filesystem's own, without protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple, ParamSpec, TypeVar

from lmcache_core.aio import DaemonPool
from lmcache_core.errors import BAD_BLOCKS, BackendError, CorruptChunk, NoSpace
from lmcache_core.types import PAGE, MissReason, round_up

_T = TypeVar("_T")
_P = ParamSpec("_P")

TEMPORARY = "tmp"
"""Directory for files being written, below the root."""

ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf", "memory"})
"""Protocols whose write of an object shows a reader all of it or nothing. Elsewhere: a temporary name and a rename."""

_MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""Where filesystems say when a file was last written; there is no common name."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Entry(NamedTuple):
    """A file in a listing."""

    path: str
    nbytes: int
    modified: float
    """Unix seconds, 0 where the filesystem does not say."""


class Store(ABC):
    """Whole files by path. Absent files are `None`, an empty listing or no error; everything else raises."""

    def footprint(self, nbytes: int) -> int:
        """Bytes a file of `nbytes` takes."""
        return nbytes

    @abstractmethod
    async def exists(self, path: str) -> bool:
        """Whether the file is there."""

    @abstractmethod
    async def read(self, path: str, buffer: memoryview) -> int | None:
        """Read the whole file: its bytes, None when there is none. Raise `CorruptChunk` for one too large."""

    @abstractmethod
    async def write(self, path: str, buffer: memoryview) -> None:
        """Write the whole file, so that a reader sees all of it, or what was there before. Raise `NoSpace`."""

    @abstractmethod
    async def remove(self, path: str) -> None:
        """Remove the file."""

    @abstractmethod
    async def files(self, directory: str) -> list[Entry]:
        """Every file below the directory."""

    @abstractmethod
    async def close(self) -> None:
        """Release what the store holds here."""


def fill(path: str, data: bytes | memoryview, buffer: memoryview) -> int:
    """Copy a file's bytes into the buffer. Raise `CorruptChunk` when they do not fit."""
    if len(data) > len(buffer):
        raise oversized(path, len(data))
    buffer[: len(data)] = data
    return len(data)


def oversized(path: str, nbytes: int) -> CorruptChunk:
    return CorruptChunk(MissReason.CORRUPT, f"{path}: {nbytes} bytes, more than any object of this tier")


class Objects(Store):
    """An fsspec `AsyncFileSystem` over an object store. Its coroutines run on its own loop, which is fsspec's."""

    def __init__(self, filesystem: Any) -> None:
        self._fs = filesystem

    async def exists(self, path: str) -> bool:
        """By its first byte: filesystems ask twice to learn more about what is absent, for it might be a directory."""
        try:
            await self._fs._cat_file(path, start=0, end=1)
        except FileNotFoundError:
            return False
        return True

    async def read(self, path: str, buffer: memoryview) -> int | None:
        try:
            return fill(path, await self._fs._cat_file(path), buffer)
        except FileNotFoundError:
            return None

    async def write(self, path: str, buffer: memoryview) -> None:
        await self._fs._pipe_file(path, bytes(buffer))  # clients take bytes only

    async def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            await self._fs._rm_file(path)

    async def files(self, directory: str) -> list[Entry]:
        self._fs.invalidate_cache()
        try:
            found = await self._fs._find(directory, detail=True)
        except FileNotFoundError:
            return []
        finally:
            self._fs.invalidate_cache()
        return [_entry(path, info) for path, info in found.items()]

    async def close(self) -> None:
        """The filesystem closes its session when it is collected."""


class Files(Store):
    """Any fsspec filesystem, through its blocking methods, on threads."""

    def __init__(self, filesystem: Any, root: str, *, atomic: bool, threads: int, name: str) -> None:
        """`atomic`: whether a write to the final path is never seen half done."""
        self._fs = filesystem
        self._temporary = f"{root}/{TEMPORARY}"
        self._atomic = atomic
        self._pool = DaemonPool(threads, f"lmcache-{name}")
        self._lock = threading.Lock()
        self._made: set[str] = set()
        """Directories known to be there."""
        self._unread: set[str] = set()
        """Files whose last read met bad blocks."""

    async def exists(self, path: str) -> bool:
        return await self._call(self._size, path) is not None

    async def read(self, path: str, buffer: memoryview) -> int | None:
        return await self._call(self._read, path, buffer)

    async def write(self, path: str, buffer: memoryview) -> None:
        await self._call(self._write, path, buffer)

    async def remove(self, path: str) -> None:
        await self._call(self._remove, path)

    async def files(self, directory: str) -> list[Entry]:
        return await self._call(self._files, directory)

    async def close(self) -> None:
        self._pool.shutdown()

    async def _call(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.wrap_future(self._pool.submit(work, *args, **kwargs))

    # -- on a thread -------------------------------------------------------------------------------------------
    def _size(self, path: str) -> int | None:
        try:
            info = self._fs.info(path)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def _read(self, path: str, buffer: memoryview) -> int | None:
        try:
            return fill(path, self._fs.cat_file(path), buffer)
        except FileNotFoundError:
            return None

    def _write(self, path: str, buffer: memoryview) -> None:
        if self._atomic:
            self._fs.pipe_file(path, bytes(buffer))
            self._withdraw_if_late(path, buffer)
            return
        temporary, moved = f"{self._temporary}/{secrets.token_hex(16)}", False
        try:
            self._in_directory(self._temporary, self._fill_temporary, temporary, buffer)
            _still_lent(buffer)
            self._in_directory(path.rpartition("/")[0], self._rename, temporary, path)
            moved = True
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise NoSpace(str(error)) from error
            if self._size(path) != len(buffer):  # some servers rename onto nothing that exists; then it is there
                raise
        finally:
            if not moved:
                with contextlib.suppress(Exception):  # what is to be told is why it was not moved
                    self._remove(temporary)
        self._withdraw_if_late(path, buffer)

    def _withdraw_if_late(self, path: str, buffer: memoryview) -> None:
        """Remove what got its name after the call was given up: it may have been deleted since, and is in nobody's
        books. What was stored anew meanwhile goes with it, which is a miss."""
        try:
            _still_lent(buffer)
        except BackendError:
            with contextlib.suppress(Exception):
                self._remove(path)
            raise

    def _fill_temporary(self, temporary: str, buffer: memoryview) -> None:
        self._fs.pipe_file(temporary, bytes(buffer))

    def _rename(self, temporary: str, path: str) -> None:
        self._fs.mv(temporary, path)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _files(self, directory: str) -> list[Entry]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(directory, detail=True)
        except FileNotFoundError:
            return []
        finally:
            self._fs.invalidate_cache()
        return [_entry(path, info) for path, info in found.items()]

    def _in_directory(self, directory: str, work: Callable[[str, Any], None], name: str, what: Any) -> None:
        """Do what needs the directory; make it when it is not known to be there, or is not there any more."""
        if directory in self._made:
            try:
                return work(name, what)
            except FileNotFoundError:
                pass
        self._make(directory)
        with self._lock:
            self._made.add(directory)
        return work(name, what)

    def _make(self, directory: str) -> None:
        self._fs.makedirs(directory, exist_ok=True)


class LocalFiles(Files):
    """Files of this machine, by its own calls: private to the user, links are not followed."""

    def footprint(self, nbytes: int) -> int:
        """Whole blocks, and one for the name and the inode's extents."""
        return round_up(nbytes) + PAGE

    def _size(self, path: str) -> int | None:
        try:
            return os.stat(path, follow_symlinks=False).st_size
        except FileNotFoundError:
            return None

    def _read(self, path: str, buffer: memoryview) -> int | None:
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                if nbytes > len(buffer):
                    raise oversized(path, nbytes)
                # Not into the buffer: a read that hangs would keep it, and be done when another chunk is there.
                got = fill(path, file.read(nbytes), buffer)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in BAD_BLOCKS:
                raise
            if path in self._unread:  # kept, it would fail every request for its prefix, and never be stored anew
                raise CorruptChunk(MissReason.ERROR, f"{path} cannot be read, twice in a row") from error
            self._unread.add(path)
            raise
        self._unread.discard(path)
        return got

    def _fill_temporary(self, temporary: str, buffer: memoryview) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o600), "wb", buffering=0) as file:
            written, data = 0, memoryview(bytes(buffer))  # a copy, as a write may hang as well
            while written < len(data):
                written += file.write(data[written:])

    def _rename(self, temporary: str, path: str) -> None:
        os.replace(temporary, path)

    def _remove(self, path: str) -> None:
        self._unread.discard(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def _make(self, directory: str) -> None:
        try:
            os.mkdir(directory, 0o700)  # `os.makedirs` gives its mode to the last one only
        except FileNotFoundError:
            self._make(os.path.dirname(directory))
            self._make(directory)
        except FileExistsError:
            pass


def _still_lent(buffer: memoryview) -> None:
    """Raise when the call that lent the buffer has given up: what was written may be part of another object."""
    try:
        len(buffer)
    except ValueError as error:
        raise BackendError("the call was given up") from error


def _entry(path: str, info: dict[str, Any]) -> Entry:
    when = next((info[name] for name in _MODIFIED if info.get(name) is not None), None)
    return Entry(path, int(info.get("size") or 0), _seconds(when))


def _seconds(when: object) -> float:
    """Unix seconds from what a listing says; 0 for what cannot be understood: age only orders eviction."""
    if isinstance(when, str):
        try:
            when = datetime.fromisoformat(when)
        except ValueError:
            return 0.0
    if isinstance(when, datetime):
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    return float(when) if isinstance(when, (int, float)) else 0.0
