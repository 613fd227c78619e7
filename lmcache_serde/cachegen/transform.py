"""The transform of the `cachegen` codec in NumPy: the plain form of docs/codec.md, which the native ones must equal.

K without its rotary embedding and without the model's mean, and V, become coordinates in an orthonormal basis that a
profile holds. Sums are of integers; every float operation is one IEEE operation, rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmcache_serde.cachegen.profile import Profile

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

MOST: Final = 8191
"""Largest component in steps: with sizes of a basis that add up to `MOST_SUM` at most, sums fit 32 bits."""
MOST_SUM: Final = 3 << 16
UNIT_BITS: Final = 13
"""A basis holds integers, 2^13 for 1."""
HIGHEST: Final = {"bfloat16": 60, "float16": 13, "float32": 60, "float8_e4m3fn": 7, "float8_e5m2": 13}
"""Largest exponent of a row that is quantised."""
_FIXED: Final = 12
"""Bits of a token's values below the exponent of the largest."""
_TURN: Final = float.fromhex("0x1.921fb54442d18p-30")  # 2 pi / 2^32
_SINE: Final = (1 / 362880, -1 / 5040, 1 / 120, -1 / 6, 1.0)
_COSINE: Final = (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0)


def exponents(x: Floats) -> Ints:
    """floor(log2 |x|); -1000 for zero and denormals."""
    field = (x.view(np.uint32) >> 23 & 255).astype(np.int64)
    return np.where(field == 0, -1000, field - 127)


def angles(turns: NDArray[np.uint64], start: int, tokens: int) -> tuple[Floats, Floats]:
    """Cosines and sines `[token, pair]` of the angles of tokens from position `start` on."""
    positions = np.arange(start, start + tokens, dtype=np.uint64)
    phase = (positions[:, None] * turns >> np.uint64(32)).astype(np.uint32)
    quadrant = (phase + np.uint32(1 << 29)) >> np.uint32(30)
    y = (phase - (quadrant << np.uint32(30))).view(np.int32) * _TURN
    z = y * y
    sine, cosine = np.full_like(z, _SINE[0]), np.full_like(z, _COSINE[0])
    for factor in _SINE[1:]:
        sine = sine * z + factor
    for factor in _COSINE[1:]:
        cosine = cosine * z + factor
    c, s = cosine.astype(np.float32), (sine * y).astype(np.float32)
    return np.choose(quadrant, [c, -s, -c, s]), np.choose(quadrant, [s, c, -s, -c])


def turned(x: Floats, heads: int, cosine: Floats, sine: Floats) -> Floats:
    """Values `[..., token, channel]` with dims i and i + pairs of each head turned."""
    pairs = cosine.shape[1]
    out = x.reshape(*x.shape[:-1], heads, -1).copy()
    a, b = out[..., :pairs].copy(), out[..., pairs : 2 * pairs].copy()
    cosine, sine = cosine[:, None], sine[:, None]
    out[..., :pairs] = a * cosine - b * sine
    out[..., pairs : 2 * pairs] = b * cosine + a * sine
    return out.reshape(x.shape)


def transform(profile: Profile, row: int, x: Floats, start: int, highest: int) -> Floats | None:
    """Components of one row's values `[token, channel]`, the first at position `start`; None if it must stay raw."""
    layer, plane = divmod(row, 2)
    if plane == 0:
        cosine, sine = angles(profile.turns, start, len(x))
        with np.errstate(invalid="ignore", over="ignore"):
            x = turned(x, profile.heads, cosine, -sine) - profile.mean[layer]
    most = exponents(x).max(1)
    if most.max() > highest or ((most < -60) & (most > -1000)).any():
        return None
    most = most.clip(-60)
    fixed = np.rint(x * np.ldexp(np.float32(1), _FIXED - most)[:, None])
    sums = _products(fixed, profile.basis[layer, plane].swapaxes(1, 2))
    return np.asarray(np.ldexp(sums.astype(np.float32), (most - _FIXED - UNIT_BITS)[:, None]))


def untransform(profile: Profile, row: int, q: Ints, steps: Floats, start: int) -> Floats:
    """Values of components `q[token, channel]`, in steps `[token or 1, 1]`."""
    layer, plane = divmod(row, 2)
    sums = _products(q.astype(np.int16), profile.basis[layer, plane]).astype(np.int32)
    x: Floats = sums.astype(np.float32) * np.ldexp(steps, -UNIT_BITS)
    if plane == 0:
        x = turned(x + profile.mean[layer], profile.heads, *angles(profile.turns, start, len(x)))
    return x


def _products(rows: NDArray[np.number], matrices: NDArray[np.int16]) -> Ints:
    """`[token, channel]` by the matrices of each block of channels. Sums of less than 2^53 are exact in float64."""
    blocks, size, _ = matrices.shape
    cut = rows.astype(np.float64).reshape(-1, blocks, size).swapaxes(0, 1)
    return (cut @ matrices.astype(np.float64)).swapaxes(0, 1).reshape(len(rows), -1).astype(np.int64)
