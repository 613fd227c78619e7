"""Serde `zstd`: lossless, byte planes compressed apart.

The first byte of a little-endian float is mantissa noise, the last is sign and exponent and compresses well: each
`SEGMENT` of a chunk is split into byte planes, and every plane is one Zstandard frame (RFC 8878) or, where that would
save next to nothing, the plane itself. A blob is

    uint32 little-endian per (segment, plane): stored bytes; bit 31 set when the plane is stored as it is
    the stored planes, one after the other

How many there are, and how long each is when decoded, follows from the layout alone, so no length found in a blob is
ever used to allocate, and a frame that declares or produces anything else is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import zstandard
from pydantic import Field

from lmcache_core import _native
from lmcache_core.errors import CorruptChunk
from lmcache_core.hookspecs import hookimpl
from lmcache_core.layout import DTYPE_BYTES
from lmcache_core.protocols import Serde, SerdeConfig, SerdeContext
from lmcache_core.types import MissReason

SEGMENT = 1 << 20
"""Bytes of a chunk that are split and compressed together: fits a core's own cache, and 8 blocks of Zstandard."""
_STORED = 1 << 31


class _Tools(threading.local):
    """One thread's compressor, decompressor and room for the planes of one segment."""

    def __init__(self, parameters: zstandard.ZstdCompressionParameters) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=SEGMENT)
        self.planes = np.empty(SEGMENT, np.uint8).data.cast("B")


class Zstd(Serde):
    """See the module. Stateless between calls; tools are kept per thread."""

    def __init__(self, context: SerdeContext, level: int, planes: bool) -> None:
        item = DTYPE_BYTES[context.layout.dtype]
        self._planes = item if planes and item in (2, 4) and context.chunk_bytes % item == 0 else 1
        self._bytes = context.chunk_bytes
        segments = -(-self._bytes // SEGMENT)
        self._table = np.dtype(("<u4", (segments, self._planes)))
        # Bytes of one plane repeat by chance only: looking for long matches in a tiny table leaves them to the entropy
        # coder, three times as fast as plain level 1 and smaller (bfloat16 exponents: 2.83 against 2.66).
        entropy = {"strategy": zstandard.STRATEGY_FAST, "min_match": 7, "hash_log": 6, "window_log": 17}
        tuned = entropy if level == 1 and (self._planes > 1 or item == 1) else {}
        self._tools = _Tools(zstandard.ZstdCompressionParameters.from_level(level, write_content_size=True, **tuned))

    @property
    def codec(self) -> str:
        return f"zstd/1/planes{self._planes}"

    def bound(self) -> int:
        return self._table.itemsize + self._bytes

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        return [self._encode(chunk.cast("B"), room) for chunk, room in zip(chunks, out, strict=True)]

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        for blob, room in zip(blobs, out, strict=True):
            try:
                self._decode(blob, room)
            except zstandard.ZstdError as error:
                raise CorruptChunk(MissReason.CORRUPT, f"zstd: {error}") from None

    def _encode(self, chunk: memoryview, out: memoryview) -> int:
        if len(chunk) != self._bytes:
            raise ValueError(f"a chunk of {len(chunk)} bytes, expected {self._bytes}")
        tools = self._tools
        table = np.empty(1, self._table)[0]
        at = self._table.itemsize
        for segment in range(len(table)):
            raw = chunk[segment * SEGMENT : (segment + 1) * SEGMENT]
            planes, size = raw, len(raw) // self._planes
            if self._planes > 1:
                planes = tools.planes[: len(raw)]
                _native.split_planes(raw, planes, self._planes)
            for plane in range(self._planes):
                data = planes[plane * size : (plane + 1) * size]
                packed = tools.compressor.compress(data)
                stored: bytes | memoryview = packed if len(packed) < size else data
                out[at : at + len(stored)] = stored
                table[segment, plane] = len(stored) | (0 if stored is packed else _STORED)
                at += len(stored)
        out[: self._table.itemsize] = table.tobytes()
        return at

    def _decode(self, blob: memoryview, out: memoryview) -> None:
        if len(out) != self._bytes:
            raise ValueError(f"room of {len(out)} bytes for a chunk of {self._bytes}")
        if len(blob) < self._table.itemsize:
            raise CorruptChunk(MissReason.CORRUPT, f"zstd: {len(blob)} bytes, shorter than the table of lengths")
        table = np.frombuffer(blob, self._table, 1)[0]
        lengths = (table & (_STORED - 1)).astype(np.int64)
        if self._table.itemsize + int(lengths.sum()) != len(blob):
            raise CorruptChunk(MissReason.CORRUPT, f"zstd: lengths do not add up to {len(blob)} bytes")
        tools = self._tools
        at = self._table.itemsize
        for segment in range(len(table)):
            raw = out[segment * SEGMENT : (segment + 1) * SEGMENT]
            planes, size = raw, len(raw) // self._planes
            if self._planes > 1:
                planes = tools.planes[: len(raw)]
            for plane in range(self._planes):
                stored = blob[at : at + int(lengths[segment, plane])]
                room = planes[plane * size : (plane + 1) * size]
                if not table[segment, plane] & _STORED:
                    _decompress(tools.decompressor, stored, room)
                elif len(stored) == size:
                    room[:] = stored
                else:
                    raise CorruptChunk(MissReason.CORRUPT, f"zstd: {len(stored)} bytes stored for a plane of {size}")
                at += len(stored)
            if self._planes > 1:
                _native.join_planes(planes, raw, self._planes)


def _decompress(decompressor: zstandard.ZstdDecompressor, frame: memoryview, room: memoryview) -> None:
    """Decode exactly one frame so that it fills `room` exactly. Raise `CorruptChunk` or `ZstdError`."""
    # The frame must declare the size we expect and is then read into room of that size: neither limit alone holds
    # against a crafted frame (the library trusts a declared size, and an undeclared one is unbounded).
    if zstandard.frame_content_size(frame) != len(room):
        raise CorruptChunk(MissReason.CORRUPT, f"zstd: a frame does not declare the {len(room)} bytes of its plane")
    with decompressor.stream_reader(frame, read_across_frames=True) as reader:
        filled = 0
        while filled < len(room) and (got := reader.readinto(room[filled:])):
            filled += got
        if filled != len(room) or reader.read(1):
            raise CorruptChunk(MissReason.CORRUPT, f"zstd: a frame does not hold the {len(room)} bytes of its plane")


class ZstdConfig(SerdeConfig):
    """Lossless compression for slow media: about 1.45x on bfloat16 KV at 0.7-1 GB/s and core."""

    type: Literal["zstd"] = "zstd"
    level: Annotated[int, Field(ge=1, le=19)] = 1
    """Zstandard's level; above 1 is slower and, on KV, no smaller."""
    planes: bool = True
    """Split elements of 2 or 4 bytes into byte planes first."""

    def build(self, context: SerdeContext) -> Zstd:
        return Zstd(context, self.level, self.planes)


@hookimpl
def lmcache_serdes() -> list[type[SerdeConfig]]:
    return [ZstdConfig]
