"""The configuration as frozen models. What stands inside `backend`, `serde` or `eviction` is the plugin's own model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    SecretStr,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic import ValidationInfo as Info
from pydantic_core import InitErrorDetails, PydanticCustomError

from lmcache_core import plugins
from lmcache_core.config import machine
from lmcache_core.config.findings import Finding, raise_findings
from lmcache_core.errors import PluginError
from lmcache_core.eviction.lru import LruConfig
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import BackendConfig, EvictionConfig, Frozen, PluginConfig, SerdeConfig
from lmcache_core.spelling import closest
from lmcache_core.units import PERCENT_SCHEMA, SIZE_SCHEMA, ByteSize, Percent, Seconds, Size, parse_size

MIN_SECRET = 16
"""Characters of a tenancy secret, at least."""

TIER_NAME = r"^[a-z0-9]+(?:[-_][a-z0-9]+)*$"
"""Tier names stand in metrics, in file names and, folded to upper case, in environment variables."""


def manager_of(info: Info) -> Plugins:
    """The plugin manager of this validation: the loader's, or the process's."""
    context = info.context
    return context["plugins"] if isinstance(context, dict) and "plugins" in context else plugins.default()


def _no_type(value: Mapping[Any, Any]) -> list[InitErrorDetails]:
    """Why a mapping names no plugin: without its `type` nothing else in it can be judged, but for its spelling."""
    if "type" in value:
        return [InitErrorDetails(type="string_type", loc=("type",), input=value["type"])]
    near = [key for key in value if isinstance(key, str) and closest(key, ["type"])]
    misspelt = [InitErrorDetails(type="extra_forbidden", loc=(key,), input=value[key]) for key in near]
    return [InitErrorDetails(type="missing", loc=("type",), input=value), *misspelt]


def _resolver(base: type[BaseModel], find: Callable[[Plugins, str], type[BaseModel]]) -> Callable[[Any, Info], Any]:
    """Turn a mapping into an instance of the plugin's own model, chosen by its `type`."""

    def resolve(value: Any, info: Info) -> Any:
        if isinstance(value, base) or not isinstance(value, Mapping):
            return value
        name = value.get("type")
        if not isinstance(name, str):
            raise ValidationError.from_exception_data(base.__name__, _no_type(value))
        try:
            model = find(manager_of(info), name)
        except PluginError as error:
            custom = PydanticCustomError("plugin", "{what}", {"what": str(error), "kind": type(error).__name__})
            details = [InitErrorDetails(type=custom, loc=("type",), input=name)]
            raise ValidationError.from_exception_data(base.__name__, details) from error
        return model.model_validate(value, context=info.context)

    return resolve


def _by_type(base: type[BaseModel], find: Callable[[Plugins, str], type[BaseModel]]) -> BeforeValidator:
    return BeforeValidator(_resolver(base, find))


def _plugin_settings(plugins: Plugins, name: str) -> type[PluginConfig]:
    model = plugins.settings(name)
    if model is None:
        raise PluginError(f"plugin `{name}` takes no settings; write `- {name}`")
    return model


_plugin_by_type = _resolver(PluginConfig, _plugin_settings)


def _named_or_set(value: Any, info: Info) -> Any:
    """A plugin's name stands for its default settings where it has any."""
    if isinstance(value, str):
        try:
            settings = manager_of(info).settings(value)
        except PluginError:
            return value  # whoever activates it says so, the loader with its place
        return value if settings is None else settings.model_validate({"type": value}, context=info.context)
    if isinstance(value, (Mapping, PluginConfig)):
        return _plugin_by_type(value, info)
    raise ValueError("must be a plugin's name, or its settings as `{type: name, ...}`")


def _count(value: Any) -> Any:
    """Counts are whole numbers; `true` and `2.0` are more likely mistakes than meant."""
    if isinstance(value, (bool, float)):
        raise ValueError("must be a whole number")
    return value


_WHOLE = BeforeValidator(_count)
Backend = Annotated[SerializeAsAny[BackendConfig], _by_type(BackendConfig, Plugins.backend)]
SerdeField = Annotated[SerializeAsAny[SerdeConfig], _by_type(SerdeConfig, Plugins.serde)]
Plugin = Annotated[SerializeAsAny[PluginConfig] | str, BeforeValidator(_named_or_set)]
Eviction = Annotated[SerializeAsAny[EvictionConfig], _by_type(EvictionConfig, Plugins.eviction)]


def _resolve_share(value: Any, info: Info) -> Any:
    """A share is of the machine's memory for a tier in host memory, of the file system for one in a directory."""
    if value is None:
        return None
    size = parse_size(value)
    if not isinstance(size, Percent):
        return size
    backend = info.data.get("backend")
    if not isinstance(backend, BackendConfig):
        return 1  # the backend's own error is reported; any capacity is right beside it
    if backend.on_device:
        raise ValueError(f"a share such as {size} has no meaning for a GPU: write a size, e.g. 8GiB")
    if backend.in_memory:
        return size.of(machine.memory_total())
    directory = backend.local_directory()
    if directory is None:
        raise ValueError(
            f"a share such as {size} has no meaning for backend `{backend.type}`: write a size, e.g. 200GiB"
        )
    return size.of(machine.disk(directory).total)


Capacity = Annotated[
    Annotated[int, Field(gt=0)] | None,
    BeforeValidator(_resolve_share),
    WithJsonSchema({"anyOf": [*SIZE_SCHEMA, PERCENT_SCHEMA, {"type": "null"}]}),
]


class LaneConfig(Frozen):
    """Threads and bounded queues of one storage tier."""

    threads: Annotated[int, Field(ge=1, le=256), _WHOLE] | None = None
    """Threads for reading, and as many for writing; while some wait for the medium, others seal, verify and encode.
    By default what suits the backend: 8 for `gds` without a serde, otherwise 4."""
    queue: Annotated[int, Field(ge=1, le=65536), _WHOLE] = 64
    """Batches that may wait. A full queue drops new work and counts it; the engine never waits."""
    inflight: Annotated[ByteSize, Field(gt=0)] = 1 << 30
    """Bytes of queued and running writes together, which pin their slots; at most a quarter of memory in any case."""
    deadline: Annotated[Seconds, Field(gt=0, le=3600)] = 5.0
    """Longest wait for one batch; later it is a miss."""
    lookup_deadline: Annotated[Seconds, Field(gt=0, le=3600)] = 0.25
    """Longest wait for a medium that must be asked what it has; later it has nothing. At most half of `deadline`."""


class TierConfig(Frozen):
    """One tier: a medium (`backend`), perhaps an encoding (`serde`), and how the core uses them."""

    name: Annotated[str, Field(pattern=TIER_NAME, max_length=32)]
    """Short lower-case name, unique in the pipeline; used in metrics and environment overlays."""
    backend: Backend
    """What reaches the medium; `type` names an installed backend plugin."""
    capacity: Capacity = None
    """Bytes the tier may occupy, everything included: `4GiB`, `200GB`, or `30%` of memory or of the file system."""
    write: Literal["through", "back", "never"] = "through"
    """When a storage tier gets a chunk: on store (`through`), on leaving memory (`back`), or `never` (read only)."""
    promote: bool = True
    """Keep chunks read from this tier in memory, and in the tiers nearer than it."""
    serde: SerdeField | None = None
    """How chunks are encoded on the way in; raw bytes without one."""
    lossy: bool = False
    """Allow a serde that does not give back the very bytes. Such a pipeline never shares chunks with exact ones."""
    eviction: Eviction = Field(default_factory=LruConfig)
    """Which chunk goes first when the tier is full."""
    lane: LaneConfig = LaneConfig()
    """Threads, queues and deadline of a storage tier."""

    @property
    def threads(self) -> int:
        """Threads for reading, and as many for writing."""
        if self.lane.threads is not None:
            return self.lane.threads
        # Encoding needs processors, and memory for each thread: more threads than the default do not make it faster.
        return self.backend.lane_threads if self.serde is None else BackendConfig.lane_threads

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_findings("TierConfig", list(self._findings()))
        return self

    def _findings(self) -> list[Finding]:
        kind = self.backend.type
        found: list[Finding] = []
        if self.capacity is None and (self.backend.in_memory or self.backend.local_directory() is not None):
            why = "memory is cut once, at start-up" if self.backend.in_memory else "the tier could fill the file system"
            found.append(Finding(("capacity",), f"a `{kind}` tier needs a capacity", why, "add e.g. `capacity: 4GiB`"))
        if self.backend.in_memory and self.serde is not None:
            found.append(
                Finding(
                    ("serde",),
                    "a memory tier holds raw chunks and takes no serde",
                    "engines copy pages straight in and out of it",
                    "remove `serde`, or move it to a storage tier",
                    self.serde.type,
                )
            )
        if self.backend.in_memory and self.write != "through":
            found.append(
                Finding(
                    ("write",),
                    "a memory tier has no write mode",
                    "every chunk passes through it; the mode says when storage tiers get a copy",
                    "remove `write`, or set it on a storage tier",
                    self.write,
                )
            )
        if self.backend.on_device and self.eviction.type != "lru":
            found.append(
                Finding(
                    ("eviction",),
                    "a GPU tier drops the copies that were used least recently",
                    "it holds copies of host memory, whose own policy decides what is kept",
                    "remove `eviction`, or set it on the tier in host memory",
                    self.eviction.type,
                )
            )
        return found


def _token_rate(value: Any) -> float | Literal["measure"] | None:
    if value is None or value == "measure":
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < inf:
        raise ValueError("must be prompt tokens per second, e.g. 8000, or `measure`")
    return float(value)


TokenRate = Annotated[
    float | Literal["measure"] | None,
    PlainValidator(_token_rate),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "measure"}, {"type": "null"}]}),
]


class RecomputeConfig(Frozen):
    """The cost rule: never wait longer for stored KV than computing it again would take."""

    tokens_per_s: TokenRate = None
    """Prompt tokens that the engine computes in a second, or `measure` where the adapter can; without, no rule."""
    factor: Annotated[float, Field(gt=0, le=10)] = 0.5
    """Share of the time for computing that may be spent on reading instead; a slower tier is left out."""


class TenancyConfig(Frozen):
    """Tenants that never share: each request has one, told by the engine's gateway; a request without is not cached."""

    secret: SecretStr | None = None
    """What tenants' salts are made from, 16 characters or more. The same in every process that shares a tier."""
    secret_file: Path | None = None
    """File that holds the secret."""
    quota: Size | None = None
    """What each tenant may hold in every tier, memory included: a size, or a share of the tier's capacity."""
    quotas: dict[str, Size] = Field(default_factory=dict)
    """The same for some tenants by name."""
    unmetered: tuple[str, ...] = ()
    """Tiers in which no quota holds, and one tenant can crowd out others: those without a capacity, and those whose
    medium evicts by itself, such as redis. A configuration with quotas must name them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        found: list[Finding] = []
        why = "without a secret whoever knows a tenant's name could look for its prompts"
        fix = "set LMCACHE__TENANCY__SECRET in the environment, or `secret_file: /run/secrets/lmcache`"
        if (self.secret is None) == (self.secret_file is None):
            what = "is missing" if self.secret is None else "and `secret_file` are both given"
            found.append(Finding(("secret",), what, why, fix))
        elif self.secret is not None and len(self.secret.get_secret_value()) < MIN_SECRET:
            found.append(Finding(("secret",), f"is shorter than {MIN_SECRET} characters", why, "make a longer one"))
        raise_findings("TenancyConfig", found)
        return self


class PipelineConfig(Frozen):
    """A whole cache: its tiers, nearest the engine first."""

    chunk_tokens: Annotated[int, Field(ge=1, le=65536), _WHOLE] = 256
    """Tokens of one chunk, the unit of caching; a multiple of the engine's block."""
    verify: Literal["load", "serve"] = "load"
    """Verify checksums when a chunk enters memory (`load`), or again whenever it is served (`serve`)."""
    recompute: RecomputeConfig = RecomputeConfig()
    """When reading stored KV is worth waiting for."""
    tenancy: TenancyConfig | None = None
    """Keep tenants apart, and let each hold so much; off without."""
    plugins: tuple[Plugin, ...] = ()
    """Installed `lmcache.plugins` to activate, such as wrappers around every backend: `name`, or `{type: name, ...}` to
    give its settings. The last is the outermost."""
    tiers: tuple[TierConfig, ...]
    """One memory tier first, perhaps with a GPU tier before it; then storage tiers in the order they are asked."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        shapes = [Shape(tier.name, tier.backend.in_memory, tier.backend.on_device) for tier in self.tiers]
        named = [() if isinstance(plugin, str) else plugin.tiers or () for plugin in self.plugins]
        found = plugin_findings(named, [tier.name for tier in self.tiers])
        raise_findings("PipelineConfig", [*pipeline_findings(shapes), *found])
        return self

    @property
    def device_tier(self) -> TierConfig | None:
        """The GPU tier, where there is one."""
        return self.tiers[0] if self.tiers[0].backend.on_device else None

    @property
    def host_tiers(self) -> tuple[TierConfig, ...]:
        """The memory tier, then the storage tiers."""
        return self.tiers if self.device_tier is None else self.tiers[1:]


def plugin_findings(plugins: Sequence[Sequence[str]], tiers: Sequence[str]) -> Iterator[Finding]:
    """Plugins for tiers that are not there: encrypting a tier `clod` would leave `cold` in clear text.

    `plugins`: the tiers that each plugin names.
    """
    for i, named in enumerate(plugins):
        for j, name in enumerate(named):
            if name not in tiers:
                near = closest(name, tiers)
                yield Finding(
                    ("plugins", i, "tiers", j),
                    "no tier has this name" + (f"; did you mean `{near}`?" if near else ""),
                    "what the plugin was to do to the tier would silently not be done",
                    f"write one of {', '.join(f'`{known}`' for known in tiers)}",
                    name,
                )


@dataclass(frozen=True, slots=True)
class Shape:
    """What the checks across tiers need of one; None where it is not known because of another error."""

    name: str | None
    in_memory: bool | None
    on_device: bool = False


def pipeline_findings(shapes: Sequence[Shape]) -> list[Finding]:
    """What is wrong between tiers."""
    found: list[Finding] = []
    if not shapes:
        fix = "add `- {name: dram, capacity: 4GiB, backend: {type: cpu}}`"
        found.append(Finding(("tiers",), "there are no tiers", "nothing could be cached", fix, "[]"))
    first: dict[str, tuple[int, str]] = {}
    for i, shape in enumerate(shapes):
        if shape.name is None:
            continue
        folded = shape.name.replace("-", "_")
        if folded in first:
            other, name = first[folded]
            same = "has this name too" if name == shape.name else f"is called `{name}`, the same in the environment"
            found.append(
                Finding(
                    ("tiers", i, "name"),
                    f"tier names must differ; tiers[{other}] {same}",
                    "metrics and environment overlays could not tell them apart",
                    f"choose another name, e.g. `{shape.name}{i}`",
                    shape.name,
                )
            )
        first.setdefault(folded, (i, shape.name))
    devices = [i for i, shape in enumerate(shapes) if shape.on_device]
    for i in devices:
        if i:
            found.append(
                Finding(
                    ("tiers", i, "backend"),
                    "only one GPU tier is supported" if 0 in devices else "the GPU tier must come first",
                    "a pipeline serves one device" if 0 in devices else "it holds copies of the memory tier's chunks",
                    "remove this tier" if 0 in devices else f"move tiers[{i}] to the top of the list",
                )
            )
    memory = [i for i, shape in enumerate(shapes) if shape.in_memory and not shape.on_device]
    unknown = any(shape.in_memory is None for shape in shapes)
    if shapes and not memory and not unknown:
        fix = "put `- {name: dram, capacity: 4GiB, backend: {type: cpu}}` first"
        why = "engines copy their pages to and from memory; storage tiers are filled from there"
        found.append(Finding(("tiers",), "there is no memory tier", why, fix))
    for i in memory[1:]:
        found.append(
            Finding(
                ("tiers", i, "backend"),
                f"only one memory tier is supported; tiers[{memory[0]}] is one already",
                "chunks would be kept twice in the same memory",
                f"remove this tier and give its capacity to tiers[{memory[0]}]",
            )
        )
    first_place = int(0 in devices)
    if memory and memory[0] != first_place:
        found.append(
            Finding(
                ("tiers", memory[0], "backend"),
                "the memory tier must come first",
                "tiers are asked in order, nearest the engine first",
                f"move tiers[{memory[0]}] " + ("below the GPU tier" if first_place else "to the top of the list"),
            )
        )
    return found
