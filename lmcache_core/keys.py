"""Tokens -> keys: a SHA-256 chain over token chunks, seeded with the identity digest.

    state_0 = SHA-256(identity digest)
    state_i = SHA-256(state_{i-1} || extra_i || tokens_i as int32 little-endian)
    key_i   = identity digest[:16] || state_i[:16]

A key therefore names a chunk together with its whole prefix and its identity, is equal on every machine, and
contains no prompt text. `extra_i` is empty, or a length-framed digest of what the token ids do not say
(multimodal content). Truncation to 128 bits keeps the collision bound of the birthday problem at 2^64 chunks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_core import _native
from lmcache_core.identity import Identity
from lmcache_core.types import CHAIN_BYTES, IDENTITY_BYTES, ChunkKey

if TYPE_CHECKING:
    from numpy.typing import NDArray

Tokens = Sequence[int] | Any
"""Token ids: a list, tuple, NumPy array, torch tensor or any buffer of integers."""


def as_int32(tokens: Tokens) -> NDArray[np.int32]:
    """Token ids as a contiguous int32 array, without a copy where possible.

    Raise `ValueError` for ids that are negative, do not fit or are not integers: a wrapped or rounded id would name
    another prompt.
    """
    given: Any = tokens
    if isinstance(given, np.ndarray):
        ids = given
    elif isinstance(given, (list, tuple)):
        ids = _from_integers(given)
    elif hasattr(given, "numpy"):
        ids = given.detach().cpu().numpy()
    else:
        try:
            ids = np.asarray(memoryview(given))
        except TypeError:
            ids = _from_integers(given)
    if ids.ndim != 1:
        raise ValueError(f"token ids must be one-dimensional, not of shape {ids.shape}")
    if ids.size:
        if ids.dtype.kind not in "iu":
            raise ValueError(f"token ids must be integers, not {ids.dtype}")
        if ids.dtype != np.int32:
            if int(ids.max()) >= 2**31 or int(ids.min()) < 0:
                raise ValueError("token ids must be in [0, 2**31)")
            ids = ids.astype(np.int32)
        elif int(ids.min()) < 0:
            raise ValueError("token ids must be in [0, 2**31)")
    return np.ascontiguousarray(ids, dtype=np.int32)


def _from_integers(tokens: Iterable[int]) -> NDArray[np.int32]:
    # array("I") converts Python integers 5x faster than NumPy, most of all from a list in one piece, and refuses floats
    # and negative ones instead of rounding and wrapping them. Ids that need the 32nd bit come out negative, for the
    # caller to refuse.
    ids = array("I")
    try:
        ids.fromlist(tokens if isinstance(tokens, list) else list(tokens))
        return np.asarray(ids).view(np.int32)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers in [0, 2**31): {error}") from None


class TokenChain:
    """The keys of one growing sequence. Feed tokens as they come; only whole chunks become keys."""

    __slots__ = ("_prefix", "_state", "chunk_tokens", "keys")

    def __init__(self, identity: Identity) -> None:
        digest = identity.digest
        self._prefix = digest[:IDENTITY_BYTES]
        self._state = hashlib.sha256(digest).digest()
        self.chunk_tokens = identity.layout.chunk_tokens
        self.keys: list[ChunkKey] = []
        """Keys of all whole chunks so far, in prefix order."""

    def extend(self, tokens: Tokens) -> list[ChunkKey]:
        """Hash the whole chunks of `tokens`, the sequence from token `len(self.keys) * chunk_tokens` on.

        Return the new keys; a trailing partial chunk is ignored and must be passed again.
        """
        ids = as_int32(tokens)
        count = ids.size // self.chunk_tokens
        if count == 0:
            return []
        digests = _native.sha256_chain(self._state, ids[: count * self.chunk_tokens], self.chunk_tokens)
        self._state = digests[-32:]
        prefix = self._prefix
        new = [ChunkKey(prefix + digests[i : i + CHAIN_BYTES]) for i in range(0, 32 * count, 32)]
        self.keys += new
        return new

    def extend_with(self, tokens: Tokens, extra: bytes) -> ChunkKey:
        """Hash exactly one chunk together with `extra`, what its token ids do not say."""
        ids = as_int32(tokens)
        if ids.size != self.chunk_tokens:
            raise ValueError(f"one chunk is {self.chunk_tokens} tokens, got {ids.size}")
        framed = b"x" + hashlib.sha256(extra).digest() if extra else b""
        self._state = hashlib.sha256(self._state + framed + ids.tobytes()).digest()
        key = ChunkKey(self._prefix + self._state[:CHAIN_BYTES])
        self.keys.append(key)
        return key


def chunk_keys(identity: Identity, tokens: Tokens) -> list[ChunkKey]:
    """Keys of all whole chunks of `tokens`, in prefix order."""
    return TokenChain(identity).extend(tokens)
