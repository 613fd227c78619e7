"""A worker that lets vLLM's own offloading run on a CPU, for `bench serving`.

vLLM 0.32 refuses to: its copies need CUDA or XPU. What is compared is therefore its connector, manager, policy and
scheduling, with copies as fast as ours. Loaded by vLLM through `spec_module_path`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from lmcache_core import _native


class CopySpec(CPUOffloadingSpec):
    """vLLM's CPU tier; its own worker where that runs."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker of this process."""
        if not self._uses_shared_region():
            return CopyWorker(kv_caches, self.num_chunks, self.blocks_per_chunk)
        return super().get_worker(kv_caches)


class CopyWorker(OffloadingWorker):
    """Copies blocks at once, in one call for all layers. For models with one KV group."""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int, blocks_per_chunk: int) -> None:
        if len(kv_caches.group_data_refs) != 1 or blocks_per_chunk != 1:
            raise NotImplementedError("one KV group and one block per chunk only")
        self._pages = [cache.tensor for cache in kv_caches.tensors]
        self._sizes = [cache.page_size_bytes for cache in kv_caches.tensors]
        self._host = [torch.zeros((chunks, size), dtype=torch.int8) for size in self._sizes]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Engine to host."""
        return self._copy(job_id, self._host, dst_spec.block_ids, self._pages, src_spec.block_ids)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Host to engine."""
        return self._copy(job_id, self._pages, dst_spec.block_ids, self._host, src_spec.block_ids)

    def _copy(self, job: int, to: list[torch.Tensor], to_rows: Any, at: list[torch.Tensor], at_rows: Any) -> bool:
        def addresses(tensors: list[torch.Tensor], rows: Any) -> Any:
            strides = [tensor.stride(0) * tensor.element_size() for tensor in tensors]
            starts = [tensor.data_ptr() + rows.astype(np.int64) * s for tensor, s in zip(tensors, strides, strict=True)]
            return np.concatenate(starts)

        lengths = np.repeat(np.array(self._sizes, dtype=np.int64), len(to_rows))
        _native.copy_batch(addresses(to, to_rows), addresses(at, at_rows), lengths, 1)
        self._done.append(TransferResult(job, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        """Jobs that ended since the last call."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Every job has ended when it is submitted."""
