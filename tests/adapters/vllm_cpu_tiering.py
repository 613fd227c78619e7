"""vLLM's tiered offloading on a CPU, where its own worker refuses to run: rows are copied by ours."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from lmcache_core.adapters._vllm_offload_worker import CopyWorker


class RowWorker(CopyWorker):
    """Copies between the engine's pages and the rows of vLLM's CPU tier."""

    def __init__(self, kv_caches: Any, blocks: int, region: SharedOffloadRegion, row_bytes: int, nbytes: int) -> None:
        super().__init__(kv_caches, blocks, 0, nbytes)
        self._rows = region
        self._row_bytes = row_bytes

    def addresses(self, chunks: Any) -> Any:
        return self._rows.base_tensor.data_ptr() + chunks.chunk_ids.astype(np.int64) * self._row_bytes

    def shutdown(self) -> None:
        super().shutdown()
        self._rows.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    """`TieringOffloadingSpec` for one worker on a CPU."""

    def get_worker(self, kv_caches: Any) -> RowWorker:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return RowWorker(
            kv_caches, self.blocks_per_chunk, region, self.kv_bytes_per_chunk, self.cpu_page_size_per_worker
        )
