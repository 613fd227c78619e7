"""Inputs for the tests of the `cachegen` codec, and damage for its blobs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcache_serde.cachegen import reference
from lmcache_serde.cachegen.format import (
    ANCHORED,
    AUTO,
    DTYPES,
    LOSSLESS,
    MOST_START,
    PER_TOKEN,
    RAW,
    Coding,
    Shape,
    check64,
    parse,
)
from lmcache_serde.cachegen.profile import Profile

KINDS = ("plain", "sink", "outliers", "extreme", "sparse", "not finite", "noise", "zero")


def coding(shape: Shape, modes: tuple[int, ...] = (ANCHORED, PER_TOKEN), offset: int = -24, **more: Any) -> Coding:
    """The same for every layer."""
    each = np.tile(np.array(modes[: shape.planes], np.uint8), shape.layers)
    return Coding(3, each, np.full(shape.rows, offset, np.int16), **more)


def floats(rng: np.random.Generator, shape: Shape, kind: str) -> NDArray[np.float32]:
    """Values `[row][token][channel]` with channel offsets, drifting tokens and what `kind` says."""
    size = (shape.rows, shape.tokens, shape.channels)
    channel = (shape.rows, 1, shape.channels)
    noise = rng.standard_normal(size)
    if shape.rows % 2:
        noise = np.cumsum(noise, 1) * 0.5
    values = noise * np.exp(rng.standard_normal(channel)) + 3 * rng.standard_normal(channel)
    if kind == "sink":
        values[:, 0] *= 0.01
    elif kind == "outliers":
        values[0] = 0
        values[:, :, 0] *= 300
        values[:, -1, -1] *= 40
    elif kind == "extreme":
        values *= 10.0 ** int(rng.integers(-39, 36))
    elif kind == "sparse":
        values[rng.random(size) < 0.3] = 0
        values[:, shape.tokens // 2] = 0
    elif kind == "zero":
        values *= 0.0
    values = np.clip(values, -3e38, 3e38).astype(np.float32)
    if kind == "not finite":
        values[0, 0, 0], values[-1, -1, -1] = np.nan, np.inf
    return values


def chunk(rng: np.random.Generator, shape: Shape, kind: str) -> NDArray[np.uint8]:
    """The bytes of a chunk."""
    if kind == "noise":
        return rng.integers(0, 256, shape.nbytes, np.uint8)
    values = floats(rng, shape, kind)
    if shape.dtype in ("float32", "bfloat16"):
        words = values.view(np.uint32)
        bits: NDArray[Any] = words if shape.dtype == "float32" else (words >> 16).astype(np.uint16)
    elif shape.dtype == "float16":
        with np.errstate(over="ignore"):
            bits = values.astype(np.float16).view(np.uint16)
    else:
        largest = 448 if shape.dtype == "float8_e4m3fn" else 57344
        bits = reference.from_float(np.nan_to_num(np.clip(values, -largest, largest)), shape.dtype)
        if kind == "not finite":
            bits[0, 0, 0] = 0x7F
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8)


def any_case(rng: np.random.Generator) -> tuple[Shape, Coding, NDArray[np.uint8]]:
    """A shape, a way to code it and a chunk, odd ones more often than not."""
    shape = Shape(
        str(rng.choice(list(DTYPES))),
        int(rng.integers(1, 4)),
        int(rng.integers(1, 3)),
        int(rng.choice([1, 2, 7, 33, 64, 65, 100, 130])),
        int(rng.choice([1, 5, 64, 70, 128, 192, 200, 320])),
    )
    how = Coding(
        3,
        rng.choice([RAW, ANCHORED, PER_TOKEN, LOSSLESS], shape.rows, p=[0.1, 0.4, 0.3, 0.2]).astype(np.uint8),
        rng.integers(rng.choice([-160, -90]), 33, shape.rows).astype(np.int16),
        int(rng.choice([AUTO, 0, 1, 4])),
        int(rng.choice([16, 64, 100, 256])),
    )
    return shape, how, chunk(rng, shape, str(rng.choice(KINDS)))


def any_turned(rng: np.random.Generator) -> tuple[Shape, Coding, NDArray[np.uint8], Profile, int]:
    """The same with a profile and the position of the chunk's first token."""
    heads, dim, block = [(2, 16, 32), (3, 64, 192), (6, 64, 128), (5, 14, 70), (2, 128, 256), (1, 64, 64)][
        rng.integers(6)
    ]
    layers, channels = int(rng.integers(1, 3)), heads * dim
    mirror = rng.standard_normal((layers, 2, channels // block, block, 1))
    mirror /= np.sqrt(np.square(mirror).sum(3, keepdims=True))
    basis = np.rint((np.eye(block) - 2 * mirror * mirror.swapaxes(3, 4)) * 2.0**13).astype(np.int16)
    turns = rng.integers(1 << 62, size=int(rng.choice([0, dim // 4, dim // 2])), dtype=np.uint64)
    profile = Profile(heads, turns, rng.standard_normal((layers, channels), np.float32), basis)
    dtype, tokens = str(rng.choice(["bfloat16", "float16", "float32"])), int(rng.choice([1, 7, 33, 64, 100, 130]))
    shape = Shape(dtype, layers, 2, tokens, channels)
    how = Coding(
        3,
        rng.choice([RAW, ANCHORED, PER_TOKEN, LOSSLESS], shape.rows, p=[0.05, 0.45, 0.45, 0.05]).astype(np.uint8),
        rng.integers(rng.choice([-160, -90]), 33, shape.rows).astype(np.int16),
        int(rng.choice([AUTO, 0, 1, 4])),
        int(rng.choice([16, 64, 256])),
    )
    start = int(rng.choice([0, 5, 100_000, MOST_START]))
    return shape, how, chunk(rng, shape, str(rng.choice(KINDS))), profile, start


def reseal(blob: NDArray[np.uint8], shape: Shape, starts: NDArray[np.int64]) -> None:
    """Put the right checks into a blob that was tampered with, so that its contents are what a decoder must survive."""
    for start, end in pairwise(starts):
        blob[start : start + 8].view("<u8")[0] = check64(blob[start + 8 : end])
    blob[56:64].view("<u8")[0] = check64(blob[:56], blob[64 : starts[0]])


def tampered(
    rng: np.random.Generator, blob: NDArray[np.uint8], shape: Shape, profile: Profile | None = None
) -> NDArray[np.uint8]:
    """A copy with a few bytes changed, mostly where a decoder takes its bearings, under checks that match."""
    starts = parse(blob, shape, profile).starts
    copy = blob.copy()
    for _ in range(int(rng.integers(1, 4))):
        row = int(rng.integers(shape.rows))
        start, end = int(starts[row]), int(starts[row + 1])
        where = rng.random()
        if where < 0.1:
            at = int(rng.integers(4, starts[0]))
        elif where < 0.3:
            at = start + int(rng.integers(8, 16))
        else:
            at = int(rng.integers(start + 16, min(end, start + 16 + (200 if where < 0.6 else 1 << 30))))
        copy[at] = rng.integers(256) if rng.random() < 0.5 else copy[at] ^ (1 << int(rng.integers(8)))
    reseal(copy, shape, starts)
    return copy
