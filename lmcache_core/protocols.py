"""What plugins implement. Everything here is public and versioned by `API_VERSION`.

Common rules, for every method of every plugin: it takes a batch, it may block, it is called from several
threads at once, and it releases the GIL while it waits. Buffers are lent for the duration of the call only;
keeping one after returning is a bug (the kit catches it). The core owns threads, queues, deadlines,
breakers, encoding, capacity, eviction, integrity and metrics, so that a plugin stays small.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from lmcache_core.layout import KVLayout
from lmcache_core.redact import hide
from lmcache_core.types import ChunkKey, Got, Put, Usage

API_VERSION = 1


class Frozen(BaseModel):
    """Immutable model that refuses unknown keys, and whose errors never show values: one may be a secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes `true` for 1; in a configuration it is more likely a value in the wrong line."""
        if isinstance(value, bool) and info.field_name is not None:
            field = cls.model_fields[info.field_name]
            kinds = set(_kinds(field.annotation))
            if (
                kinds & {int, float}
                and bool not in kinds
                and not any(type(m) is BeforeValidator for m in field.metadata)
            ):
                raise ValueError("must be a number" if float in kinds else "must be a whole number")
        return value

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, hide(value, name or "")


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types a field takes; nothing where a validator of its own reads them."""
    arguments = get_args(annotation)
    if any(type(argument) is BeforeValidator for argument in arguments):
        return
    yield annotation
    for argument in arguments if get_origin(annotation) in (Annotated, Union, UnionType) else ():
        yield from _kinds(argument)


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What the core tells a backend when it builds it."""

    tier: str
    """Name of the tier, for messages."""
    object_bytes: int
    """Largest sealed object (header page + encoded payload) this tier will ever store, in bytes."""
    capacity: int | None
    """Bytes the tier may occupy on the medium, everything included; None where the tier set no limit."""
    threads: int
    """Most threads that call the backend at the same time."""
    shared: bool = False
    """Memory backends: the region must be mappable by another process of the same user (`Region.share`)."""
    deadline: float = 5.0
    """Seconds after which the core gives up on a call of a storage backend. A backend that waits for a network ends its
    call by then: a call that does not end keeps its thread."""
    lookup_deadline: float = 5.0
    """The same for `contains`, which an engine may be waiting for: usually far shorter."""
    gpu: int | None = None
    """Memory backends: the GPU whose tier holds copies of this memory, which must be pinned for it."""


class BackendConfig(Frozen, ABC):
    """Base of every backend's own settings; `type` is the plugin's entry-point name."""

    in_memory: ClassVar[bool] = False
    """True when `build` returns a `MemoryBackend`: known from the class, before anything is built."""
    on_device: ClassVar[bool] = False
    """True when that is the memory of a GPU: a tier of copies, above the one in host memory."""
    lane_threads: ClassVar[int] = 4
    """Threads of each direction where the configuration names no number: more for a medium that wants a deep queue."""

    type: str

    def local_directory(self) -> Path | None:
        """Local directory the tier lives in, or None: what a capacity of `30%` and the directory checks look at."""
        return None

    def memory_bytes(self, context: BuildContext) -> int:
        """Bytes of memory a storage backend takes for its own buffers: they come out of the memory tier's capacity."""
        return 0

    @abstractmethod
    def build(self, context: BuildContext) -> StorageBackend | MemoryBackend:
        """Make the backend. Raise `BackendUnavailable` (with the fix) when the medium cannot be used."""


class PluginConfig(Frozen, ABC):
    """Base of the settings of a plugin named in `plugins:`; `type` is the plugin's entry-point name."""

    type: str
    tiers: tuple[str, ...] | None = None
    """Names of the tiers it is for; every tier without."""

    @field_validator("tiers")
    @classmethod
    def _some(cls, tiers: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if tiers == ():
            raise ValueError("names no tier, so nothing would be done: leave it out for every tier")
        return tiers

    def applies_to(self, tier: str) -> bool:
        """Whether it is for the tier of that name."""
        return self.tiers is None or tier in self.tiers

    @abstractmethod
    def build(self) -> object:
        """Make the object whose hooks take part in assembling this pipeline. Raise `ConfigError` when it cannot be."""


@dataclass(slots=True)
class Region:
    """Memory a memory backend handed out: page-aligned, `nbytes` long, alive until `close()`."""

    address: int
    nbytes: int
    view: memoryview
    """Writable bytes of the whole region; empty for device memory."""
    share: dict[str, int] | None = None
    """How another process of the same user maps it (`{"pid", "fd", "nbytes"}`), or None when private."""
    pinned: bool = False
    """Registered with a device driver for asynchronous copies."""
    remark: str = ""
    """What was asked for and could not be had, with the reason: pinning, a NUMA node."""
    owner: Any = None
    """Whatever keeps the memory alive."""
    device: int | None = None
    """The GPU whose memory it is, for storage backends that are `device_direct`; None for host memory."""


class MemoryBackend(ABC):
    """A medium the CPU or GPU addresses directly; the core cuts its region into slots."""

    device: int | None = None
    """The GPU whose memory it hands out, which the CPU cannot touch; None for host memory."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Region:
        """Allocate and pre-fault `nbytes` once, at start-up. Raise `BackendUnavailable` if that is impossible."""

    @abstractmethod
    def close(self) -> None:
        """Release everything allocated. Idempotent."""


class StorageBackend(ABC):
    """A medium that holds sealed objects by key.

    An object is opaque bytes; whatever goes wrong inside them is found by the core, which verifies every
    object it reads. A backend must return what was stored under the key, all of it, or say that it did not.
    """

    device_direct: ClassVar[bool] = False
    """True when buffers may be device memory."""
    contains_is_local: ClassVar[bool] = False
    """True when `contains` answers from memory and never waits; then it may run on the engine's thread."""

    def register(self, region: Region) -> None:  # noqa: B027 - most backends have nothing to note
        """Take note of memory that buffers will come from, for media that must know it beforehand (RDMA, cuFile).

        Called once for each region, at start-up, before any other call. The memory outlives the backend, which must
        also take buffers from elsewhere. Raise `BackendUnavailable` when the medium cannot use such memory at all.
        """

    @abstractmethod
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Whether each key is stored, in the order given."""

    @abstractmethod
    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        """Read each object into its buffer.

        Buffers are writable, page-aligned and at least as large as any object of the tier. The result for a key
        is the number of bytes filled, None when the key is absent, or the exception that prevented reading it.
        """

    @abstractmethod
    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        """Store each object; storing a present key again is allowed and changes nothing a reader can see.

        A reader sees the old object, no object or the new object, never a mixture. The result for a key is None,
        or the exception that prevented storing it (`NoSpace` when evicting something could help).
        """

    @abstractmethod
    def delete(self, keys: Sequence[ChunkKey]) -> None:
        """Forget the keys; absent keys are fine."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every object of this tier, also those that a restart would find."""

    def scan(self) -> Iterator[tuple[ChunkKey, int]] | None:
        """Keys and object sizes present at start-up, coldest first; None when the medium cannot say.

        A backend that can say lets the core keep the tier's index, capacity and eviction in memory.
        """
        return None

    def footprint(self, nbytes: int) -> int:
        """Bytes an object of `nbytes` occupies on the medium, rounding and overhead included."""
        return nbytes

    def usage(self) -> Usage | None:
        """What is stored now, or None when the medium cannot say cheaply."""
        return None

    def stats(self) -> dict[str, Any]:
        """What the backend chose for itself, as text, and counters of its own: plain data, for people."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Release files, sockets and memory; what was stored stays. Idempotent."""


@dataclass(frozen=True, slots=True)
class SerdeContext:
    """What the core tells a serde when it builds it."""

    layout: KVLayout
    """Meaning of the raw bytes of a chunk."""
    chunk_bytes: int
    """Raw bytes of every chunk."""


class SerdeConfig(Frozen, ABC):
    """Base of every serde's own settings; `type` is the plugin's entry-point name."""

    type: str

    @abstractmethod
    def build(self, context: SerdeContext) -> Serde:
        """Make the serde. Raise `Unsupported` when it cannot encode this layout."""


class Serde(ABC):
    """Encodes chunks in a tier's doorway. Stateless after construction and thread-safe."""

    lossless: bool = True
    """Of the class, or of each instance where settings decide."""

    @property
    @abstractmethod
    def codec(self) -> str:
        """Name of the encoding in each object, <= 32 ASCII bytes; changes whenever the meaning of the bytes does."""

    @abstractmethod
    def bound(self) -> int:
        """Most bytes one encoded chunk can take: staging is cut to it at start-up."""

    @abstractmethod
    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        """Encode each chunk into its buffer of `bound()` bytes; return the bytes used.

        `starts`: how many tokens of its sequence precede each chunk, -1 where that is not known. It helps a codec that
        treats the first tokens apart or undoes rotary embeddings; what decoding needs of it belongs into the blob.
        """

    @abstractmethod
    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        """Decode each blob so that it fills its buffer exactly, or raise `CorruptChunk`."""

    def stats(self) -> dict[str, Any]:
        """Counters of its own since start-up, such as what it refused to encode: plain data, for people."""
        return {}


class Ladder(Serde):
    """Several encodings of every chunk, each stored as an object of its own; reading takes the best that is in time.

    What a `SerdeConfig` may build instead of one encoding, for a medium that keeps its own books. As a serde by itself
    it is its last rung.
    """

    def __init__(self, rungs: Sequence[Serde], parts: Sequence[float], target: float) -> None:
        """`rungs`: best and largest first, at least two. `parts`: bytes of each as a part of the raw chunk, about.
        `target`: seconds from the request in which its chunks should be here."""
        self.rungs = tuple(rungs)
        self.parts = tuple(parts)
        self.target = target
        self.lossless = all(rung.lossless for rung in rungs)

    @property
    def codec(self) -> str:
        names = ",".join(rung.codec for rung in self.rungs)
        return f"ladder/{hashlib.sha256(names.encode()).hexdigest()[:16]}"

    def bound(self) -> int:
        return max(rung.bound() for rung in self.rungs)

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        return self.rungs[-1].encode(chunks, out, starts)

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        self.rungs[-1].decode(blobs, out)

    def stats(self) -> dict[str, Any]:
        return {rung.codec: rung.stats() for rung in self.rungs}


class EvictionConfig(Frozen, ABC):
    """Base of every eviction policy's own settings; `type` is the plugin's entry-point name."""

    type: str

    @abstractmethod
    def build(self) -> EvictionPolicy:
        """Make an empty policy."""


class EvictionPolicy(ABC):
    """Orders the keys of one tier by worth. Called with the tier's lock held: no I/O, no waiting.

    Keys arrive in prefix order (shallowest chunk first). A policy must rank a deeper chunk of one request no
    warmer than a shallower one, because a chunk without its prefix can never be used.
    """

    @abstractmethod
    def add(self, keys: Sequence[ChunkKey]) -> None:
        """Take in keys that were just stored."""

    @abstractmethod
    def touch(self, keys: Sequence[ChunkKey]) -> None:
        """Note that keys were just used; unknown keys are ignored."""

    @abstractmethod
    def remove(self, key: ChunkKey) -> None:
        """Forget a key; unknown keys are ignored."""

    def remove_all(self, keys: Sequence[ChunkKey]) -> None:
        """Forget keys, as `remove` does each: every store into a full tier evicts a batch."""
        for key in keys:
            self.remove(key)

    @abstractmethod
    def coldest(self) -> Iterator[ChunkKey]:
        """Keys, coldest first. The caller stops early and does not change the policy while iterating."""
