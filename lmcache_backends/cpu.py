"""`cpu`: host memory. One page-aligned arena near the GPU that copies it, faulted in and pinned for it at start-up."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from lmcache_core import _cuda
from lmcache_core.errors import BackendUnavailable
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, Region

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14; absent from Python's mmap module
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED = 1  # the node while it has memory, then the others: a full node must not kill the process
_NODES = 1024

PCI = Path("/sys/bus/pci/devices")


class CpuMemory(MemoryBackend):
    """Anonymous memory, or a memfd that another process of the same user can map."""

    def __init__(self, *, pin: bool, shared: bool, gpu: int | None = None, node: int | None = None) -> None:
        """`gpu`: the device to pin for; without one, the device that torch uses in this process, if there is any.
        `node`: NUMA node to take memory from; without one that device's."""
        self._pin = pin
        self._shared = shared
        self._gpu = gpu
        self._node = node
        self._open: list[tuple[mmap.mmap, int, int]] = []

    def allocate(self, nbytes: int) -> Region:
        fd = -1
        gpu = (_torch_device() if self._gpu is None else self._gpu) if self._pin else None
        remarks: list[str] = []
        pinned = 0
        try:
            if self._shared:
                fd = os.memfd_create("lmcache-arena", os.MFD_CLOEXEC)
                os.ftruncate(fd, nbytes)
                memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
            else:
                memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                _advise(memory, _MADV_HUGEPAGE)
            flat = np.frombuffer(memory, dtype=np.uint8)
            address = int(flat.ctypes.data)
            node = _node_of(gpu) if self._node is None and gpu is not None else self._node
            if node is not None:
                remarks += _prefer(address, nbytes, node)
            # A first fault on the hot path costs 10x a copy.
            if not _advise(memory, _MADV_POPULATE_WRITE):
                flat[:: mmap.PAGESIZE] = 0
        except (OSError, ValueError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            raise BackendUnavailable(
                f"cannot allocate {nbytes} bytes of host memory: {error}; lower the tier's capacity or free memory"
            ) from error
        if gpu is not None:
            try:
                _cuda.pin(address, nbytes)
                pinned = address
            except _cuda.CudaError as error:
                remarks.append(f"not pinned for GPU {gpu}: {error}")
        elif not self._pin:
            remarks.append("not pinned: `pin` is false")
        self._open.append((memory, fd, pinned))
        share = {"pid": os.getpid(), "fd": fd, "nbytes": nbytes} if self._shared else None
        return Region(address, nbytes, memoryview(memory), share, bool(pinned), "; ".join(remarks), owner=memory)

    def close(self) -> None:
        # The mapping itself goes when the last view does: a copy still running must never lose its memory.
        for _, fd, pinned in self._open:
            if pinned:
                with suppress(_cuda.CudaError):  # a device that failed pins nothing
                    _cuda.unpin(pinned)
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


def _torch_device() -> int | None:
    """The device that torch uses in this process; None while it uses none, because pinning would take memory there."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.current_device())


def _node_of(gpu: int) -> int | None:
    """NUMA node of a device; None where the machine has one node only, or does not say."""
    try:
        node = int((PCI / _cuda.bus_id(gpu) / "numa_node").read_text())
    except (OSError, ValueError, _cuda.CudaError):
        return None
    return node if node >= 0 else None


def _prefer(address: int, nbytes: int, node: int) -> list[str]:
    """Take the pages of this range from a NUMA node, before they are touched; or why that is not done."""
    number = _MBIND.get(platform.machine())
    if number is None:
        return [f"not taken from NUMA node {node}: unknown machine {platform.machine()}"]
    words = _NODES // 64
    mask = (ctypes.c_ulong * words)()
    if node < _NODES:
        mask[node // 64] = 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    where = ctypes.c_void_p(address), ctypes.c_ulong(nbytes)
    if libc.syscall(ctypes.c_long(number), *where, _MPOL_PREFERRED, mask, ctypes.c_ulong(_NODES + 1), 0):
        return [f"not taken from NUMA node {node}: {os.strerror(ctypes.get_errno())}"]
    return []


class CpuConfig(BackendConfig):
    """Host memory, the tier nearest to an engine that has no GPU tier."""

    in_memory: ClassVar[bool] = True

    type: Literal["cpu"] = "cpu"
    pin: bool = True
    """Register the memory with CUDA when there is a GPU tier, or when this process uses a GPU already."""
    numa_node: Annotated[int, Field(ge=0, lt=_NODES)] | None = None
    """NUMA node to take the memory from, while it has some; without one that of the GPU the memory is pinned for."""
    shared: bool = False
    """Allocate memory that other processes of the same user can map, even if the engine does not need it."""

    def build(self, context: BuildContext) -> CpuMemory:
        shared = self.shared or context.shared
        return CpuMemory(pin=self.pin, shared=shared, gpu=context.gpu, node=self.numa_node)


@hookimpl
def lmcache_backends() -> list[type[BackendConfig]]:
    return [CpuConfig]
