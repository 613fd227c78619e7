"""Pages of an engine in a pipeline where the engine names each page itself: a chunk is a page, its key the engine's
hash of it under our identity. Such hashes are chains over the tokens up to the page; they say nothing of the model.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lmcache_core.build import build
from lmcache_core.config import PipelineConfig
from lmcache_core.errors import ConfigError, Problem
from lmcache_core.identity import Identity
from lmcache_core.layout import KVLayout
from lmcache_core.types import CHAIN_BYTES, ChunkKey, MissReason
from lmcache_core.units import format_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")


class Errors:
    """Turns defects of ours into misses: none may fail the engine's requests."""

    def __init__(self, logger: logging.Logger) -> None:
        self.counts: Counter[str] = Counter()
        """By what failed."""
        self._logger = logger

    def safely(self, what: str, call: Callable[[], T], otherwise: T) -> T:
        """`call()`, or `otherwise` for any trouble."""
        try:
            return call()
        except Exception:
            self.counts[what] += 1
            if self.counts[what] == 1:
                self._logger.exception(
                    "lmcache-core: %s failed and was taken for a miss; further ones are counted", what
                )
            return otherwise


class Pages(Protocol):
    """Pages of one pool of the engine."""

    layout: KVLayout
    """Of one page."""
    tokens: int
    """Indices that name one page."""

    def gather(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        """Copy the pages at `indices`, `tokens` for each, into slots."""

    def scatter(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        """Copy slots into the pages at `indices`."""


class Store:
    """A pipeline under the identity of one engine. Thread-safe."""

    def __init__(
        self,
        config: PipelineConfig,
        layout: KVLayout,
        identify: Callable[[], Identity],
        tenant: str | None,
        *,
        shared: bool = False,
    ) -> None:
        """Build the pipeline that `config` describes for pages of `layout`; its `chunk_tokens` is the page's, whatever
        it says. Raise what `build` raises, and `ConfigError` where tenants are told apart and none was named, or
        where there is a GPU tier."""
        if (device := config.device_tier) is not None:
            problem = Problem(
                where="build",
                path=f"tiers.{device.name}",
                what="this engine can have no GPU tier",
                why="its pages come from its own cache on the GPU: copies beside that take room and are never read",
                fix="remove it, and give the memory to the engine",
            )
            raise ConfigError([problem])
        self.pipeline = build(config.model_copy(update={"chunk_tokens": layout.chunk_tokens}), layout, shared=shared)
        self._identify = identify
        self._tenant = tenant
        try:
            self.renew()
        except BaseException:
            self.pipeline.close(0.1)
            raise

    def renew(self, epoch: str = "") -> Identity:
        """Find out anew whose the pages are. Pages of another `epoch` are kept apart."""
        identity = replace(self._identify(), fidelity=self.pipeline.fidelity)
        if epoch:
            identity = replace(identity, revision=f"{identity.revision}#{epoch}")
        admitted = self.pipeline.tenant_identity(identity, self._tenant)
        if admitted is None:
            raise ConfigError(
                [
                    Problem(
                        where="extra config",
                        path="tenant",
                        what="is missing, and the configuration has `tenancy`",
                        why="the engine does not tell us whose a request is",
                        fix="name the tenant that this engine serves, or remove `tenancy`",
                    )
                ]
            )
        self._prefix = admitted.prefix
        return admitted

    def __str__(self) -> str:
        """What is stored, where, and how much fits."""
        pipeline, layout = self.pipeline, self.pipeline.layout
        tiers = [f"{pipeline.memory_name} {pipeline.slots.count} pages"]
        for tier in pipeline.tiers:
            room = "no limit" if tier.capacity is None else format_bytes(tier.capacity)
            tiers.append(f"{tier.name} {room} (write {tier.write_mode})")
        size, what = format_bytes(layout.chunk_bytes), layout.packing or "canonical"
        return f"{what}, pages of {layout.chunk_tokens} tokens, {size} each: {'; '.join(tiers)}"

    def keys(self, hashes: Sequence[str | bytes]) -> list[ChunkKey]:
        """Keys of pages by the engine's hashes."""
        prefix = self._prefix
        raw = (page.encode() if isinstance(page, str) else page for page in hashes)
        return [ChunkKey(prefix + hashlib.sha256(page).digest()[:CHAIN_BYTES]) for page in raw]

    def known(self, page: bytes) -> bool | None:
        """Whether a page is stored, by its hash; None when a medium must be asked."""
        (key,) = self.keys([page])
        if key in self.pipeline.slots.index:
            return True
        present = [tier.present([key]) for tier in self.pipeline.tiers]
        return True if [True] in present else None if None in present else False

    def touch(self, pages: Sequence[bytes]) -> None:
        """Note a use of pages that the engine has nearer, so that they are not the first to go."""
        keys = self.keys(pages)
        for tier in self.pipeline.tiers:
            tier.touch(keys)

    def clear(self, epoch: str) -> None:
        """Forget every page, and keep apart what is stored from now on. Raise `BackendError` when a medium fails."""
        self.renew(epoch)
        self.pipeline.clear()


class PageStore(Store):
    """The pages of one pool, copied by the thread that asks."""

    def __init__(
        self, config: PipelineConfig, pages: Pages, identify: Callable[[], Identity], tenant: str | None
    ) -> None:
        """See `Store`."""
        super().__init__(config, pages.layout, identify, tenant)
        self.pages = pages
        self._patience = max((tier.deadline for tier in self.pipeline.tiers), default=0.0)

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
