"""A calibrated profile: for each layer of one model, a basis in which its K and V take fewer bits.

The rotary embedding of K is undone and the model's mean taken off; then K and V are turned into the principal
components of the model's own KV (as KVTC does, arXiv 2511.01815) and those are what the codec encodes, as float32. Bits
saved: neighbouring channels and heads say much of the same. Components are taken over as many whole heads as fit
`BLOCK` channels.

What decoding computes is exact in float64 whatever the order of sums: components are first rounded to fixed point, the
basis is of 8-bit integers, the encoder uses its inverse. A profile stays valid for any KV of its geometry: for another
model's it merely saves nothing.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

BLOCK: Final = 256
"""Most channels that are transformed together, unless one head is larger."""
_FIXED: Final = 20
"""Bits to which components are rounded, below the largest of their row."""
_KINDS: Final = ("<u8", "<f4", "|i1", "<f4")
_MAGIC: Final = b"cachegen profile 1"
_MOST: Final = 1 << 30
"""Most numbers of a basis that a file may speak of."""


@dataclass(frozen=True, eq=False)
class Profile:
    """See the module. Immutable and thread-safe."""

    heads: int
    turns: NDArray[np.uint64]
    """`[pairs]`: of each rotary pair (dims i and i + pairs of a head), 2^64 times the turns that one token adds."""
    mean: Floats
    """`[layers, channels]`: mean of K without its rotary embedding."""
    basis: NDArray[np.int8]
    """`[layers, 2, blocks, block, block]`: for K and V, values = components @ basis * scale."""
    scale: Floats
    """`[layers, 2, blocks]`."""

    def __post_init__(self) -> None:
        layers, planes, blocks, rows, columns = self.basis.shape if self.basis.ndim == 5 else (0,) * 5
        channels = blocks * rows
        shapes = (self.mean.shape, self.scale.shape) == ((layers, channels), (layers, 2, blocks))
        types = tuple(array.dtype.str for array in self._arrays) == _KINDS
        if not (shapes and types and layers and planes == 2 and rows == columns and self.turns.ndim == 1):
            raise ValueError("its arrays do not fit each other")
        if self.heads < 1 or channels % self.heads or 2 * self.turns.size > channels // self.heads:
            raise ValueError(f"{self.heads} heads and {self.turns.size} rotary pairs do not fit {channels} channels")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError("its numbers are not finite")
        self._inverse  # a basis that has none is refused here  # noqa: B018

    @cached_property
    def _inverse(self) -> Floats:
        try:
            found = np.linalg.inv(self.basis * self.scale[..., None, None].astype(np.float64))
        except np.linalg.LinAlgError as error:
            raise ValueError("a basis has no inverse") from error
        return found.astype(np.float32)

    @cached_property
    def id(self) -> str:
        """Fingerprint of everything in it, 8 hexadecimal digits."""
        digest = hashlib.sha256(f"{self.heads}".encode())
        for array in self._arrays:
            digest.update(f"{array.shape};".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:8]

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile. Raise `ValueError`, with the path, when the file is none."""
        try:
            first, head, body = path.read_bytes().split(b"\n", 2)
            if first != _MAGIC:
                raise ValueError(f"it begins with {first[:20]!r}")
            heads, pairs, layers, blocks, block = (int(number) for number in head.split())
            if min(heads, layers, blocks, block) < 1 or pairs < 0 or layers * blocks * block**2 > _MOST:
                raise ValueError("its sizes make no sense")
            shapes = ((pairs,), (layers, blocks * block), (layers, 2, blocks, block, block), (layers, 2, blocks))
            kinds = [np.dtype((kind, shape)) for kind, shape in zip(_KINDS, shapes, strict=True)]
            unpack = zlib.decompressobj()
            raw = unpack.decompress(body, sum(kind.itemsize for kind in kinds) + 1)
            if not unpack.eof or unpack.unused_data or len(raw) != sum(kind.itemsize for kind in kinds):
                raise ValueError("it is cut off or too long")
            ends = np.cumsum([kind.itemsize for kind in kinds])
            parts = [
                np.frombuffer(raw[end - kind.itemsize : end], kind.base).reshape(kind.shape)
                for kind, end in zip(kinds, ends, strict=True)
            ]
            return cls(heads, *parts)
        except (OSError, ValueError, zlib.error) as error:
            raise ValueError(f"{path} is not a profile of the codec: {error}") from error

    def save(self, path: Path) -> None:
        """Write it to a file."""
        layers, _, blocks, block, _ = self.basis.shape
        head = f"{self.heads} {self.turns.size} {layers} {blocks} {block}".encode()
        body = b"".join(np.ascontiguousarray(array).tobytes() for array in self._arrays)
        path.write_bytes(b"\n".join((_MAGIC, head, zlib.compress(body))))

    @property
    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return self.turns, self.mean, self.basis, self.scale

    def components(self, values: Floats, start: int) -> Floats:
        """Components of values `[layers, 2, tokens, channels]`, whose first token is at position `start`."""
        plain = np.stack([self._turned(values[:, 0], start, -1.0) - self.mean[:, None], values[:, 1]], axis=1)
        cut = plain.astype(np.float32).reshape(*values.shape[:3], *self.basis.shape[2:4])
        found = cut.swapaxes(2, 3) @ self._inverse
        return np.ascontiguousarray(found.swapaxes(2, 3)).reshape(values.shape)

    def values(self, components: Floats, start: int) -> Floats:
        """The values that components stand for: the same bits on every machine."""
        rows = components.reshape(*components.shape[:3], *self.basis.shape[2:4]).swapaxes(2, 3).astype(np.float64)
        _, exponent = np.frexp(np.abs(rows).max(axis=(3, 4), keepdims=True))
        fixed = np.rint(np.ldexp(rows, _FIXED - exponent))
        plain = np.ldexp(fixed @ self.basis.astype(np.float64), exponent - _FIXED) * self.scale[..., None, None]
        plain = plain.swapaxes(2, 3).reshape(components.shape)
        turned = self._turned(plain[:, 0] + self.mean[:, None], start, 1.0)
        return np.stack([turned, plain[:, 1]], axis=1).astype(np.float32)

    def _turned(self, keys: NDArray[np.floating], start: int, sign: float) -> Doubles:
        """`[layers, tokens, channels]` with every rotary pair turned to its token's position, or back."""
        pairs = self.turns.size
        positions = np.arange(start, start + keys.shape[1], dtype=np.uint64)
        angle = (positions[:, None] * self.turns >> np.uint64(32)) * (2 * np.pi / 2**32)
        # Rounded, so that libraries that differ in a sine's last bit still agree.
        cos, sin = (np.rint(f(angle) * 2**24)[:, None] / 2**24 for f in (np.cos, np.sin))
        out = keys.astype(np.float64).reshape(*keys.shape[:2], self.heads, -1)
        a, b = out[..., :pairs].copy(), out[..., pairs : 2 * pairs].copy()
        out[..., :pairs] = a * cos - b * (sign * sin)
        out[..., pairs : 2 * pairs] = b * cos + a * (sign * sin)
        return out.reshape(keys.shape)


def calibrate(samples: Iterable[Floats], heads: int, turns_per_token: Doubles) -> Profile:
    """The profile for KV like the samples, `[layers, 2, tokens, channels]` each, all from position 0 on.

    The first tokens of a sample, where attention sinks are, do not count. `turns_per_token`: of each rotary pair, the
    angle that one token adds, as a part of a whole turn.
    """
    turns = np.rint(turns_per_token % 1 * 2.0**64).astype(np.uint64)
    given = [sample[:, :, 4:] for sample in samples]
    layers, _, _, channels = given[0].shape
    dim = channels // heads
    together = max(
        count for count in range(1, heads + 1) if heads % count == 0 and (count * dim <= BLOCK or count == 1)
    )
    block = together * dim
    shape = (layers, 2, channels // block)
    identity = np.broadcast_to(np.eye(block, dtype=np.int8), (*shape, block, block))
    plain = Profile(heads, turns, np.zeros((layers, channels), np.float32), identity, np.ones(shape, np.float32))
    keys = np.concatenate([plain._turned(sample[:, 0], 4, -1.0) for sample in given], axis=1)
    mean = keys.mean(axis=1).astype(np.float32)
    keys -= mean[:, None]
    values = np.concatenate([sample[:, 1] for sample in given], axis=1).astype(np.float64)
    values /= np.sqrt(np.square(values).mean(axis=2, keepdims=True)) + 1e-9
    rows = np.stack([keys, values], axis=1).reshape(layers, 2, -1, channels // block, block).swapaxes(2, 3)
    _, vectors = np.linalg.eigh(rows.swapaxes(3, 4) @ rows)
    directions = vectors.swapaxes(3, 4)[..., ::-1, :]
    scale = (np.abs(directions).max(axis=(3, 4)) / 127).astype(np.float32)
    basis = np.rint(directions / scale[..., None, None]).astype(np.int8)
    return Profile(heads, turns, mean, basis, scale)
