"""Chunks for tests of the codec on a GPU: every dtype, mode and kind of row, odd shapes among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmcache_serde.cachegen.format import ANCHORED, AUTO, DTYPES, LOSSLESS, PER_TOKEN, RAW, Coding, Shape
from lmcache_serde.cachegen.reference import from_float


@dataclass(frozen=True)
class Case:
    shape: Shape
    coding: Coding
    kind: str = "keys"
    """`keys` as models have them, `walk`: neighbours alike, `bits` of any kind, `spread` channels, `wide` tokens."""

    def chunk(self, seed: int = 0) -> NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        shape = (self.shape.rows, self.shape.tokens, self.shape.channels)
        if self.kind == "bits":
            return rng.integers(0, 256, self.shape.nbytes, dtype=np.uint8)
        x = rng.normal(0, 1, shape) * np.exp(rng.normal(0, 0.7, (shape[0], 1, shape[2])))
        if self.kind == "spread":
            x *= np.exp(rng.normal(0, 1.2, (shape[0], 1, shape[2])))
        if self.kind == "walk":
            x = np.cumsum(x, 1) * 0.3
        if self.kind == "wide":
            x *= 10.0 ** rng.integers(-30, 5, (shape[0], shape[1], 1))
        x[:, :2] *= 0.01  # sinks: small values of V at the start of a sequence
        x += rng.normal(0, 3, (shape[0], 1, shape[2])) * (np.arange(shape[0]) % 2 == 0)[:, None, None]
        bits = from_float(np.clip(x, -400, 400).astype(np.float32), self.shape.dtype)
        return np.ascontiguousarray(bits).reshape(-1).view(np.uint8)


def case(
    dtype: str, sizes: tuple[int, int, int, int], modes: list[int], offset: int, kind: str = "keys", **options: int
) -> Case:
    shape = Shape(dtype, *sizes)
    rows = np.resize(np.array(modes, np.uint8), shape.rows)
    return Case(shape, Coding(3, rows, np.full(shape.rows, offset, np.int16), **options), kind)


CASES = {
    **{
        f"{dtype} mode {mode}": case(dtype, (2, 2, 40, 100), [mode], -24, n_raw=3, tile_tokens=16)
        for dtype in DTYPES
        for mode in (ANCHORED, PER_TOKEN, LOSSLESS)
    },
    "usual": case("bfloat16", (2, 2, 256, 128), [ANCHORED, PER_TOKEN], -18, n_raw=AUTO),
    "neighbours alike": case("bfloat16", (2, 2, 256, 64), [ANCHORED], -30, "walk"),
    "neighbours alike, in ranges": case("bfloat16", (1, 2, 90, 64), [ANCHORED], -30, "walk", tile_tokens=32),
    "coarse": case("float16", (2, 2, 64, 64), [ANCHORED, PER_TOKEN], 32, n_raw=AUTO),
    "fine": case("bfloat16", (2, 2, 64, 72), [ANCHORED, PER_TOKEN], -70, n_raw=AUTO),
    "spread": case("bfloat16", (4, 2, 40, 128), [ANCHORED, PER_TOKEN], -76, "spread"),
    "spread more": case("bfloat16", (4, 2, 40, 128), [ANCHORED, PER_TOKEN], -88, "spread"),
    "too fine to code": case("bfloat16", (1, 2, 33, 65), [ANCHORED, PER_TOKEN], -160),
    "random bits": case("bfloat16", (2, 2, 33, 65), [ANCHORED, PER_TOKEN, LOSSLESS, RAW], -24, "bits", n_raw=1),
    "random bits of fp8": case("float8_e4m3fn", (2, 1, 33, 66), [ANCHORED, LOSSLESS], -24, "bits"),
    "wide": case("bfloat16", (2, 2, 48, 64), [PER_TOKEN, ANCHORED], -24, "wide", n_raw=AUTO),
    "latents": case("bfloat16", (3, 1, 64, 576), [ANCHORED], -24, n_raw=4),
    "one element": case("bfloat16", (1, 2, 1, 1), [ANCHORED, LOSSLESS], 0),
    "nothing coded": case("bfloat16", (1, 2, 8, 64), [ANCHORED, PER_TOKEN], 0, n_raw=8),
    "single tokens": case("bfloat16", (1, 2, 5, 130), [ANCHORED, LOSSLESS], -24, tile_tokens=1),
}
