"""The words of lmcache-core as types: keys, sizes, results and the reasons for misses."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType

ChunkKey = NewType("ChunkKey", bytes)
"""Content address of one chunk: 16 bytes of identity digest, then 16 bytes of the token chain's digest."""

IDENTITY_BYTES = 16
CHAIN_BYTES = 16
KEY_BYTES = IDENTITY_BYTES + CHAIN_BYTES

PAGE = 4096
"""Alignment of arenas, slots and sealed objects in bytes: what O_DIRECT and pinning need."""

HEADER_BYTES = PAGE
"""Size of the header page in front of every sealed object, in bytes."""

COMPUTED = "computed"
"""Source of a chunk that no tier served: the engine computed it. Not a tier's name."""

Got = int | None | Exception
"""Outcome of reading one key: bytes filled, None for absent, or why it could not be read."""

Put = None | Exception
"""Outcome of writing one key: None when stored, or why it was not."""


class MissReason(enum.StrEnum):
    """Why a chunk was not served (or not stored). Every miss has exactly one."""

    NOT_STORED = "not_stored"
    CORRUPT = "corrupt"
    VERSION = "version"
    IDENTITY = "identity"
    LAYOUT = "layout"
    CODEC = "codec"
    DEADLINE = "deadline"
    COST = "cost"
    BREAKER = "breaker"
    BUSY = "busy"
    NO_ROOM = "no_room"
    ERROR = "error"
    RACED = "raced"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a storage backend holds: objects, their bytes, and bytes allocated on the medium."""

    objects: int
    object_bytes: int
    allocated_bytes: int


def round_up(nbytes: int, to: int = PAGE) -> int:
    """Smallest multiple of `to` that is >= `nbytes`."""
    return -(-nbytes // to) * to


def object_bytes(payload_bytes: int) -> int:
    """Bytes of a sealed object with that payload: header page + payload (not padded)."""
    return HEADER_BYTES + payload_bytes
