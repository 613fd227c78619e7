"""Serde `fp8`: K and V as 8-bit floats (OCP E4M3: sign, 4 bits of exponent, 3 of mantissa), lossy.

The values of one head of one token share a power of two as their scale, so scaling itself loses nothing. A blob is

    int8   the exponent k of each group
    uint8  the E4M3 code of each value; the value is code * 2^k

What is decoded differs from what was encoded by at most the larger of 1/16 of the value itself and 2^-17 of the
largest value of its group (and 2^-126, where numbers end). Format: OCP 8-bit Floating Point Specification 1.0; a
shared power of two as in OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lmcache_core.errors import CorruptChunk, Unsupported
from lmcache_core.hookspecs import hookimpl
from lmcache_core.layout import DTYPE_BYTES, KVLayout
from lmcache_core.protocols import Serde, SerdeConfig, SerdeContext
from lmcache_core.types import MissReason

LMCACHE_API = 1

SUPPORTED = ("bfloat16", "float16", "float32")
GROUP = (32, 128)
"""Fewest values that share a scale where the layout has so many, and the most."""

_SEGMENT = 1 << 15
"""Values that are encoded together: they and what is computed of them stay in a core's own cache."""
_K_MIN, _K_MAX = -117, 112
"""Exponents in use: codes of these groups decode to normal, finite numbers."""
_NAN = 127
"""Magnitude of the codes that are no number. Never written."""
_NORMAL = 8
"""Codes of smaller magnitude are multiples of 2^-9."""

_Bits = NDArray[Any]


def group_size(layout: KVLayout) -> int:
    """Values that share a scale: (a part of) one head of one token; several heads where one is very small."""
    low, high = GROUP
    dim, heads = layout.head_dim, layout.kv_heads
    if dim >= low:
        return next((size for size in range(min(dim, high), low - 1, -1) if dim % size == 0), dim)
    return dim * next((count for count in range(1, heads) if heads % count == 0 and dim * count >= low), heads)


class Fp8(Serde):
    """See the module. NumPy only: its conversions run without the GIL."""

    lossless = False

    def __init__(self, layout: KVLayout) -> None:
        self._group = group_size(layout)
        self._dtype = layout.dtype
        self._bytes = layout.chunk_bytes
        # A bfloat16 is handled in its own 16 bits; the other types as float32, which a float16 fits into exactly.
        short = layout.dtype == "bfloat16"
        self._mantissa = 7 if short else 23
        self._signed: np.dtype[Any] = np.dtype("<i2" if short else "<i4")
        self._raw: np.dtype[Any] = np.dtype("<f2") if layout.dtype == "float16" else self._signed
        self._values: int = self._bytes // DTYPE_BYTES[layout.dtype]
        self._groups = self._values // self._group

    @property
    def codec(self) -> str:
        return f"fp8-e4m3/1/group{self._group}"

    def bound(self) -> int:
        return self._groups + self._values

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        """Raise `ValueError` for NaN, infinities and values from 2^120 on: such a chunk is not stored."""
        for chunk, room in zip(chunks, out, strict=True):
            self._encode(np.frombuffer(chunk, self._raw).reshape(-1, self._group), room)
        return [self.bound()] * len(chunks)

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        for blob, room in zip(blobs, out, strict=True):
            if len(blob) != self.bound() or len(room) != self._bytes:
                raise CorruptChunk(MissReason.CORRUPT, f"{len(blob)} fp8 bytes, expected {self.bound()}")
            scales = np.frombuffer(blob, np.int8, self._groups)
            codes = np.frombuffer(blob, np.uint8, self._values, self._groups).reshape(-1, self._group)
            raw = np.frombuffer(room, self._raw).reshape(-1, self._group)
            if scales.min() < _K_MIN or scales.max() > _K_MAX:
                raise CorruptChunk(MissReason.CORRUPT, "an fp8 scale that is never written")
            for rows in self._segments():
                bits = self._decoded(codes[rows], scales[rows])
                if self._dtype == "float16":
                    bits = _within_float16(bits.view(np.float32))
                raw[rows] = bits

    def _segments(self) -> list[slice]:
        step = max(1, _SEGMENT // self._group)
        return [slice(at, at + step) for at in range(0, self._groups, step)]

    def _encode(self, raw: _Bits, room: memoryview) -> None:
        scales = np.frombuffer(room, np.int8, self._groups)
        codes = np.frombuffer(room, np.uint8, self._values, self._groups).reshape(-1, self._group)
        for rows in self._segments():
            bits = raw[rows]
            if self._dtype == "float16":
                with np.errstate(invalid="ignore"):  # a NaN is found below
                    bits = bits.astype(np.float32).view(np.int32)
            scales[rows] = self._encoded(bits, codes[rows])

    def _encoded(self, bits: _Bits, codes: _Bits) -> _Bits:
        """Fill `codes`; return the exponent of each row."""
        mantissa, drop = self._mantissa, self._mantissa - 3
        magnitude = bits & self._signed.type(np.iinfo(self._signed).max)
        top = magnitude.max(axis=1)  # bits of positive floats are ordered as their values are
        if top.max() >= (127 + 120) << mantissa:
            raise ValueError("a chunk with NaN, infinity or values from 2^120 on has no fp8 encoding")
        # The largest value of a group becomes 240 to 464, which rounds to at most 448, the largest code.
        wanted = (top >> mantissa) - 135 + ((top & (1 << mantissa) - 1) > 13 << (drop - 1))
        exponent: _Bits = np.maximum(wanted, _K_MIN).astype(self._signed)
        scaled = magnitude - (exponent << mantissa)[:, None]
        # Round to nearest, ties to even, and move to E4M3's exponent bias of 7.
        rounded = (scaled + ((scaled >> drop) & 1) + ((1 << drop - 1) - 1) >> drop) - (120 << 3)
        small = np.flatnonzero(scaled < (121 << mantissa))
        if len(small):
            values = _floats(magnitude.reshape(-1)[small], mantissa)
            rounded.reshape(-1)[small] = np.rint(np.ldexp(values, 9 - exponent[small // self._group].astype(np.int32)))
        codes[:] = rounded | ((bits >> self._signed.itemsize * 8 - 8) & 0x80)
        return exponent

    def _decoded(self, codes: _Bits, scales: _Bits) -> _Bits:
        """Bits of the values (bfloat16 or float32) of rows of codes."""
        mantissa = self._mantissa
        magnitude: _Bits = (codes & 0x7F).astype(self._signed)
        if magnitude.max() == _NAN:
            raise CorruptChunk(MissReason.CORRUPT, "an fp8 code that is no number")
        exponent = scales.astype(self._signed)
        bits = (magnitude << mantissa - 3) + ((exponent + 120) << mantissa)[:, None]
        small = np.flatnonzero(magnitude < _NORMAL)
        if len(small):
            # Few bits times a power of two: exact in float32, and its upper half in bfloat16.
            values = magnitude.reshape(-1)[small].astype(np.float32)
            values = np.ldexp(values, exponent[small // self._group].astype(np.int32) - 9)
            bits.reshape(-1)[small] = values.view(np.int32) >> (23 - mantissa)
        negative = (codes & 0x80).astype(self._signed) << self._signed.itemsize * 8 - 8
        bits |= negative
        return bits


def _within_float16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest float16 are rounded up to 2^16, which is none any more: back to the largest, 2^16 - 32."""
    if np.abs(values).max() > 1 << 16:
        raise CorruptChunk(MissReason.CORRUPT, "an fp8 value that is no float16")
    return np.clip(values, -65504, 65504)


def _floats(bits: _Bits, mantissa: int) -> NDArray[np.float64]:
    return (bits.astype(np.int32) << (23 - mantissa)).view(np.float32).astype(np.float64)


class Fp8Config(SerdeConfig):
    """8-bit floats with a scale for each head of each token: half the bytes of bfloat16, 2.7 % mean error (RMS)."""

    type: Literal["fp8"] = "fp8"

    def build(self, context: SerdeContext) -> Fp8:
        layout = context.layout
        if layout.order != "lknhd":
            raise Unsupported(
                f"fp8 must know which bytes are K and V; pages packed as {layout.packing!r} are opaque: use serde zstd"
            )
        if layout.dtype not in SUPPORTED:
            raise Unsupported(f"fp8 encodes {', '.join(SUPPORTED)}, not {layout.dtype}: use serde zstd")
        return Fp8(layout)


@hookimpl
def lmcache_serdes() -> list[type[SerdeConfig]]:
    return [Fp8Config]
