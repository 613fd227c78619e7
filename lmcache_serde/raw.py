"""Serde `raw`: the chunk as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lmcache_core.errors import CorruptChunk
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import Serde, SerdeConfig, SerdeContext
from lmcache_core.seal import RAW_CODEC
from lmcache_core.types import MissReason


class Raw(Serde):
    """Copies. The core stores raw chunks straight from their slots and never calls this; a plugin may wrap it."""

    def __init__(self, context: SerdeContext) -> None:
        self._bytes = context.chunk_bytes

    @property
    def codec(self) -> str:
        return RAW_CODEC

    def bound(self) -> int:
        return self._bytes

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        for chunk, room in zip(chunks, out, strict=True):
            room[: self._bytes] = chunk
        return [self._bytes] * len(chunks)

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        for blob, room in zip(blobs, out, strict=True):
            if len(blob) != len(room):
                raise CorruptChunk(MissReason.CORRUPT, f"{len(blob)} raw bytes for a chunk of {len(room)}")
            room[:] = blob


class RawConfig(SerdeConfig):
    """No encoding."""

    type: Literal["raw"] = "raw"

    def build(self, context: SerdeContext) -> Raw:
        return Raw(context)


@hookimpl
def lmcache_serdes() -> list[type[SerdeConfig]]:
    return [RawConfig]
