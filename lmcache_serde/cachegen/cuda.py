"""The `cachegen` codec on an NVIDIA GPU: the same bytes and the same values as on the host, queued on a stream.

Memory is the caller's, as addresses: blobs, chunks (canonical order), scratch and results in device memory or pinned
host memory, blobs and chunks at multiples of 16, scratch at a multiple of 256. Nothing is allocated and nothing waits:
results are there when an event recorded on the stream after the call has fired.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from lmcache_core import _cuda, _native
from lmcache_serde.cachegen.format import TABLES, Coding, Shape
from lmcache_serde.cachegen.native import described, profile_at, profile_parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmcache_core._native import Integers
    from lmcache_serde.cachegen.native import _Codec
    from lmcache_serde.cachegen.profile import Profile


@functools.cache
def why_not() -> str:
    """Why the codec cannot run on a GPU here, with the fix; empty when it can."""
    if reason := _cuda.why_not():
        return reason
    count = _cuda.call("codec_numbers", None, 0)
    numbers = np.zeros(count, np.int32)
    _cuda.call("codec_numbers", numbers.ctypes.data, count)
    if xxhash.xxh3_64_intdigest(numbers.astype("<u2").tobytes()) != TABLES.id:
        return f"{_cuda.LIBRARY.name} was built with other codec tables than these sources: reinstall lmcache-core"
    return ""


def profile_image(profile: Profile) -> NDArray[np.uint8]:
    """What has to lie in device memory, at a multiple of 256, to decode with a profile."""
    parts = [part.reshape(-1).view(np.uint8) for part in profile_parts(profile)]
    return np.concatenate([np.pad(part, (0, -part.size % 256)) for part in parts])


def _lend(codec: _Codec, profile: Profile, image: int) -> None:
    if len(profile.mean) != codec.layers:
        raise ValueError("the profile does not fit this shape")
    sizes = [-(-part.nbytes // 256) * 256 for part in profile_parts(profile)]
    addresses = [image + sum(sizes[:i]) for i in range(len(sizes))]
    codec.profile = ctypes.pointer(profile_at(profile, addresses))


def scratch_bytes(shape: Shape, count: int, coding: Coding | None = None, profile: Profile | None = None) -> int:
    """Scratch memory to decode `count` chunks, perhaps of a profile, or with `coding` to encode them."""
    codec = described(shape, coding)
    if profile is not None:
        _lend(codec, profile, 0)
    return _cuda.call("codec_scratch", ctypes.byref(codec), count, coding is not None)


def encode(
    shape: Shape,
    coding: Coding,
    chunks: Integers,
    outs: Integers,
    scratch: tuple[int, int],
    sizes: int,
    raw_rows: int,
    stream: int,
    device: int = 0,
    profile: tuple[Profile, int] | None = None,
    starts: Integers = (),
) -> None:
    """Queue the encoding of the chunks at addresses `chunks` into room of `shape.bound` bytes each at `outs`.

    With a profile and the address of its image (`AUX` bytes more for each blob), the chunks begin at positions
    `starts`, all of them known; `coding` then has no lossless row and says how many tokens are sinks.

    `scratch` is address and length. `sizes` (int64) and `raw_rows` (int32) are addresses of `[count]` results: bytes of
    each blob, and rows that are stored as they are although `coding` wanted to code them.
    """
    coding = coding.checked(shape)
    sources, targets = _vectors(chunks, outs)
    codec = described(shape, coding)
    positions = np.ascontiguousarray(starts, np.int64)
    if profile is not None:
        _lend(codec, *profile)
        if positions.shape != sources.shape:
            raise ValueError(f"{positions.size} starts for {sources.size} chunks")
        codec.starts = _native.address_of(positions)
    at = (_native.address_of(sources), _native.address_of(targets), sources.size)
    _cuda.call("codec_encode", device, ctypes.byref(codec), TABLES.id, *at, *scratch, sizes, raw_rows, stream)


def decode(
    shape: Shape,
    blobs: Integers,
    lengths: Integers,
    outs: Integers,
    scratch: tuple[int, int],
    status: int,
    stream: int,
    *,
    device: int = 0,
    first_layer: int = 0,
    layers: int | None = None,
    ctas: int = 0,
    profile: tuple[Profile, int] | None = None,
) -> None:
    """Queue the decoding of `layers` layers from `first_layer` on (all by default) into room of just these at `outs`.

    `status` is the address of int32 `[count]`: 0 for each blob that was whole, else a code of lmcache_codec.h; what its
    room holds then is unspecified. At most `ctas` thread blocks decode, 0 for as many as are useful. `profile`: with
    the address of its image; blobs may be of it or of none.
    """
    count = shape.layers - first_layer if layers is None else layers
    sources, sizes, targets = _vectors(blobs, lengths, outs)
    codec = described(shape)
    if profile is not None:
        _lend(codec, *profile)
    at = (*(_native.address_of(vector) for vector in (sources, sizes, targets)), sources.size)
    where = (first_layer, count, *scratch, status, ctas, stream)
    _cuda.call("codec_decode", device, ctypes.byref(codec), TABLES.id, *at, *where)


def _vectors(*columns: Integers) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    vectors = [np.ascontiguousarray(column, np.int64) for column in columns]
    if any(vector.shape != (vectors[0].size,) for vector in vectors):
        raise ValueError(f"a batch needs vectors of one length, got {[vector.shape for vector in vectors]}")
    return vectors
