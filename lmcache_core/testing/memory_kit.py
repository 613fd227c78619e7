"""The contract of `MemoryBackend` as tests. A plugin's author subclasses it and gives it one fixture:

class TestMyMemory(MemoryBackendTests):
    @pytest.fixture
    def open_memory(self):
        return MyConfig().build
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np

from lmcache_core.errors import BackendUnavailable
from lmcache_core.gpu import Event, Stream, copy_batch
from lmcache_core.protocols import BuildContext, MemoryBackend, Region
from lmcache_core.slots import map_shared
from lmcache_core.testing.contracts import ContractBroken, demand
from lmcache_core.types import PAGE

OpenMemory = Callable[[BuildContext], MemoryBackend]


class MemoryBackendTests:
    """Run by pytest in subclasses that give `open_memory`. Attributes are limits that a subclass may change."""

    region_bytes = 4 << 20
    """Bytes of a region of the tests, a multiple of the page size."""
    too_much = 1 << 60
    """Bytes that nothing can allocate."""

    @contextmanager
    def memory(self, open_memory: OpenMemory, *, shared: bool = False) -> Iterator[MemoryBackend]:
        """An open backend, closed in the end."""
        memory = open_memory(BuildContext("conformance", 1 << 20, 64 << 20, 1, shared=shared))
        try:
            yield memory
        finally:
            _close(memory)

    def region(self, memory: MemoryBackend, nbytes: int) -> Region:
        """A region of `nbytes`, plain and writable."""
        region = memory.allocate(nbytes)
        if memory.device is not None:
            sizes = (region.nbytes, region.view.nbytes)
            demand(sizes == (nbytes, 0), "region size", f"nbytes and view have {sizes} bytes, not {nbytes} and none")
            return region
        sizes = (region.nbytes, region.view.nbytes)
        demand(sizes == (nbytes, nbytes), "region size", f"nbytes and view have {sizes} bytes, not {nbytes}")
        plain = region.view.format == "B" and region.view.contiguous and region.view.ndim == 1
        demand(plain, "region size", "`view` is not plain bytes, one after the other")
        demand(not region.view.readonly, "writable region", "`view` is read-only")
        return region

    def write(self, memory: MemoryBackend, region: Region, pattern: bytes) -> None:
        """Fill a region; that of a GPU by a copy."""
        if memory.device is None:
            region.view[:] = pattern
        else:
            self._copy(memory, region, bytearray(pattern), back=False)

    def read(self, memory: MemoryBackend, region: Region) -> bytes:
        """What is in a region."""
        if memory.device is None:
            return bytes(region.view)
        out = bytearray(region.nbytes)
        self._copy(memory, region, out, back=True)
        return bytes(out)

    @staticmethod
    def _copy(memory: MemoryBackend, region: Region, host: bytearray, *, back: bool) -> None:
        assert memory.device is not None
        stream, done = Stream(memory.device), Event(memory.device)
        ends = [np.array([region.address]), np.array([np.frombuffer(host, np.uint8).ctypes.data])]
        to, source = reversed(ends) if back else ends
        copy_batch(to, source, np.array([region.nbytes]), stream.handle, memory.device)
        done.record(stream.handle)
        done.synchronize()
        done.close()
        stream.close()

    def test_regions_are_as_large_as_asked_for(self, open_memory: OpenMemory) -> None:
        with self.memory(open_memory) as memory:
            for nbytes in (PAGE, 3 * PAGE, self.region_bytes):
                self.region(memory, nbytes)

    def test_regions_begin_where_they_say_on_a_page(self, open_memory: OpenMemory) -> None:
        with self.memory(open_memory) as memory:
            for nbytes in (PAGE, self.region_bytes, 5 * PAGE):
                region = self.region(memory, nbytes)
                demand(region.address % PAGE == 0, "region address", f"{region.address:#x} is not page-aligned")
                if memory.device is not None:
                    continue
                begins = int(np.frombuffer(region.view, np.uint8).ctypes.data)
                demand(begins == region.address, "region address", "`view` begins elsewhere than `address` says")

    def test_every_byte_can_be_written(self, open_memory: OpenMemory) -> None:
        with self.memory(open_memory) as memory:
            region = self.region(memory, self.region_bytes)
            pattern = Random(5).randbytes(self.region_bytes)
            self.write(memory, region, pattern)
            same = self.read(memory, region) == pattern
            demand(same, "writable region", "it does not hold the bytes that were written")

    def test_no_page_is_left_to_fault_in(self, open_memory: OpenMemory) -> None:
        with self.memory(open_memory) as memory:
            region = self.region(memory, self.region_bytes)
            if memory.device is not None:
                return
            resident = _resident(region.address, region.nbytes)
            demand(
                resident >= region.nbytes,
                "faulted in",
                f"{resident} of {region.nbytes} bytes are resident after allocate",
            )

    def test_regions_are_apart(self, open_memory: OpenMemory) -> None:
        with self.memory(open_memory) as memory:
            regions = [self.region(memory, self.region_bytes // 4) for _ in range(3)]
            for number, region in enumerate(regions):
                self.write(memory, region, bytes([number]) * region.nbytes)
            for number, region in enumerate(regions):
                own = self.read(memory, region) == bytes([number]) * region.nbytes
                demand(own, "own region", "writing one region changed another")

    def test_shared_regions_are_the_same_memory(self, open_memory: OpenMemory) -> None:
        """Memory that is never shared need not be shareable; where `share` is given it must lead to the region. A GPU's
        cannot be shared, and is refused."""
        try:
            with self.memory(open_memory, shared=True) as memory:
                device = memory.device
        except BackendUnavailable:
            return
        demand(device is None, "shared region", "memory of a GPU was handed out as if others could map it")
        with self.memory(open_memory, shared=True) as memory:
            region = self.region(memory, self.region_bytes)
            if region.share is None:
                raise ContractBroken("shared region", "`share` is None though the context asks for shared memory")
            try:
                other = map_shared(region.share)
            except (BackendUnavailable, KeyError, OSError, ValueError) as error:
                raise ContractBroken("shared region", f"another process cannot map it: {error}") from error
            region.view[-5:] = b"there"
            seen = other.nbytes == region.nbytes and bytes(other.view[-5:]) == b"there"
            demand(seen, "shared region", "what is written into the region does not appear in its mapping")
            other.view[:4] = b"back"
            demand(bytes(region.view[:4]) == b"back", "shared region", "what a mapping writes does not come back")

    def test_what_cannot_be_allocated_is_refused(self, open_memory: OpenMemory) -> None:
        with self.memory(open_memory) as memory:
            try:
                memory.allocate(self.too_much)
            except BackendUnavailable:
                pass
            except Exception as error:
                raise ContractBroken("refusal", f"allocate raised {error!r}, not BackendUnavailable") from error
            else:
                raise ContractBroken("refusal", f"allocate({self.too_much}) returned a region")
            demand(memory.allocate(PAGE).nbytes == PAGE, "refusal", "after a refusal nothing can be allocated")

    def test_close_is_idempotent(self, open_memory: OpenMemory) -> None:
        with self.memory(open_memory) as memory:
            memory.allocate(PAGE)
            _close(memory)


def _close(memory: MemoryBackend) -> None:
    try:
        memory.close()
    except Exception as error:
        raise ContractBroken("close", f"close raised {error!r}") from error


def _resident(address: int, nbytes: int) -> int:
    """Resident bytes of the range, by the kernel's own account."""
    pages = -(-nbytes // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags) != 0:
        return 0  # not memory of this process at all
    # For private memory mincore looks at page tables, for shared memory at the page cache: there smaps decides.
    if sum(flag & 1 for flag in flags) < pages:
        return sum(flag & 1 for flag in flags) * mmap.PAGESIZE
    return nbytes if _rss_of(address) >= nbytes else 0


def _rss_of(address: int) -> int:
    """Resident bytes of the mappings from the one that holds `address` on, which may be split."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[2], 16) > address
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
