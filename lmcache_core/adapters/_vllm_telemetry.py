"""What vLLM's own log, metrics and KV events say of the cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.distributed.kv_events import MEDIUM_CPU, AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from lmcache_core.types import ChunkKey

if TYPE_CHECKING:
    from lmcache_core.pipeline import Pipeline

COUNTERS: dict[str, tuple[str, str, str]] = {
    "loaded_tokens": ("vllm:lmcache_loaded_tokens", "Tokens promised to the engine", ""),
    "saved_chunks": ("vllm:lmcache_saved_chunks", "Chunks copied out of the engine", ""),
    "failed_blocks": ("vllm:lmcache_failed_blocks", "Blocks promised, then computed by the engine", ""),
    "hit": ("vllm:lmcache_hit_chunks", "Chunks found, by tier", "tier"),
    "miss": ("vllm:lmcache_missed_chunks", "Chunks asked for and not served, by reason", "reason"),
    "drop": ("vllm:lmcache_dropped_chunks", "Chunks not stored, by reason", "reason"),
    "bypass": ("vllm:lmcache_bypassed_requests", "Requests that take no part, by reason", "reason"),
}
"""Counter -> its name for Prometheus, what it counts, and its label beyond vLLM's own."""


class Stats(KVConnectorStats):
    """Increments of counters since the last time."""

    @classmethod
    def between(cls, before: Mapping[str, int], now: Mapping[str, int]) -> Stats:
        """The known counters that grew."""
        grown = {name: count - before.get(name, 0) for name, count in now.items() if count != before.get(name, 0)}
        return cls({name: count for name, count in grown.items() if name.partition(".")[0] in COUNTERS})

    def reset(self) -> None:
        """Forget the increments."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> Stats:
        """Add another's increments."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """The sums, for vLLM's log."""
        return dict(sorted(self.data.items()))

    def is_empty(self) -> bool:
        """Whether nothing grew."""
        return not self.data


class Prom(KVConnectorPromMetrics):
    """The same counters for Prometheus, with vLLM's labels."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[Any]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        self._counters = {
            name: make(name=metric, documentation=text, labelnames=labelnames + ([label] if label else []))
            for name, (metric, text, label) in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one interval's increments."""
        for name, count in transfer_stats_data.items():
            counter, _, detail = name.partition(".")
            values = [*self.per_engine_labelvalues[engine_idx], *([detail] if detail else [])]
            self._counters[counter].labels(*values).inc(count)


class Events:
    """KV events of the memory tier, in vLLM's block hashes, so that a router knows where a prefix can be loaded.

    A block counts as stored from when its chunk is in memory until it is evicted from there; what is on storage only
    is not announced. Called by the scheduler's thread only.
    """

    def __init__(self, pipeline: Pipeline, block_tokens: int) -> None:
        self._index = pipeline.slots.index
        self._slots = pipeline.slots
        self._block_tokens = block_tokens
        self._chunk_tokens = pipeline.layout.chunk_tokens
        self._known: dict[ChunkKey, list[Any]] = {}
        self._evicted = self._slots.evicted
        self._queue: list[KVCacheEvent] = []

    def arrived(self, request: Any, keys: Sequence[ChunkKey], positions: Iterable[int]) -> None:
        """Chunks of a request that are in memory now, unless they were dropped meanwhile."""
        blocks = self._chunk_tokens // self._block_tokens
        lora = request.lora_request
        for position in positions:
            key = keys[position]
            if key in self._known or key not in self._index:
                continue
            first = position * blocks
            hashes = [maybe_convert_block_hash(name) for name in request.block_hashes[first : first + blocks]]
            if len(hashes) < blocks:
                continue
            self._known[key] = hashes
            self._queue.append(
                BlockStored(
                    block_hashes=hashes,
                    parent_block_hash=maybe_convert_block_hash(request.block_hashes[first - 1]) if first else None,
                    token_ids=list(
                        request.all_token_ids[position * self._chunk_tokens : (position + 1) * self._chunk_tokens]
                    ),
                    block_size=self._block_tokens,
                    lora_id=lora.lora_int_id if lora else None,
                    medium=MEDIUM_CPU,
                    lora_name=lora.lora_name if lora else None,
                )
            )

    def cleared(self) -> None:
        """Everything was forgotten."""
        self._known.clear()
        self._queue = [AllBlocksCleared()]

    def take(self) -> list[KVCacheEvent]:
        """What happened since the last time."""
        if self._slots.evicted != self._evicted:
            self._evicted = self._slots.evicted
            for key in [key for key in self._known if key not in self._index]:
                self._queue.append(BlockRemoved(block_hashes=self._known.pop(key), medium=MEDIUM_CPU))
        queue, self._queue = self._queue, []
        return queue
