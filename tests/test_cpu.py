"""The `cpu` backend: page-aligned, faulted in, shareable, pinned when CUDA is there, and gone after use."""

from __future__ import annotations

import gc
import mmap
import os
import re
import sys
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cuda import NO_MEMORY, installed

from lmcache_backends import cpu as cpu_module
from lmcache_backends.cpu import CpuConfig, CpuMemory
from lmcache_core.errors import BackendUnavailable
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import BuildContext
from lmcache_core.slots import map_shared, prefer_huge_pages
from lmcache_core.types import PAGE

MIB = 1 << 20


def memory(*, pin: bool = False, shared: bool = False) -> CpuMemory:
    return CpuMemory(pin=pin, shared=shared)


def told(address: int, field: str) -> list[str]:
    """What the kernel says of the mapping that holds an address."""
    current = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            current = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif current and line.startswith(field):
            return line.split()[1:]
    return []


def resident(address: int) -> int:
    """Resident bytes of the mapping that holds an address."""
    return int((told(address, "Rss:") or ["0"])[0]) * 1024


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_is_the_plugin_named_cpu() -> None:
    assert Plugins().backend("cpu") is CpuConfig
    assert CpuConfig.in_memory
    backend = CpuConfig(pin=False).build(BuildContext("dram", 1, MIB, 1, shared=True))
    region = backend.allocate(PAGE)
    assert region.share is not None
    backend.close()


@pytest.mark.parametrize("shared", [False, True])
def test_an_arena_is_aligned_writable_and_faulted_in(shared: bool) -> None:
    backend = memory(shared=shared)
    region = backend.allocate(8 * MIB)
    assert region.address % PAGE == 0 and region.nbytes == len(region.view) == 8 * MIB
    assert resident(region.address) >= 8 * MIB
    region.view[-1] = 5
    assert region.view[-1] == 5 and not region.pinned
    assert (region.share is None) is not shared
    backend.close()


def test_old_kernels_fault_in_by_touching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_module, "_MADV_POPULATE_WRITE", 9999)  # an advice that no kernel knows
    backend = memory()
    region = backend.allocate(4 * MIB)
    assert resident(region.address) >= 4 * MIB
    backend.close()


def test_what_is_shared_is_mapped_by_its_share() -> None:
    backend = memory(shared=True)
    region = backend.allocate(MIB)
    assert region.share is not None
    other = map_shared(region.share)
    region.view[100:105] = b"bytes"
    assert bytes(other.view[100:105]) == b"bytes" and other.address != region.address
    end = monotonic() + 20
    while resident(other.address) < MIB:  # so that no copy has to fault them in
        assert monotonic() < end
    before = open_fds()
    backend.close()
    assert open_fds() == before - 1
    with pytest.raises(BackendUnavailable):
        map_shared(region.share)
    # A copy that still runs must never lose its memory: views stay valid after close.
    assert bytes(region.view[100:105]) == b"bytes"


def test_huge_pages_are_asked_for_in_memory_that_is_not_ours() -> None:
    memory = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = int(np.frombuffer(memory, np.uint8).ctypes.data)
    assert prefer_huge_pages(address + 100, 8 * MIB - 100)
    assert "hg" in told(address + 4 * MIB, "VmFlags:")
    assert not prefer_huge_pages(address, 0)


def test_close_gives_everything_back() -> None:
    gc.collect()  # what other tests left may go now, not while we count
    backend = memory(shared=True)
    before = open_fds()
    regions = [backend.allocate(MIB) for _ in range(3)]
    address = regions[0].address
    assert open_fds() == before + 6  # ours, and the one that Python's mmap duplicates
    backend.close()
    backend.close()
    assert open_fds() == before + 3
    assert resident(address) >= MIB
    del regions
    gc.collect()
    assert open_fds() == before
    assert resident(address) == 0


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("nbytes", [1 << 62, 1 << 80, 0], ids=["too large", "absurd", "nothing"])
def test_what_cannot_be_allocated_is_said_and_leaves_nothing(shared: bool, nbytes: int) -> None:
    before = open_fds()
    with pytest.raises(BackendUnavailable, match=f"cannot allocate {nbytes} bytes"):
        memory(shared=shared).allocate(nbytes)
    assert open_fds() == before


@pytest.mark.parametrize("shared", [False, True])
def test_memory_that_cannot_be_faulted_in_is_refused(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Touching the pages instead would end the process: by the OOM killer, or SIGBUS for shared memory."""

    def refuse(memory: object, option: int) -> bool:
        if option == cpu_module._MADV_POPULATE_WRITE:
            raise OSError(12, "Cannot allocate memory")
        return True

    monkeypatch.setattr(cpu_module, "_advise", refuse)
    before = open_fds()
    with pytest.raises(BackendUnavailable, match=r"Cannot allocate memory.*lower the tier's capacity"):
        memory(shared=shared).allocate(MIB)
    assert open_fds() == before


def fake_torch(monkeypatch: pytest.MonkeyPatch, *, available: bool = True, started: bool = True) -> None:
    state = {"is_available": available, "is_initialized": started, "current_device": 1}
    cuda = SimpleNamespace(**{name: lambda value=value: value for name, value in state.items()})
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_an_arena_is_pinned_for_a_cuda_device_and_unpinned_at_close(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch)
    with installed() as cuda:
        backend = memory(pin=True)
        region = backend.allocate(MIB)
        assert region.pinned and cuda.pinned == {region.address: MIB} and region.remark == ""
        backend.close()


@pytest.mark.parametrize("pin, state", [(False, {}), (True, {"available": False}), (True, {"started": False})])
def test_nothing_is_pinned_where_that_is_not_wanted(
    pin: bool, state: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinning starts CUDA in this process, which takes memory of the GPU."""
    fake_torch(monkeypatch, **state)
    with installed() as cuda:
        backend = memory(pin=pin)
        assert not backend.allocate(MIB).pinned and not cuda.calls
        backend.close()


def test_an_arena_that_cannot_be_pinned_works_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch)
    with installed() as cuda:
        cuda.fail["pin"] = NO_MEMORY
        backend = memory(pin=True)
        region = backend.allocate(MIB)
        assert not region.pinned and region.remark == "not pinned for GPU 1: pin: out of memory (CUDA error 2)"
        backend.close()


def test_without_torch_nothing_is_pinned_and_torch_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    backend = memory(pin=True)
    assert not backend.allocate(MIB).pinned
    backend.close()
    assert "torch" not in sys.modules
