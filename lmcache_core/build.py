"""Configuration -> pipeline, once, at start-up. Raises with every problem at once; nothing grows afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache_core.config import PipelineConfig, TierConfig
from lmcache_core.errors import ConfigError, LMCacheError, PluginError, Problem
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.plugins import PLUGINS, Plugins
from lmcache_core.protocols import BuildContext, EvictionPolicy, MemoryBackend, Serde, SerdeContext, StorageBackend
from lmcache_core.seal import RAW_CODEC
from lmcache_core.slots import Slots
from lmcache_core.tier import Staging, StorageTier, staging_buffer_bytes
from lmcache_core.types import object_bytes, round_up

MIN_SLOTS = 2
"""Fewer slots cannot load one chunk while another is in use."""

STAGING_PER_THREAD = 2
"""Staging buffers per lane thread of an encoded tier."""

_PLUGIN_ERRORS = (Exception, SystemExit)


@dataclass(slots=True)
class _Storage:
    """What one storage tier needs, found out before anything is opened."""

    config: TierConfig
    eviction: EvictionPolicy
    serde: Serde | None
    """None for raw: raw objects need no staging, they move as they are in their slots."""
    object_bytes: int
    staging_bytes: int


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
    plugins = plugins or Plugins()
    for name in config.plugins:
        plugins.load(PLUGINS, name)
    problems: list[Problem] = []
    if layout.chunk_tokens != config.chunk_tokens:
        problems.append(
            Problem(
                where="build",
                path="chunk_tokens",
                what=f"is {config.chunk_tokens}, the layout has chunks of {layout.chunk_tokens} tokens",
                fix=f"set chunk_tokens to {layout.chunk_tokens}",
            )
        )
    memory_tier = config.tiers[0]
    storage = [found for tier in config.tiers[1:] if (found := _plan(tier, layout, problems)) is not None]
    count = _slot_count(memory_tier, layout, sum(tier.staging_bytes for tier in storage), problems)
    if problems:
        raise ConfigError(problems)

    opened: list[MemoryBackend | StorageBackend | StorageTier] = []
    try:
        memory, backends = _open(plugins, memory_tier, storage, layout, shared, opened)
        region = memory.allocate(count * round_up(object_bytes(layout.chunk_bytes)))
        slots = Slots(region, layout.chunk_bytes, memory_tier.eviction.build(), poison=poison)
        tiers = [
            _tier(tier, backend, layout, slots, memory, opened) for tier, backend in zip(storage, backends, strict=True)
        ]
        return Pipeline(layout, memory_tier.name, memory, slots, tiers, verify=config.verify)
    except BaseException as error:
        for thing in reversed(opened):
            try:
                if isinstance(thing, StorageTier):
                    thing.close(1.0)
                else:
                    thing.close()
            except _PLUGIN_ERRORS as second:
                error.add_note(f"closing it failed as well: {type(second).__name__}: {second}")
        raise


def _plan(tier: TierConfig, layout: KVLayout, problems: list[Problem]) -> _Storage | None:
    """Find out what a storage tier needs; None after adding to `problems`."""
    where = f"tiers.{tier.name}"
    try:
        serde = None
        if tier.serde is not None:
            serde = tier.serde.build(SerdeContext(layout=layout, chunk_bytes=layout.chunk_bytes))
            if not (serde.codec.isascii() and 0 < len(serde.codec) <= 32):
                raise LMCacheError(f"its codec name {serde.codec!r} must be 1 to 32 ASCII characters")
            if serde.codec == RAW_CODEC:
                serde = None
        largest = object_bytes(serde.bound() if serde else layout.chunk_bytes)
        staging = 2 * tier.lane.threads * STAGING_PER_THREAD * staging_buffer_bytes(serde) if serde else 0
    except _PLUGIN_ERRORS as error:
        kind = tier.serde.type if tier.serde else ""
        what = f"serde {kind!r} cannot encode these chunks: {_said(error)}"
        problems.append(Problem(where="build", path=f"{where}.serde", what=what, fix="choose another serde, or none"))
        return None
    try:
        eviction = tier.eviction.build()
    except _PLUGIN_ERRORS as error:
        what = f"eviction policy {tier.eviction.type!r} cannot be built: {_said(error)}"
        problems.append(Problem(where="build", path=f"{where}.eviction", what=what))
        return None
    if tier.capacity is not None and tier.capacity < largest:
        problems.append(
            Problem(
                where="build",
                path=f"{where}.capacity",
                what=f"{tier.capacity} bytes are less than one chunk takes, {largest} bytes",
                why="nothing could ever be stored in this tier",
                fix=f"set capacity to many times {largest} bytes, or lower chunk_tokens from {layout.chunk_tokens}",
            )
        )
        return None
    return _Storage(tier, eviction, serde, largest, staging)


def _slot_count(tier: TierConfig, layout: KVLayout, staging: int, problems: list[Problem]) -> int:
    """Slots that the memory tier's capacity holds beside staging; fewer than `MIN_SLOTS` is a problem."""
    path = f"tiers.{tier.name}.capacity"
    if tier.capacity is None:
        why = "memory is cut once, at start-up"
        problems.append(Problem(where="build", path=path, what="is missing", why=why, fix="add e.g. capacity: 8GiB"))
        return 0
    slot_bytes = round_up(object_bytes(layout.chunk_bytes))
    count = (tier.capacity - staging) // slot_bytes
    if count < MIN_SLOTS:
        beside = f" beside {staging} bytes of staging for encoded tiers" if staging else ""
        problems.append(
            Problem(
                where="build",
                path=path,
                what=f"{tier.capacity} bytes hold {max(0, count)} chunks of {slot_bytes} bytes{beside}",
                why=f"a pipeline needs room for at least {MIN_SLOTS} chunks",
                fix=f"set capacity to at least {MIN_SLOTS * slot_bytes + staging} bytes, or lower chunk_tokens from "
                f"{layout.chunk_tokens}",
            )
        )
    return count


def _open(
    plugins: Plugins,
    memory_tier: TierConfig,
    storage: list[_Storage],
    layout: KVLayout,
    shared: bool,
    opened: list[MemoryBackend | StorageBackend | StorageTier],
) -> tuple[MemoryBackend, list[StorageBackend]]:
    """Build every backend; `opened` gets them. Raise the one error, or all of them as a `ConfigError`."""
    contexts = [
        BuildContext(
            tier=memory_tier.name,
            object_bytes=object_bytes(layout.chunk_bytes),
            capacity=memory_tier.capacity,
            threads=1,
            shared=shared,
        )
    ]
    contexts += [
        BuildContext(
            tier=tier.config.name,
            object_bytes=tier.object_bytes,
            capacity=tier.config.capacity,
            threads=2 * tier.config.lane.threads,
        )
        for tier in storage
    ]
    memories: list[MemoryBackend] = []
    backends: list[StorageBackend] = []
    errors: list[tuple[BuildContext, LMCacheError]] = []
    for context, tier in zip(contexts, [memory_tier, *(tier.config for tier in storage)], strict=True):
        try:
            backend = plugins.build_backend(tier.backend, context)
        except LMCacheError as error:
            errors.append((context, error))
        except _PLUGIN_ERRORS as error:
            raised = PluginError(f"tier `{tier.name}`: building backend `{tier.backend.type}` failed: {_said(error)}")
            raised.__cause__ = error
            errors.append((context, raised))
        else:
            opened.append(backend)
            if isinstance(backend, MemoryBackend):
                memories.append(backend)
            else:
                backends.append(backend)
    if len(errors) == 1:
        raise errors[0][1]
    if errors:
        problems = [Problem(where="build", path=f"tiers.{c.tier}.backend", what=str(error)) for c, error in errors]
        raise ConfigError(problems) from errors[0][1]
    if len(memories) != 1 or opened[0] is not memories[0]:
        raise ConfigError("a pipeline has one memory tier, its first, such as backend cpu; all others store objects")
    return memories[0], backends


def _tier(
    tier: _Storage,
    backend: StorageBackend,
    layout: KVLayout,
    slots: Slots,
    memory: MemoryBackend,
    opened: list[MemoryBackend | StorageBackend | StorageTier],
) -> StorageTier:
    """One storage tier around its backend; it takes the backend's place in `opened`."""
    config, lane = tier.config, tier.config.lane
    staging = None
    if tier.serde is not None:
        region = memory.allocate(tier.staging_bytes)
        staging = Staging(region, staging_buffer_bytes(tier.serde), 2 * lane.threads)
    try:
        built = StorageTier(
            config.name,
            backend,
            tier.serde,
            tier.eviction,
            slots,
            layout.id,
            write=config.write,
            promote=config.promote,
            capacity=config.capacity,
            threads=lane.threads,
            queue=lane.queue,
            # Queued writes pin slots: never more than a quarter of memory for one tier.
            inflight=min(lane.inflight, slots.region.nbytes // 4),
            deadline=lane.deadline,
            staging=staging,
        )
    except LMCacheError:
        raise
    except _PLUGIN_ERRORS as error:
        raise PluginError(f"tier `{config.name}`: reading what is stored failed: {_said(error)}") from error
    opened[opened.index(backend)] = built
    return built


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else repr(error)
