"""Configuration -> pipeline, once, at start-up. Raises with every problem at once; nothing grows afterwards."""

from __future__ import annotations

from lmcache_core.config import PipelineConfig, TierConfig
from lmcache_core.errors import ConfigError, LMCacheError, Problem
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.plugins import PLUGINS, Plugins
from lmcache_core.protocols import BuildContext, MemoryBackend, Serde, SerdeContext, StorageBackend
from lmcache_core.seal import RAW_CODEC
from lmcache_core.slots import Slots
from lmcache_core.tier import Staging, StorageTier, staging_buffer_bytes
from lmcache_core.types import object_bytes, round_up

MIN_SLOTS = 2
"""Fewer slots cannot load one chunk while another is in use."""

STAGING_PER_THREAD = 2
"""Staging buffers per lane thread of an encoded tier."""


def build(
    config: PipelineConfig,
    layout: KVLayout,
    *,
    shared: bool = False,
    poison: bool = False,
    plugins: Plugins | None = None,
) -> Pipeline:
    """Build the pipeline `config` describes for chunks of `layout`.

    `shared` asks for an arena that another process of the same user can map. `poison` fills released slots with
    0xDB, for tests. `plugins` is a manager with plugin objects of the caller's, if there are any. Raise `ConfigError`
    (sizes), `PluginError` or `BackendUnavailable`; then nothing is left open.
    """
    if layout.chunk_tokens != config.chunk_tokens:
        raise ConfigError(
            f"chunk_tokens is {config.chunk_tokens} in the configuration and {layout.chunk_tokens} in the layout"
        )
    plugins = plugins or Plugins()
    for name in config.plugins:
        plugins.load(PLUGINS, name)
    memory_tier, storage = config.tiers[0], config.tiers[1:]
    opened: list[MemoryBackend | StorageBackend | StorageTier] = []
    try:
        slots, memory = _memory(plugins, memory_tier, storage, layout, shared=shared, poison=poison)
        opened.append(memory)
        tiers: list[StorageTier] = []
        for tier in storage:
            tiers.append(_storage(plugins, tier, layout, slots, memory, opened))
            opened[-1] = tiers[-1]
        return Pipeline(layout, memory_tier.name, memory, slots, tiers, verify=config.verify)
    except BaseException:
        for thing in reversed(opened):
            if isinstance(thing, StorageTier):
                thing.close(1.0)
            else:
                thing.close()
        raise


def _memory(
    plugins: Plugins,
    tier: TierConfig,
    storage: tuple[TierConfig, ...],
    layout: KVLayout,
    *,
    shared: bool,
    poison: bool,
) -> tuple[Slots, MemoryBackend]:
    slot_bytes = round_up(object_bytes(layout.chunk_bytes))
    staging = sum(_staging_bytes(serde, t) for t in storage if (serde := _serde(t, layout)) is not None)
    budget = _capacity(tier)
    count = (budget - staging) // slot_bytes
    if count < MIN_SLOTS:
        need = MIN_SLOTS * slot_bytes + staging
        raise ConfigError(
            [
                Problem(
                    where="build",
                    path=f"tiers.{tier.name}.capacity",
                    what=f"{budget} bytes hold {max(0, count)} chunks of {slot_bytes} bytes"
                    + (f" beside {staging} bytes of staging for encoded tiers" if staging else ""),
                    why=f"a pipeline needs room for at least {MIN_SLOTS} chunks",
                    fix=f"set capacity to at least {need} bytes, or lower chunk_tokens from {layout.chunk_tokens}",
                )
            ]
        )
    context = BuildContext(
        tier=tier.name, object_bytes=object_bytes(layout.chunk_bytes), capacity=budget, threads=1, shared=shared
    )
    memory = plugins.build_backend(tier.backend, context)
    if not isinstance(memory, MemoryBackend):
        memory.close()
        raise ConfigError(f"tiers[0] ({tier.name}) must be a memory backend such as cpu, not {tier.backend.type!r}")
    region = memory.allocate(count * slot_bytes)
    return Slots(region, layout.chunk_bytes, tier.eviction.build(), poison=poison), memory


def _storage(
    plugins: Plugins,
    tier: TierConfig,
    layout: KVLayout,
    slots: Slots,
    memory: MemoryBackend,
    opened: list[MemoryBackend | StorageBackend | StorageTier],
) -> StorageTier:
    serde = _serde(tier, layout)
    largest = object_bytes(serde.bound() if serde else layout.chunk_bytes)
    capacity = None if tier.capacity is None else _capacity(tier)
    context = BuildContext(
        tier=tier.name, object_bytes=largest, capacity=capacity, threads=2 * tier.lane.threads, shared=False
    )
    backend = plugins.build_backend(tier.backend, context)
    opened.append(backend)
    if not isinstance(backend, StorageBackend):
        raise ConfigError(f"tier {tier.name} must be a storage backend: a pipeline has one memory tier, its first")
    staging = None
    if serde is not None:
        region = memory.allocate(_staging_bytes(serde, tier))
        staging = Staging(region, staging_buffer_bytes(serde), 2 * tier.lane.threads)
    return StorageTier(
        tier.name,
        backend,
        serde,
        tier.eviction.build(),
        slots,
        layout.id,
        write=tier.write,
        promote=tier.promote,
        capacity=capacity,
        threads=tier.lane.threads,
        queue=tier.lane.queue,
        # Queued writes pin slots: never more than a quarter of memory for one tier.
        inflight=min(tier.lane.inflight, max(slots.slot_bytes, slots.region.nbytes // 4)),
        deadline=tier.lane.deadline,
        staging=staging,
    )


def _serde(tier: TierConfig, layout: KVLayout) -> Serde | None:
    """The tier's serde, or None for raw: raw objects need no staging, they move as they are in their slots."""
    if tier.serde is None:
        return None
    serde = tier.serde.build(SerdeContext(layout=layout, chunk_bytes=layout.chunk_bytes))
    if serde.codec == RAW_CODEC:
        return None
    if not 0 < len(serde.codec.encode("ascii", "replace")) <= 32 or not serde.codec.isascii():
        raise LMCacheError(f"serde {tier.serde.type!r}: codec name {serde.codec!r} must be 1 to 32 ASCII characters")
    return serde


def _staging_bytes(serde: Serde, tier: TierConfig) -> int:
    """Staging for one encoded tier: buffers for every read and every write thread."""
    return 2 * tier.lane.threads * STAGING_PER_THREAD * staging_buffer_bytes(serde)


def _capacity(tier: TierConfig) -> int:
    if tier.capacity is None:
        raise ConfigError(
            [
                Problem(
                    where="build",
                    path=f"tiers.{tier.name}.capacity",
                    what="is missing",
                    why="a tier without a limit would grow until the machine fails",
                    fix="set capacity, e.g. capacity: 8GiB",
                )
            ]
        )
    return int(tier.capacity)
