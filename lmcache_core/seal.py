"""Sealed objects: the header page in front of every chunk that leaves memory, and its check on the way back.

Object = header page (4096 bytes, little-endian) + payload. Version 1:

    offset size  field
         0    8  magic  "LMCKV\\r\\n\\x1a"
         8    2  version (1)
        10    2  header length (4096)
        12    4  flags (0; unknown flags are a miss)
        16   32  key: identity digest[:16] + chain digest[:16]
        48   16  layout id
        64   32  codec name, ASCII, NUL padded
        96    8  raw length: bytes of the decoded chunk
       104    8  stored length: bytes of the payload
       112    8  XXH3-64 of the payload
       120    8  creation time, Unix seconds (informative)
       128 3960  zero
      4088    8  XXH3-64 of bytes 0..4087

Nothing is executed, no length is believed before the header's own checksum held, and every mismatch is a
`CorruptChunk` whose reason is a `MissReason`. XXH3: Collet, xxHash specification.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lmcache_core import _native
from lmcache_core.errors import CorruptChunk
from lmcache_core.types import HEADER_BYTES, ChunkKey, MissReason

MAGIC = b"LMCKV\r\n\x1a"
VERSION = 1
RAW_CODEC = "raw/1"
_FIELDS = struct.Struct("<8sHHI32s16s32sQQQQ")
_ZERO = bytes(HEADER_BYTES - 8 - _FIELDS.size)
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Header:
    """A verified header."""

    key: ChunkKey
    layout_id: bytes
    codec: str
    raw_bytes: int
    stored_bytes: int
    payload_xxh3: int
    created: int


def seal(
    obj: memoryview, key: ChunkKey, layout_id: bytes, codec: str, raw_bytes: int, stored_bytes: int, created: int
) -> None:
    """Write the header of `obj` (header page + payload of `stored_bytes`) in place.

    `created` is given, not read from the clock, so that sealing one slot twice at once writes the same bytes.
    """
    checksum = _native.xxh3_64(obj[HEADER_BYTES : HEADER_BYTES + stored_bytes])
    name = codec.encode("ascii")
    if len(name) > 32:
        raise ValueError(f"codec name {codec!r} is longer than 32 bytes")
    head = _FIELDS.pack(
        MAGIC, VERSION, HEADER_BYTES, 0, key, layout_id, name, raw_bytes, stored_bytes, checksum, created
    )
    page = head + _ZERO
    obj[: HEADER_BYTES - 8] = page
    obj[HEADER_BYTES - 8 : HEADER_BYTES] = _CHECK.pack(_native.xxh3_64(page))


def read_header(obj: memoryview) -> Header:
    """Parse and verify the header page alone. Raise `CorruptChunk`."""
    if len(obj) < HEADER_BYTES:
        raise CorruptChunk(MissReason.CORRUPT, f"{len(obj)} bytes, shorter than a header")
    magic, version, header, flags, key, layout, codec, raw, stored, checksum, created = _FIELDS.unpack_from(obj)
    if magic != MAGIC:
        raise CorruptChunk(MissReason.CORRUPT, "bad magic")
    if _CHECK.unpack_from(obj, HEADER_BYTES - 8)[0] != _native.xxh3_64(obj[: HEADER_BYTES - 8]):
        raise CorruptChunk(MissReason.CORRUPT, "header checksum")
    if version != VERSION or header != HEADER_BYTES or flags:
        raise CorruptChunk(MissReason.VERSION, f"format version {version}, flags {flags:#x}")
    try:
        name = codec.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        raise CorruptChunk(MissReason.CODEC, "codec name is not ASCII") from None
    return Header(ChunkKey(key), layout, name, raw, stored, checksum, created)


def unseal(obj: memoryview, key: ChunkKey, layout_id: bytes, codec: str, raw_bytes: int) -> Header:
    """Verify that `obj` is exactly the object expected: key, identity, layout, codec, lengths, checksums.

    `obj` holds the bytes that were read, neither more nor less. Raise `CorruptChunk` with the first difference.
    """
    head = read_header(obj)
    if head.key != key:
        half = len(key) // 2
        reason = MissReason.IDENTITY if head.key[:half] != key[:half] else MissReason.CORRUPT
        raise CorruptChunk(reason, "the object belongs to another key")
    if head.layout_id != layout_id:
        raise CorruptChunk(MissReason.LAYOUT, "another layout")
    if head.codec != codec:
        raise CorruptChunk(MissReason.CODEC, f"codec {head.codec!r}, expected {codec!r}")
    if head.raw_bytes != raw_bytes or head.stored_bytes != len(obj) - HEADER_BYTES:
        raise CorruptChunk(
            MissReason.CORRUPT,
            f"lengths {head.raw_bytes}/{head.stored_bytes}, expected {raw_bytes}/{len(obj) - HEADER_BYTES}",
        )
    if _native.xxh3_64(obj[HEADER_BYTES:]) != head.payload_xxh3:
        raise CorruptChunk(MissReason.CORRUPT, "payload checksum")
    return head
