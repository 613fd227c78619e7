"""A sealed object of the core, encrypted and authenticated:

    offset size  field
         0    8  magic "LMCSEAL" and version 1
         8   16  id of the master key, ASCII, NUL padded
        24   16  salt of the derived key
        40   12  nonce, random
        52   12  zero
        64    n  ciphertext of the whole object, its header page included
      64+n   16  tag (AES-GCM)

The 64 bytes in front and the chunk key the object is stored under are authenticated with it: an object that was
changed, moved to another key, or brought from another tenant does not open.
"""

from __future__ import annotations

import os
import struct

from cryptography.exceptions import InvalidTag

from lmcache_core.errors import CorruptChunk
from lmcache_core.types import IDENTITY_BYTES, ChunkKey, MissReason
from lmcache_wrapper_seal.keys import Keyring

MAGIC = b"LMCSEAL\x01"
_FRONT = struct.Struct("<8s16s16s12s12s")
FRONT_BYTES = _FRONT.size
TAG_BYTES = 16
OVERHEAD = FRONT_BYTES + TAG_BYTES
"""Bytes that sealing adds to an object."""
_ZERO = bytes(12)


def close_into(ring: Keyring, key: ChunkKey, obj: memoryview, room: memoryview) -> memoryview:
    """Encrypt `obj` into `room`; the part of it that was filled, `len(obj) + OVERHEAD` bytes."""
    master, salt, cipher = ring.to_seal(key[:IDENTITY_BYTES])
    nonce = os.urandom(12)
    front = _FRONT.pack(MAGIC, master.encode("ascii"), salt, nonce, _ZERO)
    sealed = room[: len(obj) + OVERHEAD]
    sealed[:FRONT_BYTES] = front
    cipher.encrypt_into(nonce, obj, front + key, sealed[FRONT_BYTES:])
    return sealed


def open_into(ring: Keyring, key: ChunkKey, sealed: memoryview, room: memoryview) -> int:
    """Decrypt `sealed` into `room`; the bytes filled. Raise `CorruptChunk`; then `room` holds nothing of the object."""
    nbytes = len(sealed) - OVERHEAD
    if nbytes < 0 or nbytes > len(room):
        raise CorruptChunk(MissReason.CORRUPT, f"{len(sealed)} bytes are no encrypted object of this tier")
    front = bytes(sealed[:FRONT_BYTES])
    magic, master, salt, nonce, _ = _FRONT.unpack(front)
    if magic != MAGIC:
        raise CorruptChunk(MissReason.CORRUPT, "not an encrypted object, or one of another version")
    name = master.rstrip(b"\0").decode("ascii", "backslashreplace")
    cipher = ring.to_open(name, salt, key[:IDENTITY_BYTES])
    if cipher is None:
        raise CorruptChunk(MissReason.CORRUPT, f"sealed under master key {name!r}, which is not among the keys")
    try:
        cipher.decrypt_into(nonce, sealed[FRONT_BYTES:], front + key, room[:nbytes])
    except InvalidTag:
        room[:nbytes] = bytes(nbytes)
        what = "does not authenticate: changed, moved from another key, or sealed under another master key of this id"
        raise CorruptChunk(MissReason.CORRUPT, what) from None
    return nbytes
