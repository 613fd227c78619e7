"""Configuration -> pipeline, once, at start-up. Raises with every problem at once; nothing grows afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lmcache_core.config import PipelineConfig, RecomputeConfig, TenancyConfig, TierConfig
from lmcache_core.config.models import MIN_SECRET
from lmcache_core.cost import Recompute
from lmcache_core.doorway import Staging, staging_buffer_bytes
from lmcache_core.errors import BackendUnavailable, ConfigError, LMCacheError, PluginError, Problem
from lmcache_core.eviction.guard import Guarded
from lmcache_core.eviction.lru import Lru
from lmcache_core.gpu import CudaError
from lmcache_core.ladder import LadderTier
from lmcache_core.layout import KVLayout
from lmcache_core.mirror import Mirror, place_bytes
from lmcache_core.pipeline import Pipeline
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import (
    BuildContext,
    EvictionConfig,
    EvictionPolicy,
    Ladder,
    MemoryBackend,
    Serde,
    SerdeContext,
    StorageBackend,
)
from lmcache_core.seal import RAW_CODEC
from lmcache_core.slots import Slots
from lmcache_core.tenancy import Shares, Tenancy
from lmcache_core.tier import ASK_THREADS, StorageTier
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
    context: BuildContext
    staging_bytes: int
    own_bytes: int
    """Memory of the backend itself."""


_Opened = MemoryBackend | StorageBackend | StorageTier | Mirror


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
    plugins.activate(config.plugins)
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
    tenancy = _tenancy(config.tenancy, problems)
    device_tier, (memory_tier, *storage_tiers) = config.device_tier, config.host_tiers
    planned = [_plan(tier, layout, tenancy, plugins, problems) for tier in storage_tiers]
    storage = [tier for tier in planned if tier is not None]
    _check_quotas(tenancy, config, layout, problems)
    count = _slot_count(memory_tier, layout, sum(t.staging_bytes + t.own_bytes for t in storage), problems)
    if device_tier is not None:
        _check_device(device_tier, config, layout, count, shared, problems)
    if problems:
        raise ConfigError(problems)

    opened: list[_Opened] = []
    try:
        device, memory, backends = _open(plugins, device_tier, memory_tier, storage, layout, shared, opened)
        slot_bytes = round_up(object_bytes(layout.chunk_bytes))
        region = memory.allocate(count * slot_bytes)
        policy = _shared(memory_tier, tenancy, count * slot_bytes, slot_bytes) or _policy(memory_tier.eviction)
        slots = Slots(region, layout.chunk_bytes, policy, poison=poison)
        tiers = [
            _tier(tier, backend, layout, slots, memory, opened) for tier, backend in zip(storage, backends, strict=True)
        ]
        mirror = None if device_tier is None else _mirror(device_tier, device, slots, opened)
        return Pipeline(
            layout,
            memory_tier.name,
            memory,
            slots,
            tiers,
            verify=config.verify,
            recompute=_recompute(config.recompute),
            tenancy=tenancy,
            mirror=mirror,
            fidelity=",".join(sorted({t.serde.codec for t in storage if t.serde is not None and not t.serde.lossless})),
        )
    except BaseException as error:
        for thing in reversed(opened):
            try:
                if isinstance(thing, StorageTier | Mirror):
                    thing.close(1.0)
                else:
                    thing.close()
            except _PLUGIN_ERRORS as second:
                error.add_note(f"closing it failed as well: {type(second).__name__}: {second}")
        raise


def _tenancy(config: TenancyConfig | None, problems: list[Problem]) -> Tenancy | None:
    if config is None:
        return None
    if config.secret is not None:
        secret = config.secret.get_secret_value().encode()
    elif config.secret_file is not None:
        try:
            secret = config.secret_file.read_bytes().strip()
            what = f"{config.secret_file} holds fewer than {MIN_SECRET} bytes" if len(secret) < MIN_SECRET else ""
        except OSError as error:
            what = f"{config.secret_file} cannot be read: {error.strerror}"
        if what:
            fix = f"put at least {MIN_SECRET} random characters there, readable by this process"
            problems.append(Problem(where="build", path="tenancy.secret_file", what=what, fix=fix))
            return None
    return Tenancy(secret, config.quota, config.quotas, config.unmetered)


def _check_quotas(tenancy: Tenancy | None, config: PipelineConfig, layout: KVLayout, problems: list[Problem]) -> None:
    """A tenant whose quota is less than one chunk could never have anything cached."""
    if tenancy is None or config.tenancy is None:
        return
    slot = round_up(object_bytes(layout.chunk_bytes))
    storage = [tier.name for tier in config.host_tiers[1:]]
    for name in config.tenancy.unmetered:
        if name not in storage:
            fix = f"storage tiers are: {', '.join(storage) or 'none'}"
            problems.append(Problem(where="build", path="tenancy.unmetered", what=f"no tier `{name}`", fix=fix))
    for tier in config.host_tiers[1:]:
        if tier.capacity is None and tenancy.limits(tier.name):
            problems.append(_unmetered(tier, "capacity", "it has no capacity, so nobody counts what is stored there"))
    named = {"quota": "", **{f"quotas.{name}": name for name in config.tenancy.quotas}}
    for path, tenant in named.items():
        for tier in config.host_tiers:
            quota = None if tier.capacity is None else tenancy.quota(tenant, tier.capacity)
            if quota is not None and quota < slot:
                what = f"{quota} bytes of tier `{tier.name}` are less than one chunk takes, {slot} bytes"
                fix = f"set it to many times {slot} bytes, or lower chunk_tokens from {layout.chunk_tokens}"
                problems.append(Problem(where="build", path=f"tenancy.{path}", what=what, fix=fix))


def _unmetered(tier: TierConfig, field: str, what: str) -> Problem:
    return Problem(
        where="build",
        path=f"tiers.{tier.name}.{field}",
        what=what,
        why="the quotas of `tenancy` cannot be kept in this tier: one tenant could crowd out the others",
        fix=f"give it a capacity, where its backend counts (gds, fsspec, s3), or accept that with `unmetered: "
        f"[{tier.name}]` in `tenancy`",
    )


def _shared(tier: TierConfig, tenancy: Tenancy | None, capacity: int | None, unit: int) -> Shares | None:
    """An eviction policy for each tenant, in units of so many bytes; None without quotas, or without a capacity."""
    if tenancy is None or not tenancy.limits(tier.name) or capacity is None:
        return None

    def quota(tenant: str) -> int | None:
        nbytes = tenancy.quota(tenant, capacity)
        return None if nbytes is None else nbytes // unit

    return Shares(lambda: _policy(tier.eviction), capacity // unit, quota, tenancy.names.get)


def _policy(config: EvictionConfig) -> EvictionPolicy:
    """The policy, guarded unless it is the built-in one."""
    policy = config.build()
    return policy if isinstance(policy, Lru) else Guarded(policy, config.type)


def _lossy(tier: TierConfig) -> Problem:
    kind = tier.serde.type if tier.serde else ""
    return Problem(
        where="build",
        path=f"tiers.{tier.name}.serde",
        what=f"serde {kind!r} is lossy: what it gives back is not what was stored",
        why="outputs of the model could change unnoticed",
        fix=f"add `lossy: true` to tier `{tier.name}` if that is wanted, or choose a lossless serde such as zstd",
    )


def _recompute(config: RecomputeConfig) -> Recompute:
    rate = config.tokens_per_s
    known = None if rate is None or rate == "measure" else 1 / rate
    return Recompute(config.factor, known, measure=rate == "measure")


def _plan(
    tier: TierConfig, layout: KVLayout, tenancy: Tenancy | None, plugins: Plugins, problems: list[Problem]
) -> _Storage | None:
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
            elif not serde.lossless and not tier.lossy:
                problems.append(_lossy(tier))
                return None
        largest = object_bytes(serde.bound() if serde else layout.chunk_bytes)
        staging = 2 * tier.threads * STAGING_PER_THREAD * staging_buffer_bytes(serde) if serde else 0
    except _PLUGIN_ERRORS as error:
        kind = tier.serde.type if tier.serde else ""
        what = f"serde {kind!r} cannot encode these chunks: {_said(error)}"
        problems.append(Problem(where="build", path=f"{where}.serde", what=what, fix="choose another serde, or none"))
        return None
    try:
        eviction = _shared(tier, tenancy, tier.capacity, 1) or _policy(tier.eviction)
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
    context = BuildContext(
        tier=tier.name,
        object_bytes=largest,
        capacity=tier.capacity,
        threads=2 * tier.threads + ASK_THREADS,
        deadline=tier.lane.deadline,
        lookup_deadline=tier.lane.lookup_deadline,
    )
    try:
        own = plugins.memory_bytes(tier.backend, context)
    except _PLUGIN_ERRORS as error:
        what = f"backend {tier.backend.type!r} cannot say what memory it takes: {_said(error)}"
        problems.append(Problem(where="build", path=f"{where}.backend", what=what))
        return None
    return _Storage(tier, eviction, serde, context, staging, own)


def beside_slots(config: PipelineConfig, layout: KVLayout, plugins: Plugins) -> int:
    """Bytes of the memory tier's capacity that storage tiers take from its slots: staging, and buffers of their own.

    `plugins` has the configuration's plugins active. Tiers that cannot be built count for nothing.
    """
    planned = [_plan(tier, layout, None, plugins, []) for tier in config.host_tiers[1:]]
    return sum(tier.staging_bytes + tier.own_bytes for tier in planned if tier is not None)


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
        beside = f" beside {staging} bytes of staging for other tiers" if staging else ""
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


def _check_device(
    tier: TierConfig, config: PipelineConfig, layout: KVLayout, slots: int, shared: bool, problems: list[Problem]
) -> None:
    """What speaks against a GPU tier before the GPU is asked."""

    def problem(path: str, what: str, why: str, fix: str) -> None:
        problems.append(Problem(where="build", path=path, what=what, why=why, fix=fix))

    here, size, host = f"tiers.{tier.name}", place_bytes(layout.chunk_bytes), config.host_tiers[0].name
    if shared:
        why = "the pipeline must run in the process that owns the GPU's memory, and this engine's workers are others"
        problem(here, "this engine can have no GPU tier", why, "remove it: the engine's own cache is on the GPU")
    if config.verify == "serve":
        why = "the CPU cannot check bytes in the memory of a GPU"
        problem("verify", "`serve` cannot be had with a GPU tier", why, f"remove `verify`, or tier `{tier.name}`")
    if tier.capacity is not None and tier.capacity < size:
        fix = f"set it to many times {size} bytes, or lower chunk_tokens from {layout.chunk_tokens}"
        problem(f"{here}.capacity", f"{tier.capacity} bytes hold no chunk of {size} bytes", "nothing would fit", fix)
    elif tier.capacity is not None and slots >= MIN_SLOTS and tier.capacity // size > slots:
        what = f"{tier.capacity} bytes hold {tier.capacity // size} chunks, tier `{host}` {slots}"
        why = "the GPU tier holds copies of the chunks in host memory: the rest would never be used"
        problem(f"{here}.capacity", what, why, f"raise the capacity of `{host}`, or lower this one to {slots * size}")


def _mirror(tier: TierConfig, memory: MemoryBackend | None, slots: Slots, opened: list[_Opened]) -> Mirror:
    """The GPU tier; it takes the place of its memory in `opened`."""
    assert memory is not None and tier.capacity is not None
    if not slots.region.pinned:
        raise BackendUnavailable(
            f"tier `{tier.name}`: the host memory below it is not pinned "
            f"({slots.region.remark or 'its backend does not do that'}); use type: cpu with `pin: true`"
        )
    size = place_bytes(slots.chunk_bytes)
    region = memory.allocate(tier.capacity // size * size)
    try:
        mirror = Mirror(tier.name, memory, region, slots)
    except CudaError as error:
        raise BackendUnavailable(f"tier `{tier.name}`: {error}") from error
    opened[opened.index(memory)] = mirror
    return mirror


def _open(
    plugins: Plugins,
    device_tier: TierConfig | None,
    memory_tier: TierConfig,
    storage: list[_Storage],
    layout: KVLayout,
    shared: bool,
    opened: list[_Opened],
) -> tuple[MemoryBackend | None, MemoryBackend, list[StorageBackend]]:
    """Build every backend; `opened` gets them. Raise the one error, or all of them as a `ConfigError`."""
    in_memory = [memory_tier] if device_tier is None else [device_tier, memory_tier]
    contexts = [
        BuildContext(
            tier=tier.name,
            object_bytes=object_bytes(layout.chunk_bytes),
            capacity=tier.capacity,
            threads=1,
            shared=shared,
        )
        for tier in in_memory
    ]
    contexts += [tier.context for tier in storage]
    memories: list[MemoryBackend] = []
    backends: list[StorageBackend] = []
    errors: list[tuple[BuildContext, LMCacheError]] = []
    for context, tier in zip(contexts, [*in_memory, *(tier.config for tier in storage)], strict=True):
        if memories:
            context = replace(context, gpu=memories[0].device)
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
    if len(memories) != len(in_memory) or opened[: len(memories)] != memories:
        raise ConfigError("a pipeline has one memory tier, its first, such as backend cpu; all others store objects")
    return (None if device_tier is None else memories[0]), memories[-1], backends


def _tier(
    tier: _Storage,
    backend: StorageBackend,
    layout: KVLayout,
    slots: Slots,
    memory: MemoryBackend,
    opened: list[_Opened],
) -> StorageTier:
    """One storage tier around its backend; it takes the backend's place in `opened`."""
    config, lane = tier.config, tier.config.lane
    staging = None
    if tier.serde is not None:
        region = memory.allocate(tier.staging_bytes)
        staging = Staging(region, staging_buffer_bytes(tier.serde), 2 * config.threads)
    try:
        for region in [slots.region, *([staging.region] if staging else ())]:
            backend.register(region)
    except LMCacheError:
        raise
    except _PLUGIN_ERRORS as error:
        raise PluginError(f"tier `{config.name}`: registering memory failed: {_said(error)}") from error
    try:
        built = (LadderTier if isinstance(tier.serde, Ladder) else StorageTier)(
            config.name,
            backend,
            tier.serde,
            tier.eviction,
            slots,
            layout.id,
            write=config.write,
            promote=config.promote,
            capacity=config.capacity,
            threads=config.threads,
            queue=lane.queue,
            # Queued writes pin slots: never more than a quarter of memory for one tier.
            inflight=min(lane.inflight, slots.region.nbytes // 4),
            deadline=lane.deadline,
            lookup_deadline=lane.lookup_deadline,
            staging=staging,
        )
    except LMCacheError:
        raise
    except _PLUGIN_ERRORS as error:
        raise PluginError(f"tier `{config.name}`: reading what is stored failed: {_said(error)}") from error
    opened[opened.index(backend)] = built
    if isinstance(tier.eviction, Shares) and built.books.shares is None:
        raise ConfigError(
            [_unmetered(config, "backend", f"backend `{config.backend.type}` keeps its own books and evicts by itself")]
        )
    return built


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else repr(error)
