"""How an object lies in Redis: one value for its head and first piece, one for each further piece.

    <prefix>o:{<key, hex>}                          head, then the first piece
    <prefix>p:{<key, hex>}:<generation, hex>:<n>    piece n, 1 and up

All carry the key as hash tag, so that a cluster keeps them on one node. The head is written last, and names the random
generation of its pieces: pieces of two writes can never be taken for one object, and pieces without a head are nothing.
Pieces have the size at which Redis is fastest: values of 8 MiB move at a tenth of the speed of 1 MiB ones.

Head (64 bytes, little-endian):

    offset size  field
         0    8  magic  "LMCRED\\x01\\n"
         8    8  generation, random for every write
        16    8  bytes of the object
        24    8  bytes of the first piece, which follows
        32    8  bytes of every further piece but the last
        40   16  zero
        56    8  XXH3-64 of bytes 0..55
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from lmcache_core import _native
from lmcache_core.errors import CorruptChunk
from lmcache_core.types import KEY_BYTES, ChunkKey, MissReason

MAGIC = b"LMCRED\x01\n"
HEAD_BYTES = 64
MOST_PIECES = 1 << 16
GENERATION_BYTES = 8
_OVERHEAD = 64
"""Room for what a server allocates with a value. Its allocator rounds 1 MiB and a byte up to 1.25 MiB."""
_FIELDS = struct.Struct("<8s8sQQQ16x")
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Head:
    """What the first value says about an object."""

    generation: bytes
    nbytes: int
    first: int
    """Bytes of the object that stand in the first value, after the head."""
    piece: int

    @classmethod
    def plan(cls, generation: bytes, nbytes: int, part_bytes: int) -> Head:
        """Values that take `part_bytes` each, what a server keeps beside them included; the last one takes the rest."""
        piece = max(part_bytes - min(_OVERHEAD, part_bytes // 2), -(-nbytes // (MOST_PIECES - 1)), 1)
        return cls(generation, nbytes, min(max(1, piece - HEAD_BYTES), nbytes), piece)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Head:
        """Raise `CorruptChunk` unless `data` is a whole, undamaged head."""
        if len(data) != HEAD_BYTES:
            raise CorruptChunk(MissReason.CORRUPT, f"a head of {len(data)} bytes in Redis")
        if _CHECK.unpack_from(data, _FIELDS.size)[0] != _native.xxh3_64(bytes(data[: _FIELDS.size])):
            raise CorruptChunk(MissReason.CORRUPT, "damaged head in Redis")
        magic, generation, nbytes, first, piece = _FIELDS.unpack_from(data)
        if magic != MAGIC:
            raise CorruptChunk(MissReason.VERSION, "another format in Redis")
        head = cls(generation, nbytes, first, piece)
        # The names of the pieces are made before any is read: a head may not ask for a list that fills memory.
        if not piece > 0 or first > nbytes or head.count > MOST_PIECES:
            raise CorruptChunk(MissReason.CORRUPT, "sizes in the head in Redis")
        return head

    def pack(self) -> bytes:
        """The 64 bytes."""
        fields = _FIELDS.pack(MAGIC, self.generation, self.nbytes, self.first, self.piece)
        return fields + _CHECK.pack(_native.xxh3_64(fields))

    @property
    def count(self) -> int:
        """Pieces after the first."""
        return -(-(self.nbytes - self.first) // self.piece)

    def span(self, number: int) -> slice:
        """Where piece `number` lies in the object; 0 is the first."""
        if number == 0:
            return slice(0, self.first)
        start = self.first + (number - 1) * self.piece
        return slice(start, min(start + self.piece, self.nbytes))


class Names:
    """Names of values under one prefix."""

    def __init__(self, prefix: str) -> None:
        self.everything = prefix.encode()
        self.heads = self.everything + b"o:{"
        """What the name of every head begins with."""
        self._pieces = self.everything + b"p:{"

        self._ask = b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b" % (len(self.heads) + 2 * KEY_BYTES + 1, self.heads)

    def exists(self, keys: Iterable[ChunkKey]) -> bytes:
        """The commands that ask whether each key is stored."""
        ask = self._ask
        return b"".join([b"%b%b}\r\n" % (ask, key.hex().encode()) for key in keys])

    def head(self, key: ChunkKey) -> bytes:
        return b"%b%b}" % (self.heads, key.hex().encode())

    def pieces(self, key: ChunkKey, head: Head) -> list[bytes]:
        """Names of the pieces after the first."""
        start = b"%b%b}:%b:" % (self._pieces, key.hex().encode(), head.generation.hex().encode())
        return [b"%b%d" % (start, number) for number in range(1, head.count + 1)]

    def key(self, name: bytes) -> ChunkKey | None:
        """The key a head's name stands for; None for any other name."""
        size = len(self.heads) + 2 * KEY_BYTES
        if len(name) != size + 1 or not name.startswith(self.heads) or name[-1:] != b"}":
            return None
        try:
            return ChunkKey(bytes.fromhex(name[len(self.heads) : size].decode("ascii")))
        except ValueError:
            return None
