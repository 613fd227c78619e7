"""SGLang's pages in a pipeline: one chunk is one page.

SGLang's page hash is a chain over the tokens up to the page, seeded with the request's `cache_salt`, its adapter and
its extra key. Nothing here imports SGLang.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lmcache_core.adapters import _page_store
from lmcache_core.adapters._page_store import Pages
from lmcache_core.adapters._sglang_pools import StridedPages
from lmcache_core.config import PipelineConfig
from lmcache_core.identity import Identity
from lmcache_core.types import ChunkKey

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger("sglang.srt.lmcache_core")  # below SGLang's own, whose handlers and level apply


class PageStore(_page_store.PageStore):
    """The pages of one pool in one pipeline. Thread-safe."""

    def __init__(
        self, config: PipelineConfig, pages: Pages, identify: Callable[[Pages], Identity], tenant: str | None
    ) -> None:
        super().__init__(config, pages, partial(identify, pages), tenant)
        self._lookup_patience = max((tier.lookup_deadline for tier in self.pipeline.tiers), default=0.0)

    # -- presence --------------------------------------------------------------------------------------------
    def leading(self, keys: Sequence[ChunkKey]) -> int:
        """How many pages from the first on are stored. Waits for the tiers' lookup deadlines at most."""
        hit = self.pipeline.lookup(keys)
        hit.wait(self._lookup_patience)
        return hit.count

    def present(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which pages are stored, each by itself."""
        hits = [self.pipeline.lookup([key]) for key in keys]
        for hit in hits:
            hit.wait(self._lookup_patience)
        return [hit.count == 1 for hit in hits]

    # -- flat pages, as tensors of their own -----------------------------------------------------------------
    def load_flat(self, keys: Sequence[ChunkKey], targets: Sequence[Any]) -> list[bool]:
        """Copy stored pages into flat tensors; whether each was."""
        strided = self._strided()
        slots = self.pipeline.slots

        def copy(first: int, count: int, addresses: NDArray[np.int64]) -> None:
            offsets = addresses - slots.region.address
            for target, offset in zip(targets[first : first + count], offsets.tolist(), strict=True):
                strided.to_flat(slots.region.view[offset : offset + slots.chunk_bytes], target)

        return self._load(keys, copy)

    def save_flat(self, keys: Sequence[ChunkKey], values: Sequence[Any]) -> list[bool]:
        """Store flat tensors; whether each is stored now."""
        strided = self._strided()
        slots = self.pipeline.slots

        def copy(positions: list[int], addresses: NDArray[np.int64]) -> None:
            for position, offset in zip(positions, (addresses - slots.region.address).tolist(), strict=True):
                strided.from_flat(values[position], slots.region.view[offset : offset + slots.chunk_bytes])

        return self._save(keys, copy)

    def _strided(self) -> StridedPages:
        if not isinstance(self.pages, StridedPages):
            raise TypeError(f"pages of {self.pages.layout.packing} have no flat form")
        return self.pages
