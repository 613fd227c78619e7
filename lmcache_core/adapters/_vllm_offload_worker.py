"""The worker's half of our offloading spec: copies between the engine's pages and slots of the scheduler's arena."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_core.adapters._vllm_offload_compat import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from lmcache_core.copies import SKIP, PagedKV, PageGeometry
from lmcache_core.errors import Unsupported
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
                parts.append((at, _pages(tensors, page, stride, blocks)))
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

    def _copy(self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, *, to_slots: bool) -> bool:
        begun = monotonic()
        addresses = self.addresses(chunks) + self._offset
        copied = 0
        for group, ids, chosen in self._split(blocks, addresses):
            for at, pages in self._groups[group]:
                whole = (ids != SKIP).all(axis=1)
                if not to_slots:
                    pages.scatter(ids, chosen + at)
                elif whole.all():
                    pages.gather(ids, chosen + at)
                else:
                    # Of a chunk whose first or last blocks are not there, the engine never loads these.
                    pages.gather(np.where(ids == SKIP, ids.max(), ids), chosen + at)
                copied += ids.size * pages.geometry.chunk_bytes // self._blocks
        self._done.append(TransferResult(job_id, True, copied, monotonic() - begun))
        return True

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


def _pages(tensors: list[Any], page: int, stride: int, blocks: int) -> PagedKV:
    """Pages of `page` bytes, `stride` apart, of layers that lie in `tensors`: int8 `[blocks, bytes]` each."""
    device = tensors[0].device.type
    if device != "cpu":
        raise Unsupported(
            f"KV in {device} memory: use vLLM's TieringOffloadingSpec with our LMCacheCoreTier as a secondary tier"
        )
    layout = KVLayout(
        order="pages",
        dtype="uint8",
        num_layers=len(tensors),
        planes=1,
        kv_heads=1,
        head_dim=1,
        chunk_tokens=blocks,
        block_tokens=1,
        packing="engine",
        page_bytes=page,
    )
    bases = [int(tensor.data_ptr()) for tensor in tensors]
    return PagedKV(bases, PageGeometry.opaque(layout, block_stride=stride), tensors[0].shape[0], owner=tensors)
