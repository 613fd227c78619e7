"""The `gds` storage backend: whatever volume is open in the directory, and what to do when the directory goes away."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from lmcache_backends.gds.folder import Folder
from lmcache_backends.gds.mover import HOST, Movement
from lmcache_core.errors import BackendError, Closed
from lmcache_core.protocols import Region, StorageBackend
from lmcache_core.types import ChunkKey, Got, Put, Usage

_T = TypeVar("_T")


class Volume(Protocol):
    """An open directory with objects in it. Methods as in `StorageBackend`."""

    folder: Folder
    stale: bool

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]: ...
    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]: ...
    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]: ...
    def delete(self, keys: Sequence[ChunkKey]) -> None: ...
    def clear(self) -> None: ...
    def scan(self) -> Iterator[tuple[ChunkKey, int]]: ...
    def usage(self) -> Usage: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class DiskBackend(StorageBackend):
    """Objects in files of one directory.

    Before each batch the path is compared with the directory that is open. When it is gone, replaced or unmounted,
    nothing is written, not even to what lies below the mount point: every key gets `BackendUnavailable` until a
    directory on the same device is back at the path, which is then recovered like at start-up.
    """

    def __init__(
        self,
        open_volume: Callable[[int | None], Volume],
        footprint: Callable[[int], int],
        *,
        turns: int = 2,
        movement: Movement = HOST,
    ) -> None:
        """`open_volume(device)` opens the directory if it is on that device; with None it is made where missing.

        At most `turns` batches are written at once, and twice as many read. A disk that serves all callers side by side
        finishes them together, then idles while they all compute checksums; so some wait here for their turn.
        """
        self._open_volume = open_volume
        self._footprint = footprint
        self._movement = movement
        self._volume: Volume | None = open_volume(None)
        self._device = self._volume.folder.device
        self._turn = threading.Lock()
        self._reads = _Turns(2 * turns)
        self._writes = _Turns(turns)
        self._closed = False

    def register(self, region: Region) -> None:
        self._movement.register(region)

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        volume = self._volume
        return volume.contains(keys) if volume is not None else [False] * len(keys)

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        try:
            with self._reads:
                return _bare(self._here().get_into(keys, buffers))
        except (BackendError, Closed, OSError) as error:
            return _bare([error] * len(keys))

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        try:
            with self._writes:
                return _bare(self._here().put_from(keys, buffers))
        except (BackendError, Closed, OSError) as error:
            return _bare([error] * len(keys))

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        self._here().delete(keys)

    def clear(self) -> None:
        self._here().clear()

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        return self._here().scan()

    def footprint(self, nbytes: int) -> int:
        return self._footprint(nbytes)

    def usage(self) -> Usage | None:
        volume = self._volume
        return volume.usage() if volume is not None else None

    def stats(self) -> dict[str, Any]:
        return self._movement.stats()

    def close(self) -> None:
        with self._turn:
            volume, self._volume, self._closed = self._volume, None, True
        if volume is not None:
            volume.close()
        self._movement.close()

    def _here(self) -> Volume:
        """The volume, if the path still leads to it; else a new one. Raise `BackendUnavailable` or `Closed`."""
        volume = self._volume
        if volume is not None and not volume.stale and volume.folder.in_place():
            return volume
        with self._turn:
            if self._closed:
                raise Closed("the backend is closed")
            if volume is not None and volume is self._volume:
                self._volume = None
                volume.abandon()
            if self._volume is None:
                self._volume = self._open_volume(self._device)
            return self._volume


class _Turns:
    """A semaphore that serves callers in the order they came. One that a busy thread can take again at once, as
    `threading.Semaphore` can be, starves the others for seconds."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        gate.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1


def _bare(results: list[_T]) -> list[_T]:
    """The results, their exceptions without tracebacks: these would keep files open, and with them a lost disk busy."""
    for result in results:
        if isinstance(result, Exception):
            result.__traceback__ = result.__cause__ = result.__context__ = None
    return results


class SegmentBackend(DiskBackend):
    """`mode: segments`. What is in device memory and no mover can move is `EFAULT`."""

    contains_is_local: ClassVar[bool] = True
    device_direct: ClassVar[bool] = True


class FileBackend(DiskBackend):
    """`mode: files`."""
