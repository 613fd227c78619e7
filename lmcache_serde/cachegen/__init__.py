"""Serde `cachegen`: the codec of docs/codec.md as a plugin, one level or several for a medium whose speed changes.

`lossless` is for every tier; the other levels are lossy and need `lossy: true` in theirs. Chunks whose bytes are an
engine's own pages are put into canonical order first, where the packing is one that `PageGeometry` knows.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lmcache_core import _native
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.errors import CorruptChunk, Unsupported
from lmcache_core.hookspecs import hookimpl
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import Ladder, Serde, SerdeConfig, SerdeContext
from lmcache_core.types import MissReason
from lmcache_core.units import Seconds
from lmcache_serde.cachegen import format as bits
from lmcache_serde.cachegen import native
from lmcache_serde.cachegen.profile import Profile

Level = Literal["lossless", "near", "high", "balanced", "small", "tiny"]

LEVELS: Final[dict[Level, tuple[int, int, float]]] = {
    "lossless": (0, 0, 1.5),
    "near": (-65, -54, 2.8),
    "high": (-42, -30, 3.8),
    "balanced": (-28, -13, 5.0),
    "small": (-13, 6, 7.2),
    "tiny": (-4, 14, 9.0),
}
"""For K (and MLA latents) and for V: log2, in 1/16, of the quantiser's step over the root mean square that it is chosen
by (docs/codec.md); and how many times smaller than bfloat16 a chunk of 256 tokens becomes, about."""

SINK_TOKENS: Final = 2
"""Tokens at the start of a sequence that are kept exactly: attention leans on them far more than on any other."""


def coding(level: Level, shape: bits.Shape, n_raw: int = bits.AUTO) -> bits.Coding:
    """How chunks of `shape` are coded at a level."""
    if level == "lossless":
        modes, offsets = [bits.LOSSLESS] * shape.planes, [0] * shape.planes
    else:
        modes, offsets = [bits.ANCHORED, bits.PER_TOKEN][: shape.planes], [*LEVELS[level][:2]][: shape.planes]
    return bits.Coding(
        level=list(LEVELS).index(level),
        modes=np.tile(np.array(modes, np.uint8), shape.layers),
        offsets=np.tile(np.array(offsets, np.int16), shape.layers),
        n_raw=0 if level == "lossless" else n_raw,
    )


_PLAIN: Final = ("bfloat16", "float16", "float32")


class _Pages:
    """Between an engine's pages and canonical order, for chunks that lie one after the other in host memory."""

    def __init__(self, layout: KVLayout) -> None:
        canonical = replace(layout, order="lknhd", packing="", page_bytes=0)
        if canonical.chunk_bytes != layout.chunk_bytes:
            raise Unsupported(f"cachegen: pages of {layout.page_bytes} bytes are padded; it has no place for padding")
        self._geometry = _known_packing(layout, canonical)
        self._stride = layout.blocks * layout.block_bytes
        self._blocks = np.arange(layout.blocks, dtype=np.int64)
        self._layers = np.arange(layout.num_layers, dtype=np.int64)

    def unpack(self, chunk: memoryview, canonical: NDArray[np.uint8]) -> NDArray[np.uint8]:
        self._of(chunk).gather(self._blocks, [_native.address_of(canonical)])
        return canonical

    def pack(self, canonical: NDArray[np.uint8], chunk: memoryview) -> None:
        self._of(chunk).scatter(self._blocks, [_native.address_of(canonical)])

    def _of(self, chunk: memoryview) -> PagedKV:
        bases = _native.address_of(chunk) + self._layers * self._stride
        return PagedKV(bases, self._geometry, self._blocks.size, owner=chunk)


def _known_packing(layout: KVLayout, canonical: KVLayout) -> PageGeometry:
    """The geometry of pages packed as `layout.packing` says. Raise `Unsupported` when that is not known for certain."""
    engine, _, rest = layout.packing.partition("/")
    kind, _, fingerprint = rest.rpartition("/")
    isa = kind.rpartition("/")[2]
    try:
        if engine != "vllm-cpu":
            raise ValueError("only the pages of vLLM on CPU are known")
        if _fingerprint(layout, _geometry(replace(canonical, num_layers=1, chunk_tokens=layout.block_tokens), isa)) != (
            fingerprint
        ):
            raise ValueError("this version of the engine packs its pages in another way")
        return _geometry(canonical, isa)
    except ValueError as error:
        raise Unsupported(
            f"cachegen must know which bytes are K and V, and pages packed as {layout.packing!r} are opaque: {error}; "
            "use serde zstd"
        ) from error


def _geometry(canonical: KVLayout, isa: str) -> PageGeometry:
    mla = isa.startswith("mla.")
    return PageGeometry.nhd(canonical) if mla else PageGeometry.vllm_cpu(canonical, isa)


def _fingerprint(layout: KVLayout, page: PageGeometry) -> str:
    """What the vLLM adapter would have found, had the engine packed its pattern in this way (`_cpu_packing` there)."""
    values = layout.planes * layout.block_tokens * layout.kv_heads * layout.head_dim
    pattern = ((np.arange(values, dtype=np.int64) * 7919 % 509 - 254) / 2).astype(np.float32)
    if layout.dtype == "bfloat16":
        raw = (pattern.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    elif layout.dtype in ("float16", "float32"):
        raw = pattern.astype(layout.dtype).view(np.uint8)
    else:
        raise ValueError(f"pages of {layout.dtype} are not known")
    packed = np.zeros_like(raw)
    PagedKV([_native.address_of(packed)], page, 1, owner=packed).scatter([0], [_native.address_of(raw)])
    return hashlib.sha256(packed.tobytes()).hexdigest()[:8]


class CacheGen(Serde):
    """Chunks of one layout at one level, perhaps with a profile. Thread-safe; coding runs without the GIL.

    A chunk whose position is not known is encoded without the profile.
    """

    def __init__(self, layout: KVLayout, level: Level, profile: Profile | None = None) -> None:
        try:
            self.shape = bits.Shape(
                layout.dtype, layout.num_layers, layout.planes, layout.chunk_tokens, layout.kv_heads * layout.head_dim
            )
        except ValueError as error:
            raise Unsupported(f"cachegen: {error}") from error
        self.level = level
        self.lossless = level == "lossless"
        if profile is not None:
            self._check_profile(profile, layout)
        self._profile = profile
        self._pages = _Pages(layout) if layout.order == "pages" else None
        self._codings = {n: coding(level, self.shape, n) for n in (bits.AUTO, 0, SINK_TOKENS)}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._refused = 0

    @property
    def codec(self) -> str:
        name = f"cachegen/{bits.VERSION}/{self.level}"
        return name if self._profile is None else f"{name}/{self._profile.id}"

    @property
    def refused_rows(self) -> int:
        """Planes of layers that were kept as they are so far, because the level's error bound could not be held (or
        nothing would have been saved)."""
        return self._refused

    def stats(self) -> dict[str, int]:
        return {"refused_rows": self.refused_rows}

    def bound(self) -> int:
        return self.shape.bound if self._profile is None else self.shape.bound + bits.AUX

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        for chunk in chunks:
            if chunk.nbytes != self.shape.nbytes:
                raise ValueError(f"a chunk of {chunk.nbytes} bytes, expected {self.shape.nbytes}")
        sizes = [0] * len(chunks)
        sinks = [bits.AUTO if start < 0 else 0 if start else SINK_TOKENS for start in starts]
        for sink in set(sinks):
            which = [i for i, found in enumerate(sinks) if found == sink]
            for batch in [which] if self._pages is None else [[i] for i in which]:
                sources: list[_native.Buffer] = [chunks[i] for i in batch]
                if self._pages is not None:
                    sources = [self._pages.unpack(chunks[batch[0]], self._scratch())]
                rooms, where = [out[i] for i in batch], [starts[i] for i in batch]
                found, refused = native.encode(self.shape, self._codings[sink], sources, rooms, self._profile, where)
                for i, size in zip(batch, found, strict=True):
                    sizes[i] = size
                if any(refused):
                    with self._lock:
                        self._refused += sum(refused)
        return sizes

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        for room in out:
            if room.nbytes != self.shape.nbytes:
                raise ValueError(f"room of {room.nbytes} bytes for a chunk of {self.shape.nbytes}")
        try:
            if self._pages is None:
                native.decode(self.shape, blobs, out, profile=self._profile)
                return
            for blob, room in zip(blobs, out, strict=True):
                values = self._scratch()
                native.decode(self.shape, [blob], [values], profile=self._profile)
                self._pages.pack(values, room)
        except bits.CodecError as error:
            raise CorruptChunk(MissReason.CORRUPT, f"cachegen: {error}") from None

    def _scratch(self) -> NDArray[np.uint8]:
        """This thread's room for a chunk in canonical order."""
        found: NDArray[np.uint8] | None = getattr(self._local, "room", None)
        if found is None:
            found = self._local.room = np.empty(self.shape.nbytes, np.uint8)
        return found

    def _check_profile(self, profile: Profile, layout: KVLayout) -> None:
        layers, planes, *_ = profile.basis.shape
        channels = profile.mean.shape[1]
        shape = self.shape
        if (shape.layers, shape.planes, shape.channels, layout.kv_heads) != (layers, planes, channels, profile.heads):
            raise Unsupported(
                f"cachegen: the profile is for {layers} layers of {profile.heads} heads and {channels} channels, this "
                f"model has {shape.layers}, {layout.kv_heads} and {shape.channels}: calibrate this model"
            )
        if self.lossless or layout.dtype not in _PLAIN:
            raise Unsupported(f"cachegen: a profile is for lossy levels of {', '.join(_PLAIN)}")


class CacheGenConfig(SerdeConfig):
    """The KV codec: 1.5 times smaller without loss, 2.8 to 9 times smaller with a loss that is measured and bounded."""

    type: Literal["cachegen"] = "cachegen"
    level: Level | Literal["adaptive"] = "balanced"
    """How much is lost: nothing (`lossless`), or in steps to `tiny`; `adaptive` stores every chunk at each of `levels`
    and reads the best one that is in time."""
    levels: Annotated[tuple[Level, ...], Field(min_length=2, max_length=4)] = ("high", "balanced", "tiny")
    """For `adaptive`: the levels to store, best first."""
    target: Annotated[Seconds, Field(gt=0, le=3600)] = 1.0
    """For `adaptive`: the time from a request in which all its chunks should have been read."""

    profile: Path | None = None
    """File that `lmcachectl codec calibrate` made for this model: a sixth smaller still, at a quarter of the speed."""

    def build(self, context: SerdeContext) -> Serde:
        if self.level != "adaptive":
            return self._serde(context.layout, self.level)
        order = list(LEVELS)
        places = [order.index(level) for level in self.levels]
        if places != sorted(set(places)):
            raise Unsupported(f"cachegen: levels {', '.join(self.levels)} must differ and be in the order of {order}")
        rungs = [self._serde(context.layout, level) for level in self.levels]
        return Ladder(rungs, [1 / LEVELS[level][2] for level in self.levels], self.target)

    def _serde(self, layout: KVLayout, level: Level) -> CacheGen:
        if self.profile is None:
            return CacheGen(layout, level)
        try:
            return CacheGen(layout, level, Profile.load(self.profile))
        except ValueError as error:
            raise Unsupported(f"cachegen: {error}") from error


@hookimpl
def lmcache_serdes() -> list[type[SerdeConfig]]:
    return [CacheGenConfig]
