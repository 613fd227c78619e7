"""One injective encoding for everything that is hashed into a name.

Every value is written as a type tag, a length and its bytes, so no two different values share an encoding
whatever characters they contain (`a/b` vs `a-SEP-b`, empty vs absent, NFC vs NFD). Hashed with SHA-256
(FIPS 180-4); Python's `hash()` is never used, so every process on every machine gets the same digest.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping

Canonical = None | bool | int | str | bytes | tuple["Canonical", ...] | Mapping[str, "Canonical"]


def encode(value: Canonical) -> bytes:
    """Encode `value` injectively. Raise `TypeError` for anything that has no canonical form (floats, objects)."""
    if value is None:
        return b"n\0\0\0\0\0\0\0\0"
    if isinstance(value, bool):
        return _tagged(b"t", b"\1" if value else b"\0")
    if isinstance(value, int):
        return _tagged(b"i", str(value).encode("ascii"))
    if isinstance(value, str):
        return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _tagged(b"b", value)
    if isinstance(value, tuple):
        return _tagged(b"l", _join(encode(item) for item in value))
    if isinstance(value, Mapping):
        return _tagged(b"m", _join(encode(key) + encode(value[key]) for key in sorted(value)))
    raise TypeError(
        f"{value!r} of type {type(value).__name__} has no canonical encoding; write it as int, str or bytes"
    )


def digest(value: Canonical) -> bytes:
    """SHA-256 of the canonical encoding, 32 bytes."""
    return hashlib.sha256(encode(value)).digest()


def _tagged(tag: bytes, body: bytes) -> bytes:
    return tag + struct.pack("<Q", len(body)) + body


def _join(parts: Iterable[bytes]) -> bytes:
    return b"".join(parts)
