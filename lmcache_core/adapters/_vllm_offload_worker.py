"""The worker's half of our offloading spec: copies between the engine's pages and slots of the scheduler's arena.

vLLM takes for granted that none fails: an error here ends the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_core._cuda import available, pin, unpin, why_not
from lmcache_core.adapters._vllm_compat import compute_stream
from lmcache_core.adapters._vllm_gpu import CTAS
from lmcache_core.adapters._vllm_offload_compat import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from lmcache_core.copies import SKIP, PagedKV, PageGeometry
from lmcache_core.errors import Unsupported
from lmcache_core.gpu import Event, GpuPagedKV, How, Stream
from lmcache_core.layout import KVLayout
from lmcache_core.slots import map_shared

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmcache_core.protocols import Region


@dataclass
class ArenaSpec(LoadStoreSpec):
    """Where the chunks of a job are, in the order of its keys."""

    share: dict[str, int]
    """How to map the scheduler's arena (`Region.share`)."""
    offsets: NDArray[np.int64]
    """Of each chunk's bytes in the arena, `[chunks]`."""


class CopyWorker(OffloadingWorker):
    """Copies at once, in one call without the interpreter lock for each KV group; a job has ended when it returns."""

    def __init__(self, kv_caches: CanonicalKVCaches, blocks: int, offset: int, nbytes: int) -> None:
        """`blocks`: of a chunk. `offset`, `nbytes`: this worker's part of each chunk. Raise `Unsupported` for pages
        that cannot be copied."""
        self._blocks = blocks
        self._offset = offset
        self._region: Region | None = None
        self._done: list[TransferResult] = []
        self._groups: list[list[tuple[int, PagedKV]]] = []
        for refs in kv_caches.group_data_refs:
            parts, at = [], 0
            pages = [(kv_caches.tensors[ref.tensor_idx].tensor, int(ref.page_size_bytes)) for ref in refs]
            for (page, stride), some in groupby(pages, lambda one: (one[1], int(one[0].stride(0)))):
                tensors = [tensor for tensor, _ in some]
                parts.append((at, self._bind(tensors, _geometry(len(tensors), page, stride, blocks))))
                at += len(tensors) * page * blocks
            if at > nbytes:
                raise Unsupported(f"a chunk of {blocks} blocks has {at} bytes, vLLM says {nbytes}")
            self._groups.append(parts)

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Copy blocks into chunks."""
        return self._copy(job_id, src_spec, dst_spec, to_slots=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Copy chunks, or parts of the first and last ones, into blocks."""
        return self._copy(job_id, dst_spec, src_spec, to_slots=False)

    def _bind(self, tensors: list[Any], geometry: PageGeometry) -> PagedKV:
        """The copier of pages that lie in `tensors`: int8 `[blocks, bytes]` of one layer each."""
        bases = [int(tensor.data_ptr()) for tensor in tensors]
        return PagedKV(bases, geometry, tensors[0].shape[0], owner=tensors)

    def _copy(self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, *, to_slots: bool) -> bool:
        begun = monotonic()
        nbytes = self._run(blocks, self.addresses(chunks) + self._offset, to_slots=to_slots)
        self._done.append(TransferResult(job_id, True, nbytes, monotonic() - begun))
        return True

    def _run(self, blocks: GPULoadStoreSpec, addresses: NDArray[np.int64], *, to_slots: bool, **options: Any) -> int:
        """Copy, or queue the copies; the number of bytes."""
        copied = 0
        for group, ids, chosen in self._split(blocks, addresses):
            if to_slots:
                # Of a chunk whose first or last blocks are not there, the engine never loads these.
                ids = np.where(ids == SKIP, ids.max(), ids)
            for at, pages in self._groups[group]:
                (pages.gather if to_slots else pages.scatter)(ids, chosen + at, **options)
                copied += ids.size * pages.geometry.chunk_bytes // self._blocks
        return copied

    def addresses(self, chunks: LoadStoreSpec) -> NDArray[np.int64]:
        """Of the chunks of a job, in this process, `[chunks]`. Raise `BackendUnavailable` where the scheduler's memory
        cannot be mapped."""
        if not isinstance(chunks, ArenaSpec):
            raise TypeError(f"expected ArenaSpec, got {type(chunks).__name__}")
        if self._region is None:
            self._region = map_shared(chunks.share)
        return chunks.offsets + self._region.address

    def _split(
        self, blocks: GPULoadStoreSpec, addresses: NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """For each KV group its block ids `[chunks, blocks]`, with `SKIP` for those that are not part of the job, and
        its chunks' addresses. Blocks of a group follow each other in its chunks from `block_indices` on."""
        first_block = first_chunk = 0
        for group, (count, index) in enumerate(zip(blocks.group_sizes, blocks.block_indices, strict=True)):
            if not count:
                continue
            lead = index % self._blocks
            chunks = -(-(lead + count) // self._blocks)
            ids = np.full(chunks * self._blocks, SKIP, np.int64)
            ids[lead : lead + count] = blocks.block_ids[first_block : first_block + count]
            yield group, ids.reshape(chunks, self._blocks), addresses[first_chunk : first_chunk + chunks]
            first_block += count
            first_chunk += chunks
        if first_chunk != len(addresses):
            raise ValueError(f"a job of {first_chunk} chunks names {len(addresses)}")

    def get_finished(self) -> list[TransferResult]:
        """The jobs since the last time."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        """Let go of the arena and of the engine's pages."""
        self._groups = []
        self._region = None


class GpuCopyWorker(CopyWorker):
    """The same with pages on a GPU: copies are queued, each direction on a stream of its own, and none is awaited."""

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        blocks: int,
        offset: int,
        nbytes: int,
        *,
        device: int,
        compute: Callable[[], int],
    ) -> None:
        """`compute()` is the stream the engine computes on now. Raise `CudaError`."""
        self._device = device
        self._compute = compute
        self._loads, self._stores = Stream(device), Stream(device)
        self._how = How(self._loads.handle, device, ctas=CTAS)
        self._flying: deque[tuple[TransferResult, Event]] = deque()
        super().__init__(kv_caches, blocks, offset, nbytes)

    def _bind(self, tensors: list[Any], geometry: PageGeometry) -> PagedKV:
        bases = [int(tensor.data_ptr()) for tensor in tensors]
        return GpuPagedKV(bases, geometry, tensors[0].shape[0], how=self._how, owner=tensors)

    def _copy(self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, *, to_slots: bool) -> bool:
        addresses = self.addresses(chunks) + self._offset
        stream = (self._stores if to_slots else self._loads).handle
        # What was computed is saved, and what still reads the blocks is done, before the copies begin.
        event = Event(self._device)
        event.record(self._compute())
        event.hold(stream)
        nbytes = self._run(blocks, addresses, to_slots=to_slots, how=replace(self._how, stream=stream))
        event.record(stream)
        self._flying.append((TransferResult(job_id, True, nbytes), event))
        return True

    def addresses(self, chunks: LoadStoreSpec) -> NDArray[np.int64]:
        first = self._region is None
        found = super().addresses(chunks)
        if first and self._region is not None:
            pin(self._region.address, self._region.nbytes)
        return found

    def get_finished(self) -> list[TransferResult]:
        self._end([fly for fly in self._flying if fly[1].fired()])
        return super().get_finished()

    def wait(self, job_ids: set[int]) -> None:
        """Wait for these jobs: vLLM is about to give their blocks to others."""
        waited = [fly for fly in self._flying if fly[0].job_id in job_ids]
        for _, event in waited:
            event.synchronize()
        self._end(waited)

    def _end(self, ended: list[tuple[TransferResult, Event]]) -> None:
        for fly in ended:
            self._flying.remove(fly)
            fly[1].close()
            self._done.append(fly[0])

    def shutdown(self) -> None:
        self.wait({result.job_id for result, _ in self._flying})
        self._loads.close()
        self._stores.close()
        if self._region is not None:
            unpin(self._region.address)
        super().shutdown()


def copy_worker(kv_caches: CanonicalKVCaches, blocks: int, offset: int, nbytes: int) -> CopyWorker:
    """The worker for where the engine's pages are. Raise `Unsupported` for memory that we cannot copy."""
    device = kv_caches.tensors[0].tensor.device
    if device.type == "cpu":
        return CopyWorker(kv_caches, blocks, offset, nbytes)
    if device.type != "cuda" or not available():
        raise Unsupported(
            f"KV in {device.type} memory{f' ({why_not()})' if device.type == 'cuda' else ''}: use vLLM's "
            "TieringOffloadingSpec with our LMCacheCoreTier as a secondary tier"
        )
    compute = partial(compute_stream, device.index)
    return GpuCopyWorker(kv_caches, blocks, offset, nbytes, device=device.index, compute=compute)


def _geometry(layers: int, page: int, stride: int, blocks: int) -> PageGeometry:
    """Pages of `page` bytes, `stride` apart."""
    layout = KVLayout(
        order="pages",
        dtype="uint8",
        num_layers=layers,
        planes=1,
        kv_heads=1,
        head_dim=1,
        chunk_tokens=blocks,
        block_tokens=1,
        packing="engine",
        page_bytes=page,
    )
    return PageGeometry.opaque(layout, block_stride=stride)
