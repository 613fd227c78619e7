"""A calibrated profile: for each layer of one model, a basis in which its K and V take fewer bits.

The rotary embedding of K is undone and the model's mean taken off; then K and V are turned into the principal
components of the model's own KV (as KVTC does, arXiv 2511.01815), over as many whole heads as fit `BLOCK` channels; see
transform.py. A profile is valid for any KV of its geometry: for another model's it merely saves nothing.
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

from lmcache_serde.cachegen.format import GROUP
from lmcache_serde.cachegen.transform import MOST_SUM, UNIT_BITS, angles, turned

Floats = NDArray[np.float32]

BLOCK: Final = 256
"""Most channels that are transformed together."""
_KINDS: Final = ("<u8", "<f4", "<i2")
_MAGIC: Final = b"cachegen profile 2"
_MOST: Final = 1 << 30
"""Most numbers of a basis that a file may speak of."""
_SLACK: Final = 1 / 32
"""By how much a basis may miss being orthonormal: sum of the sizes in any row of `B B^T - 1`."""


@dataclass(frozen=True, eq=False)
class Profile:
    """See the module. Immutable and thread-safe."""

    heads: int
    turns: NDArray[np.uint64]
    """`[pairs]`: of each rotary pair (dims i and i + pairs of a head), 2^64 times the turns that one token adds."""
    mean: Floats
    """`[layers, channels]`: mean of K without its rotary embedding."""
    basis: NDArray[np.int16]
    """`[layers, 2, blocks, component, channel]`: for K and V, the direction of each component, 2^13 times."""

    def __post_init__(self) -> None:
        layers, planes, blocks, rows, columns = self.basis.shape if self.basis.ndim == 5 else (0,) * 5
        channels = blocks * rows
        types = tuple(array.dtype.str for array in self._arrays) == _KINDS
        shapes = self.mean.shape == (layers, channels) and planes == 2 and rows == columns and self.turns.ndim == 1
        if not (types and shapes and layers) or rows > BLOCK or (blocks > 1 and rows % GROUP):
            raise ValueError("its arrays do not fit each other")
        dim = channels // self.heads if self.heads > 0 else 0
        if not dim or channels % self.heads or rows % dim or 2 * self.turns.size > dim:
            raise ValueError(f"{self.heads} heads and {self.turns.size} rotary pairs do not fit {channels} channels")
        if not (np.abs(self.mean) < 2.0**60).all():
            raise ValueError("its means are not finite")
        for layer in self.basis.astype(np.float32):
            sizes = np.abs(layer)
            off = layer @ layer.swapaxes(2, 3) * np.float32(4.0**-UNIT_BITS) - np.eye(rows, dtype=np.float32)
            if max(sizes.sum(2).max(), sizes.sum(3).max()) > MOST_SUM or np.abs(off).sum(3).max() > _SLACK:
                raise ValueError("a basis is not orthonormal")

    @cached_property
    def number(self) -> int:
        """Fingerprint of everything in it, 64 bits: what a blob's header names."""
        digest = hashlib.sha256(f"{self.heads}".encode())
        for array in self._arrays:
            digest.update(f"{array.shape};".encode() + np.ascontiguousarray(array).tobytes())
        return int.from_bytes(digest.digest()[:8], "little")

    @property
    def id(self) -> str:
        """12 hexadecimal digits of it, for names."""
        return f"{self.number:016x}"[:12]

    @cached_property
    def matrices(self) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """To components and back, as the native code reads them: `[layer, plane, block, i / 2, j, i % 2]`, where input
        i counts towards output j; both filled up with zeros to a multiple of 64."""
        pad = -self.basis.shape[-1] % GROUP
        full = np.pad(self.basis, ((0, 0), (0, 0), (0, 0), (0, pad), (0, pad)))
        size = full.shape[-1]
        there, back = (
            np.ascontiguousarray(matrix.reshape(*full.shape[:3], size // 2, 2, size).swapaxes(4, 5))
            for matrix in (full.swapaxes(3, 4), full)
        )
        return there, back

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile. Raise `ValueError`, with the path, when the file is none, or damaged."""
        try:
            first, head, body = path.read_bytes().split(b"\n", 2)
            if first != _MAGIC:
                raise ValueError(f"it begins with {first[:20]!r}, not {_MAGIC!r}: calibrate again")
            *sizes, number = head.split()
            heads, pairs, layers, blocks, block = map(int, sizes)
            if not 1 <= block <= BLOCK or min(heads, layers, blocks) < 1 or pairs < 0:
                raise ValueError("its sizes make no sense")
            if layers * blocks * block**2 > _MOST or pairs > block:
                raise ValueError("its sizes make no sense")
            shapes = ((pairs,), (layers, blocks * block), (layers, 2, blocks, block, block))
            kinds = [np.dtype((kind, shape)) for kind, shape in zip(_KINDS, shapes, strict=True)]
            ends = np.cumsum([kind.itemsize for kind in kinds])
            unpack = zlib.decompressobj()
            raw = unpack.decompress(body, int(ends[-1]) + 1)
            if not unpack.eof or unpack.unused_data or len(raw) != ends[-1]:
                raise ValueError("it is cut off or too long")
            turns, mean, basis = (raw[end - kind.itemsize : end] for end, kind in zip(ends, kinds, strict=True))
            halves = np.frombuffer(basis, np.uint8).reshape(2, -1).T  # low bytes, then high ones: they pack better
            found = cls(
                heads,
                np.frombuffer(turns, _KINDS[0]),
                np.frombuffer(mean, _KINDS[1]).reshape(shapes[1]),
                np.ascontiguousarray(halves).view(_KINDS[2]).reshape(shapes[2]),
            )
            if number != f"{found.number:016x}".encode():
                raise ValueError("its fingerprint does not match")
            return found
        except (OSError, ValueError, zlib.error) as error:
            raise ValueError(f"{path} is not a profile of the codec: {error}") from error

    def save(self, path: Path) -> None:
        """Write it to a file."""
        layers, _, blocks, block, _ = self.basis.shape
        head = f"{self.heads} {self.turns.size} {layers} {blocks} {block} {self.number:016x}".encode()
        halves = np.ascontiguousarray(self.basis).view(np.uint8).reshape(-1, 2).T
        body = b"".join(np.ascontiguousarray(array).tobytes() for array in (self.turns, self.mean, halves))
        path.write_bytes(b"\n".join((_MAGIC, head, zlib.compress(body))))

    @property
    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return self.turns, self.mean, self.basis


def calibrate(samples: Iterable[Floats], heads: int, turns_per_token: NDArray[np.float64]) -> Profile:
    """The profile for KV like the samples, `[layers, 2, tokens, channels]` each, all from position 0 on.

    The first tokens of a sample, where attention sinks are, do not count. `turns_per_token`: of each rotary pair, the
    angle that one token adds, as a part of a whole turn. Raise `ValueError` for a geometry that has no transform.
    """
    turns = np.rint(turns_per_token % 1 * 2.0**64).astype(np.uint64)
    given = [sample[:, :, 4:] for sample in samples]
    layers, _, _, channels = given[0].shape
    dim = channels // heads
    fitting = [
        count * dim
        for count in range(1, heads + 1)
        if heads % count == 0 and count * dim <= BLOCK and (count == heads or count * dim % GROUP == 0)
    ]
    if not fitting:
        raise ValueError(f"heads of {dim} channels do not fill blocks of a multiple of {GROUP} up to {BLOCK}")
    block = max(fitting)
    rows = []
    for sample in given:
        cosine, sine = angles(turns, 4, sample.shape[2])
        rows.append(turned(sample[:, 0], heads, cosine, -sine))
    keys = np.concatenate(rows, axis=1).astype(np.float64)
    mean = keys.mean(axis=1).astype(np.float32)
    keys -= mean[:, None]
    values = np.concatenate([sample[:, 1] for sample in given], axis=1).astype(np.float64)
    values /= np.sqrt(np.square(values).mean(axis=2, keepdims=True)) + 1e-9
    both = np.stack([keys, values], axis=1).reshape(layers, 2, -1, channels // block, block).swapaxes(2, 3)
    _, vectors = np.linalg.eigh(both.swapaxes(3, 4) @ both)
    directions = vectors.swapaxes(3, 4)[..., ::-1, :]
    return Profile(heads, turns, mean, np.rint(directions * 2.0**UNIT_BITS).astype(np.int16))
