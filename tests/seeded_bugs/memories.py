"""Memory backends with one bug each, over `cpu`."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmcache_backends.cpu import CpuMemory
from lmcache_core.protocols import BuildContext, MemoryBackend, Region
from lmcache_core.types import PAGE


class Correct(CpuMemory):
    """The base."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__(pin=False, shared=context.shared)


class Misaligned(Correct):
    """Takes what an allocator gives."""

    def allocate(self, nbytes: int) -> Region:
        region = super().allocate(nbytes + PAGE)
        return Region(region.address + 64, nbytes, region.view[64 : 64 + nbytes], region.share, owner=region.owner)


class WrongAddress(Correct):
    """Tells where the mapping begins, and hands out what comes behind its own header."""

    def allocate(self, nbytes: int) -> Region:
        region = super().allocate(nbytes + PAGE)
        return Region(region.address, nbytes, region.view[PAGE:], region.share, owner=region.owner)


class ReadOnly(Correct):
    def allocate(self, nbytes: int) -> Region:
        region = super().allocate(nbytes)
        region.view = region.view.toreadonly()
        return region


class Short(Correct):
    """Hands out whole large pages only."""

    def allocate(self, nbytes: int) -> Region:
        region = super().allocate(nbytes)
        region.view = region.view[: max(PAGE, nbytes - 2 * PAGE)]
        return region


class Items(Correct):
    """Has a view of 8-byte numbers."""

    def allocate(self, nbytes: int) -> Region:
        region = super().allocate(nbytes)
        region.view = region.view.cast("Q")
        return region


class Lazy(Correct):
    """Leaves the first touch to whoever comes first."""

    def allocate(self, nbytes: int) -> Region:
        if nbytes > 1 << 50 or self._shared:
            return super().allocate(nbytes)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return Region(int(np.frombuffer(memory, np.uint8).ctypes.data), nbytes, memoryview(memory), owner=memory)


class Recycled(Correct):
    """Hands the same memory out again."""

    region: Region | None = None

    def allocate(self, nbytes: int) -> Region:
        if self.region is None or self.region.nbytes != nbytes:
            self.region = super().allocate(nbytes)
        return self.region


class NotShared(Correct):
    def __init__(self, context: BuildContext) -> None:
        super(Correct, self).__init__(pin=False, shared=False)


class SharesAnother(Correct):
    """Tells the way to a memfd of the right size, but not to the one it handed out."""

    def allocate(self, nbytes: int) -> Region:
        region = super().allocate(nbytes)
        if region.share is not None:
            region.share = super().allocate(nbytes).share
        return region


class RaisesItsOwn(Correct):
    def allocate(self, nbytes: int) -> Region:
        if nbytes > 1 << 50:
            raise MemoryError(nbytes)
        return super().allocate(nbytes)


class AllocatesLess(Correct):
    def allocate(self, nbytes: int) -> Region:
        return super().allocate(min(nbytes, 8 << 20))


class ClosesOnce(Correct):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise OSError(9, "Bad file descriptor")
        self.closed = True
        super().close()


@dataclass(frozen=True)
class Bug:
    """A memory backend with a bug."""

    build: Callable[[BuildContext], MemoryBackend]
    contract: str
    """The contract it breaks."""


BUGS = {
    "misaligned": Bug(Misaligned, "region address"),
    "wrong address": Bug(WrongAddress, "region address"),
    "read-only": Bug(ReadOnly, "writable region"),
    "short": Bug(Short, "region size"),
    "items": Bug(Items, "region size"),
    "lazy": Bug(Lazy, "faulted in"),
    "recycled": Bug(Recycled, "own region"),
    "not shared": Bug(NotShared, "shared region"),
    "shares another": Bug(SharesAnother, "shared region"),
    "raises its own": Bug(RaisesItsOwn, "refusal"),
    "allocates less": Bug(AllocatesLess, "refusal"),
    "closes once": Bug(ClosesOnce, "close"),
}
