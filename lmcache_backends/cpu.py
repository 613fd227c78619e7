"""`cpu`: host memory. One page-aligned arena, faulted in at start-up, pinned when a CUDA device is there."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from typing import Any, ClassVar, Literal

import numpy as np

from lmcache_core.errors import BackendUnavailable
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, Region

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14; absent from Python's mmap module


class CpuMemory(MemoryBackend):
    """Anonymous memory, or a memfd that another process of the same user can map."""

    def __init__(self, *, pin: bool, shared: bool) -> None:
        self._pin = pin
        self._shared = shared
        self._open: list[tuple[mmap.mmap, int, int]] = []

    def allocate(self, nbytes: int) -> Region:
        fd = -1
        try:
            if self._shared:
                fd = os.memfd_create("lmcache-arena", os.MFD_CLOEXEC)
                os.ftruncate(fd, nbytes)
                memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
            else:
                memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                _advise(memory, _MADV_HUGEPAGE)
            flat = np.frombuffer(memory, dtype=np.uint8)
            # A first fault on the hot path costs 10x a copy.
            if not _advise(memory, _MADV_POPULATE_WRITE):
                flat[:: mmap.PAGESIZE] = 0
            address = int(flat.ctypes.data)
            pinned = _register(address, nbytes) if self._pin else False
        except (OSError, ValueError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            raise BackendUnavailable(
                f"cannot allocate {nbytes} bytes of host memory: {error}; lower the tier's capacity or free memory"
            ) from error
        self._open.append((memory, fd, address if pinned else 0))
        share = {"pid": os.getpid(), "fd": fd, "nbytes": nbytes} if self._shared else None
        return Region(address, nbytes, memoryview(memory), share, pinned, owner=memory)

    def close(self) -> None:
        # The mapping itself goes when the last view does: a copy still running must never lose its memory.
        for _, fd, pinned_address in self._open:
            if pinned_address:
                _cudart().cudaHostUnregister(pinned_address)
            if fd >= 0:
                os.close(fd)
        self._open.clear()


def _advise(memory: mmap.mmap, option: int) -> bool:
    """Whether the kernel did it; False where it does not know the advice. Raise `OSError` when memory is missing."""
    try:
        memory.madvise(option)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _cudart() -> Any:
    return sys.modules["torch"].cuda.cudart()


def _register(address: int, nbytes: int) -> bool:
    """Pin the arena for asynchronous copies. Only when the engine has brought torch with a CUDA device."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return False
    return int(_cudart().cudaHostRegister(address, nbytes, 0)) == 0


class CpuConfig(BackendConfig):
    """Host memory, the tier nearest to an engine that has no GPU tier."""

    in_memory: ClassVar[bool] = True

    type: Literal["cpu"] = "cpu"
    pin: bool = True
    """Register the memory with CUDA when there is a device."""
    shared: bool = False
    """Allocate memory that other processes of the same user can map, even if the engine does not need it."""

    def build(self, context: BuildContext) -> CpuMemory:
        return CpuMemory(pin=self.pin, shared=self.shared or context.shared)


@hookimpl
def lmcache_backends() -> list[type[BackendConfig]]:
    return [CpuConfig]
