"""SGLang's pages in a pipeline: one chunk is one page, and its key is SGLang's own page hash under our identity.

The hash is a chain over the tokens up to the page, seeded with the request's `cache_salt`, its adapter and its extra
key. It says nothing of the model, so that the identity stands in front of it. Nothing here imports SGLang.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache_core.adapters._sglang_pools import HostPages, StridedPages
from lmcache_core.build import build
from lmcache_core.config import PipelineConfig
from lmcache_core.errors import ConfigError, Problem
from lmcache_core.identity import Identity
from lmcache_core.types import CHAIN_BYTES, ChunkKey, MissReason
from lmcache_core.units import format_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger("sglang.srt.lmcache_core")  # below SGLang's own, whose handlers and level apply

T = TypeVar("T")


class Errors:
    """Turns defects of ours into misses: none may fail the engine's requests."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """By what failed."""

    def safely(self, what: str, call: Callable[[], T], otherwise: T) -> T:
        """`call()`, or `otherwise` for any trouble."""
        try:
            return call()
        except Exception:
            self.counts[what] += 1
            if self.counts[what] == 1:
                logger.exception("lmcache-core: %s failed and was taken for a miss; further ones are counted", what)
            return otherwise


class PageStore:
    """The pages of one pool in one pipeline. Thread-safe."""

    def __init__(
        self, config: PipelineConfig, pages: HostPages, identify: Callable[[HostPages], Identity], tenant: str | None
    ) -> None:
        """Build the pipeline that `config` describes for `pages`; its `chunk_tokens` is the engine's page, whatever it
        says. Raise what `build` raises, and `ConfigError` where tenants are told apart and none was named."""
        self.pages = pages
        self.pipeline = build(config.model_copy(update={"chunk_tokens": pages.tokens}), pages.layout)
        self._identify = identify
        self._tenant = tenant
        self._patience = max((tier.deadline for tier in self.pipeline.tiers), default=0.0)
        self._lookup_patience = max((tier.lookup_deadline for tier in self.pipeline.tiers), default=0.0)
        try:
            self.renew()
        except BaseException:
            self.pipeline.close(0.1)
            raise

    def renew(self, epoch: str = "") -> Identity:
        """Find out anew whose the pages are. Pages of another `epoch` are kept apart."""
        identity = replace(self._identify(self.pages), fidelity=self.pipeline.fidelity)
        if epoch:
            identity = replace(identity, revision=f"{identity.revision}#{epoch}")
        admitted = self.pipeline.tenant_identity(identity, self._tenant)
        if admitted is None:
            raise ConfigError(
                [
                    Problem(
                        where="hicache-storage-backend-extra-config",
                        path="tenant",
                        what="is missing, and the configuration has `tenancy`",
                        why="SGLang does not tell a storage backend whose a request is",
                        fix="name the tenant that this engine serves, or remove `tenancy`",
                    )
                ]
            )
        self._prefix = admitted.prefix
        return admitted

    def __str__(self) -> str:
        """What is stored, where, and how much fits."""
        pipeline, layout = self.pipeline, self.pages.layout
        tiers = [f"{pipeline.memory_name} {pipeline.slots.count} pages"]
        for tier in pipeline.tiers:
            room = "no limit" if tier.capacity is None else format_bytes(tier.capacity)
            tiers.append(f"{tier.name} {room} (write {tier.write_mode})")
        size = format_bytes(layout.chunk_bytes)
        return f"{layout.packing or 'canonical'}, pages of {self.pages.tokens} tokens, {size} each: {'; '.join(tiers)}"

    def keys(self, hashes: Sequence[str]) -> list[ChunkKey]:
        """Keys of pages by SGLang's hashes."""
        prefix = self._prefix
        return [ChunkKey(prefix + hashlib.sha256(page.encode()).digest()[:CHAIN_BYTES]) for page in hashes]

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

    # -- pages of the pool -----------------------------------------------------------------------------------
    def load(self, keys: Sequence[ChunkKey], indices: Any) -> list[bool]:
        """Copy stored pages into the pool at `indices`, up to the first that is missing; whether each was."""
        pages = self._by_page(keys, indices)

        def copy(first: int, count: int, addresses: NDArray[np.int64]) -> None:
            self.pages.scatter(pages[first : first + count].reshape(-1), addresses)

        return self._load(keys, copy)

    def save(self, keys: Sequence[ChunkKey], indices: Any) -> list[bool]:
        """Store the pool's pages at `indices`; whether each is stored now."""
        pages = self._by_page(keys, indices)

        def copy(positions: list[int], addresses: NDArray[np.int64]) -> None:
            self.pages.gather(pages[positions].reshape(-1), addresses)

        return self._save(keys, copy)

    def _by_page(self, keys: Sequence[ChunkKey], indices: Any) -> Any:
        if len(indices) != len(keys) * self.pages.tokens:
            raise ValueError(f"{len(indices)} indices for {len(keys)} pages of {self.pages.tokens} tokens")
        return indices.reshape(-1, self.pages.tokens)

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

    # -- the pipeline ----------------------------------------------------------------------------------------
    def _load(self, keys: Sequence[ChunkKey], copy: Callable[[int, int, NDArray[np.int64]], None]) -> list[bool]:
        done = 0
        while done < len(keys):
            with self.pipeline.retrieve(keys[done:]) as lease:
                if len(lease):
                    copy(done, len(lease), lease.addresses)
                done += len(lease)
                # A prefix longer than memory is loaded in parts.
                if lease.reason is not MissReason.NO_ROOM or not len(lease):
                    break
        return [True] * done + [False] * (len(keys) - done)

    def _save(self, keys: Sequence[ChunkKey], copy: Callable[[list[int], NDArray[np.int64]], None]) -> list[bool]:
        slots = self.pipeline.slots
        lanes = [tier.write_lane for tier in self.pipeline.tiers]
        part = max(1, min([slots.count // 2, *(lane.max_bytes // slots.slot_bytes for lane in lanes)]))
        end = monotonic() + self._patience
        stored, stalled = 0, False
        while stored < len(keys):
            # What finds a lane full is not written down. SGLang's writing thread can wait for what it gave before.
            for lane in lanes:
                lane.drain(max(0.0, end - monotonic()))
            now = keys[stored : stored + part]
            with self.pipeline.reserve(now) as room:
                if room.positions:
                    copy([stored + position for position in room.positions], room.addresses)
                    room.commit()
            count = next((i for i, key in enumerate(now) if key not in slots.index), len(now))
            stored += count
            if count < len(now):
                # No room: slots free up while what they hold is written down, once.
                if stalled:
                    break
                stalled = True
        return [True] * stored + [False] * (len(keys) - stored)

    def clear(self, epoch: str) -> None:
        """Forget every page, and keep apart what is stored from now on. Raise `BackendError` when a medium fails."""
        self.renew(epoch)
        self.pipeline.clear()
