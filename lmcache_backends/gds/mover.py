"""How the bytes of a volume move: by the host path, or by a library beside it, span by span.

A mover takes what lies in memory that was registered with it. What it cannot move, the host path moves at once, and the
reason is counted; after a few calls in a row that failed it is not tried again. The core's slots lie in host memory.
Who registers device memory and lends buffers there gets `EFAULT` for what the mover cannot move.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from lmcache_backends.gds import transfer
from lmcache_backends.gds.folder import Fd
from lmcache_backends.gds.transfer import Span
from lmcache_core.protocols import Region

Wanted = Literal["auto", "host", "cufile", "nixl"]

FAILURES = 5
"""Calls in a row that may fail before a mover is not tried any more."""

_MOST_REASONS = 16


class MoverError(Exception):
    """Why a mover cannot be used, or not for this file or memory."""


class Failure(NamedTuple):
    """Why a piece was not moved. No exception: its traceback would keep alive what the mover has to close."""

    reason: str
    lost: bool = False
    """I/O may still be under way until the mover is closed."""


class Piece(NamedTuple):
    """A span for a mover: its file as `open` returned it, its memory inside a registered region."""

    file: Any
    offset: int
    address: int
    nbytes: int
    region: Region


class Mover(ABC):
    """A library that moves bytes between files and registered memory. Called from several threads at once."""

    name: ClassVar[str]

    @abstractmethod
    def start(self) -> str:
        """Make ready, and tell people what is in use. Raise `MoverError`."""

    @abstractmethod
    def register(self, region: Region) -> None:
        """Raise `MoverError` when the memory can only be used as if it had not been registered."""

    @abstractmethod
    def open(self, fd: int) -> Any:
        """Register a file that stays open; what `Piece.file` is. Raise `MoverError`."""

    @abstractmethod
    def shut(self, file: Any) -> None:
        """Undo `open`."""

    @abstractmethod
    def move(self, pieces: Sequence[Piece], *, write: bool) -> list[Failure | None]:
        """Write to, or read from, the files; None for each piece all of whose bytes moved."""

    @abstractmethod
    def close(self) -> None:
        """Undo everything. Nothing is under way, and nothing is called afterwards."""


class Movement:
    """What moves the bytes of one backend, in whatever volume it has open."""

    def __init__(self, wanted: Wanted, make: Callable[[], Mover] | None) -> None:
        """`make`: the mover that is wanted. For `auto` it is started once there is device memory, else now.

        Raise `MoverError` where a mover that was asked for by name cannot be used.
        """
        self._make = make
        self._named = wanted in ("cufile", "nixl")
        self._lock = threading.RLock()
        """Reentrant: a file may be closed by the garbage collector, anywhere."""
        self._mover: Mover | None = None
        self._text = ""
        self._regions: list[Region] = []
        """What the mover is for: device memory, and if it was asked for by name all."""
        self._files: dict[int, Any] = {}
        """By descriptor: as the mover knows them, or why it does not."""
        self._users = 0
        self._ending = False
        self._ended = threading.Event()
        self._failed_calls = 0
        self._moved = 0
        self._fallbacks: Counter[str] = Counter()
        if self._named:
            self._start()

    def _start(self) -> None:
        assert self._make is not None
        mover = self._make()
        self._text = f"{mover.name}: {mover.start()}"
        self._mover = mover

    def register(self, region: Region) -> None:
        """As `StorageBackend.register`; never fails: there is always the host path."""
        if self._mover is None and self._make is not None and region.device is not None:
            try:
                self._start()
            except MoverError as error:
                self._make, self._text = None, f"host path, because {error}"
        if self._mover is None or (region.device is None and not self._named):
            return
        try:
            self._mover.register(region)
        except MoverError as error:
            self._count(str(error))
        self._regions.append(region)

    def adopt(self, fd: Fd) -> None:
        """A file that will be moved to and from; the mover lets go of it before it is closed."""
        if self._make is not None:
            fd.before_close = self._forget

    def read(self, spans: Sequence[Span]) -> list[int]:
        """As `transfer.read`."""
        return self._move(spans, write=False) if self._regions else transfer.read(spans)

    def write(self, spans: Sequence[Span]) -> list[int]:
        """As `transfer.write`."""
        return self._move(spans, write=True) if self._regions else transfer.write(spans)

    def stats(self) -> dict[str, Any]:
        """What is in use, spans it moved, and how often and why the host path did it. Empty if none was wanted."""
        if not self._text:
            return {}
        with self._lock:
            return {"mover": self._text, "moved": self._moved, "fallbacks": dict(self._fallbacks)}

    def close(self) -> None:
        """Let go of files and memory, at the latest with the last call under way."""
        self._end("is closed")

    # -- moving ------------------------------------------------------------------------------------------------
    def _move(self, spans: Sequence[Span], *, write: bool) -> list[int]:
        moved = self._by_mover(spans, write=write)
        results = [span.nbytes for span in spans]
        left = [i for i, done in enumerate(moved) if not done]
        if left:
            by_host = transfer.write if write else transfer.read
            for i, result in zip(left, by_host([spans[i] for i in left]), strict=True):
                results[i] = result
        return results

    def _region_of(self, span: Span) -> Region | None:
        for region in self._regions:
            if region.address <= span.address and span.address + span.nbytes <= region.address + region.nbytes:
                return region
        return None

    def _by_mover(self, spans: Sequence[Span], *, write: bool) -> list[bool]:
        """Which spans the mover moved, all of their bytes."""
        moved = [False] * len(spans)
        mover = self._enter()
        if mover is None:
            return moved
        failures: list[Failure] = []
        try:
            pieces: list[Piece] = []
            places: list[int] = []
            for i, span in enumerate(spans):
                region = self._region_of(span)
                if region is None:
                    continue
                file = self._file(mover, span.fd)
                if isinstance(file, MoverError):
                    failures.append(Failure(str(file)))
                else:
                    pieces.append(Piece(file, span.offset, span.address, span.nbytes, region))
                    places.append(i)
            for i, failure in zip(places, mover.move(pieces, write=write) if pieces else (), strict=True):
                if failure is None:
                    moved[i] = True
                else:
                    failures.append(failure)
        finally:
            self._leave()
        with self._lock:
            self._moved += sum(moved)
            self._failed_calls = self._failed_calls + 1 if failures else 0
            given_up = self._failed_calls >= FAILURES
        for failed in failures:
            self._count(failed.reason)
        if any(failed.lost for failed in failures):
            self._end(f"was lost: {failures[-1].reason}")
            # The memory must not be anybody else's before nothing can write to it any more.
            self._ended.wait()
        elif given_up:
            self._end(f"failed {FAILURES} times in a row, last: {failures[-1].reason}")
        return moved

    def _file(self, mover: Mover, fd: int) -> Any:
        """The file as the mover knows it, registered when it is first used; or the `MoverError` that it had."""
        with self._lock:
            if fd not in self._files:
                try:
                    self._files[fd] = mover.open(fd)
                except MoverError as error:
                    self._files[fd] = error
            return self._files[fd]

    def _forget(self, fd: int) -> None:
        with self._lock:
            file = self._files.pop(fd, None)
            mover = self._mover
            if mover is None or file is None or isinstance(file, MoverError):
                return
            self._users += 1
        mover.shut(file)
        self._leave()

    def _count(self, reason: str) -> None:
        with self._lock:
            known = reason in self._fallbacks or len(self._fallbacks) < _MOST_REASONS
            self._fallbacks[reason if known else "other"] += 1

    # -- the mover's life --------------------------------------------------------------------------------------
    def _enter(self) -> Mover | None:
        with self._lock:
            if self._mover is None or self._ending:
                return None
            self._users += 1
            return self._mover

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users or not self._ending:
                return
            mover, self._mover = self._mover, None
            files, self._files = self._files, {}
        try:
            if mover is not None:
                for file in files.values():
                    if not isinstance(file, MoverError):
                        mover.shut(file)
                mover.close()
        finally:
            self._ended.set()

    def _end(self, why: str) -> None:
        """Use the mover no more; whoever leaves last closes it."""
        with self._lock:
            if self._ending:
                return
            self._ending = True
            if self._mover is not None:
                self._text = f"host path, because {self._mover.name} {why}"
            self._users += 1
        self._leave()


HOST = Movement("host", None)
"""By the host path alone."""
