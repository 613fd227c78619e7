"""Paged KV in the memory of an NVIDIA GPU: the copies of `lmcache_core.copies`, queued on a stream."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from lmcache_core import _cuda
from lmcache_core._cuda import CudaError, Event, How, Ring, Rope, Stream, copy_batch
from lmcache_core.copies import PagedKV, PageGeometry

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["CudaError", "Event", "GpuPagedKV", "How", "Ring", "Rope", "Stream", "copy_batch"]


class GpuPagedKV(PagedKV):
    """`PagedKV` of pages on a GPU. Copies are queued on the stream of `how`; an event recorded there tells their end.

    Slots are addresses of device memory or of pinned host memory (any host memory for the path `engine`). Raise
    `ValueError` where a base or a slot is memory that the device cannot reach, `CudaError` where CUDA fails.
    """

    def __init__(
        self, bases: ArrayLike, geometry: PageGeometry, num_blocks: int, *, how: How, owner: Any = None
    ) -> None:
        super().__init__(bases, geometry, num_blocks, owner=owner)
        self.how = how
        if (bad := _cuda.unreachable(self._bases.reshape(-1), how.device)) is not None:
            plane, layer = divmod(bad, geometry.num_layers)
            raise ValueError(f"the base of layer {layer}, plane {plane} is not memory of GPU {how.device}, nor pinned")

    def gather(self, block_ids: ArrayLike, slot_addresses: ArrayLike, how: How | None = None) -> None:
        """Queue the copy of chunks from the engine's pages into slots; `how` instead of this object's own."""
        self._queue(block_ids, slot_addresses, how, to_slots=True)

    def scatter(self, block_ids: ArrayLike, slot_addresses: ArrayLike, how: How | None = None) -> None:
        """Queue the copy of chunks from slots into the engine's pages; blocks with id `SKIP` are left alone."""
        self._queue(block_ids, slot_addresses, how, to_slots=False)

    def choose(self, block_ids: ArrayLike, slot_addresses: ArrayLike, ways: Sequence[How], repeat: int = 5) -> How:
        """The way that gathers and scatters this batch in the least time; this object's own from now on.

        Measured here, so that whoever knows the pages need not know the machine. The slots are overwritten; the pages
        hold the same bytes afterwards, and nobody may write to them meanwhile. Ways that refuse these pages are passed
        over; raise `ValueError` when all do.
        """
        best: tuple[float, How] | None = None
        for how in ways:
            event, times = Event(how.device), []
            try:
                for _ in range(repeat + 1):  # the first warms up
                    begun = perf_counter()
                    self.gather(block_ids, slot_addresses, how)
                    self.scatter(block_ids, slot_addresses, how)
                    event.record(how.stream)
                    event.synchronize()
                    times.append(perf_counter() - begun)
            except ValueError:
                continue
            finally:
                event.close()
            taken = min(times[1:])
            if best is None or taken < best[0]:
                best = taken, how
        if best is None:
            raise ValueError(f"none of {len(ways)} ways can copy these pages")
        self.how = best[1]
        return self.how

    def _queue(self, block_ids: ArrayLike, slot_addresses: ArrayLike, how: How | None, *, to_slots: bool) -> None:
        ids, slots = self._batch(block_ids, slot_addresses)
        try:
            result = _cuda.copy_pages(
                self._parts,
                self.geometry.num_layers,
                self.num_blocks,
                ids,
                slots,
                how or self.how,
                slot_bytes=self.geometry.chunk_bytes,
                to_slots=to_slots,
                skip_negative=not to_slots,
            )
        except CudaError as error:
            if error.code == _cuda.UNREACHABLE:
                raise ValueError("a slot is neither memory of this GPU nor pinned host memory") from error
            if error.code == _cuda.MALFORMED:
                raise ValueError(
                    f"the GPU's copies refuse {how or self.how} of this geometry: {self.geometry}"
                ) from error
            raise
        self._refuse(result - 1, ids)
