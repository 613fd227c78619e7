"""Chunks whose bytes follow from their key, so that any wrong byte shows; and pipelines over dicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmcache_core.config import TierConfig
from lmcache_core.pipeline import Lease, Pipeline, Reservation
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import ChunkKey

OBJECT = 4096 + 1024
"""Bytes of one sealed raw object of the `layout` fixture."""


def keys(count: int, start: int = 0) -> list[ChunkKey]:
    """A prefix of `count` keys; another `start` is another prefix."""
    return [ChunkKey(b"identity--------" + i.to_bytes(16, "big")) for i in range(start, start + count)]


def chunk(key: ChunkKey, nbytes: int) -> bytes:
    return (key * (nbytes // len(key) + 1))[:nbytes]


def fill(names: Sequence[ChunkKey]) -> Callable[[Reservation], None]:
    def write(reservation: Reservation) -> None:
        for i, position in enumerate(reservation.positions):
            view = reservation.view(i)
            view[:] = chunk(names[position], len(view))

    return write


def store(pipeline: Pipeline, names: Sequence[ChunkKey]) -> int:
    return pipeline.store(names, fill(names))


def verify(pipeline: Pipeline, lease: Lease) -> int:
    """Check every byte; the number of chunks."""
    for i, key in enumerate(lease.keys):
        assert bytes(lease.view(i)) == chunk(key, pipeline.layout.chunk_bytes)
    return len(lease)


def serve(pipeline: Pipeline, names: Sequence[ChunkKey], timeout: float | None = None) -> list[str]:
    """Retrieve and check every byte; the tiers the chunks came from."""
    with pipeline.retrieve(names, timeout) as lease:
        assert lease.keys == list(names[: len(lease)])
        assert (lease.reason is None) == (len(lease) == len(names))
        verify(pipeline, lease)
        return lease.sources


def tier(name: str = "store", **options: Any) -> TierConfig:
    """A storage tier, over a dict unless `backend` says otherwise."""
    options.setdefault("backend", DictConfig())
    return TierConfig(name=name, **options)
