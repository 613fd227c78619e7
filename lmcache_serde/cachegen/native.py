"""The `cachegen` codec through liblmcache_host, a batch of chunks in one call and without the GIL.

Where the library is missing or switched off, the reference does the same, bit for bit, only slower.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmcache_core import _native
from lmcache_serde.cachegen import reference
from lmcache_serde.cachegen.format import AUX, DTYPES, MOST_START, RAW, TABLES, CodecError, Coding, Shape, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmcache_core._native import Buffer
    from lmcache_serde.cachegen.profile import Profile

_REASONS: Final = {
    -2: "the header is not that of a blob of this version, shape, length, table set and profile",
    -3: "a check does not match",
    -4: "a row's sections are inconsistent",
    -5: "an entropy-coded tile does not end as it must",
}


class _Profile(ctypes.Structure):
    """`lmc_codec_profile` of lmcache_codec.h."""

    _fields_ = (
        ("number", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("heads", "pairs", "blocks", "block")),
        *((name, ctypes.c_void_p) for name in ("turns", "mean", "there", "back", "room")),
    )


class _Codec(ctypes.Structure):
    """`lmc_codec` of lmcache_codec.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "layers", "planes", "tokens", "channels")),
        *((name, ctypes.c_int32) for name in ("level", "n_raw", "tile_tokens")),
        ("modes", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("profile", ctypes.POINTER(_Profile)),
        ("starts", ctypes.c_void_p),
    )


def _load() -> ctypes.CDLL | None:
    library = _native.library()
    if library is None or not hasattr(library, "lmc_codec_encode"):
        return None
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.lmc_codec_table_set.restype = ctypes.c_uint64
    library.lmc_codec_scratch_bytes.restype = library.lmc_codec_room_bytes.restype = int64
    library.lmc_codec_encode.restype = library.lmc_codec_decode.restype = int32
    library.lmc_codec_encode.argtypes = [pointer, pointer, pointer, int64, pointer, pointer, pointer]
    library.lmc_codec_decode.argtypes = [pointer, pointer, pointer, pointer, int64, int32, int32, pointer, pointer]
    if library.lmc_codec_table_set() != TABLES.id:
        raise ImportError("liblmcache_host.so has other codec tables than these sources: reinstall lmcache-core")
    return library


_library: Final = _load()


class _Scratch(threading.local):
    """One thread's working memory."""

    def __init__(self) -> None:
        self.room = np.empty(0 if _library is None else _library.lmc_codec_scratch_bytes(), np.uint8)
        self.turning = np.empty(0, np.uint8)


_scratch: Final = _Scratch()


def described(shape: Shape, coding: Coding | None = None) -> _Codec:
    """The C structure of a blob."""
    codec = _Codec(DTYPES[shape.dtype], shape.layers, shape.planes, shape.tokens, shape.channels)
    if coding is not None:
        codec.level, codec.n_raw, codec.tile_tokens = coding.level, coding.n_raw, coding.tile_tokens
        codec.modes, codec.offsets = _native.address_of(coding.modes), _native.address_of(coding.offsets)
    return codec


def profile_parts(profile: Profile) -> list[NDArray[Any]]:
    """The arrays that `lmc_codec_profile` points to."""
    return [profile.turns, profile.mean, *profile.matrices]


def profile_at(profile: Profile, addresses: Sequence[int]) -> _Profile:
    """The profile with its parts at these addresses."""
    _, _, blocks, block, _ = profile.basis.shape
    return _Profile(profile.number, profile.heads, profile.turns.size, blocks, block, *addresses)


def _lend(library: ctypes.CDLL, codec: _Codec, profile: Profile) -> None:
    """Give the codec a profile, and this thread's memory to work with it."""
    parts = profile_parts(profile)
    lent = profile_at(profile, [_native.address_of(part) for part in parts])
    lent.parts = parts  # the profile may let go of its matrices meanwhile: two threads may have made them at once
    codec.profile = ctypes.pointer(lent)
    room = library.lmc_codec_room_bytes(ctypes.byref(codec))
    if room < 0 or len(profile.mean) != codec.layers:
        raise ValueError("the profile does not fit this shape")
    if _scratch.turning.size < room:
        _scratch.turning = np.empty(room, np.uint8)
    lent.room = _native.address_of(_scratch.turning)


def _addresses(buffers: Sequence[Buffer], nbytes: int, *, writable: bool = False) -> NDArray[np.int64]:
    for buffer in buffers:
        if (size := _nbytes(buffer)) < nbytes:
            raise ValueError(f"a buffer of {size} bytes where {nbytes} are needed")
    return np.array([_native.address_of(buffer, writable=writable) for buffer in buffers], np.int64)


def encode(
    shape: Shape,
    coding: Coding,
    chunks: Sequence[Buffer],
    out: Sequence[Buffer],
    profile: Profile | None = None,
    starts: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """Encode each chunk into its buffer of `shape.bound` bytes. Return the bytes used, and rows stored raw unasked.

    With a profile, buffers hold `AUX` bytes more, and `starts` are the positions of the chunks' first tokens; one that
    is not in 0 to `MOST_START` is of a chunk that is coded without the profile.
    """
    coding = coding.checked(shape)
    bound = shape.bound if profile is None else shape.bound + AUX
    sources, targets = _addresses(chunks, shape.nbytes), _addresses(out, bound, writable=True)
    if sources.size != targets.size or (profile is not None and len(starts) != sources.size):
        raise ValueError(f"{sources.size} chunks and {len(starts)} starts for {targets.size} buffers")
    if _library is None:
        return _encode_slowly(shape, coding, chunks, out, profile, starts)
    codec = described(shape, coding)
    if profile is not None:
        _lend(_library, codec, profile)
        positions = np.array([start if start <= MOST_START else -1 for start in starts], np.int64)
        codec.starts = _native.address_of(positions)
    sizes, raw = np.zeros(sources.size, np.int64), np.zeros(sources.size, np.int32)
    arguments = (sources, targets, sources.size, _scratch.room, sizes, raw)
    result = _library.lmc_codec_encode(ctypes.byref(codec), *_passed(arguments))
    if result:
        raise ValueError(f"the codec refuses {shape} with {coding}")
    return sizes.tolist(), raw.tolist()


def decode(
    shape: Shape,
    blobs: Sequence[Buffer],
    out: Sequence[Buffer],
    first_layer: int = 0,
    layers: int | None = None,
    profile: Profile | None = None,
) -> None:
    """Decode `layers` layers (all from `first_layer` on by default) of each blob into its buffer of just those layers.

    Blobs may be of the profile, if one is given, or of none. Raise `CodecError` when a blob is not whole; what its
    buffer and those after it hold is then unspecified.
    """
    count = shape.layers - first_layer if layers is None else layers
    if first_layer < 0 or count < 0 or first_layer + count > shape.layers:
        raise ValueError(f"layers {first_layer} to {first_layer + count} of {shape.layers}")
    if len(blobs) != len(out):
        raise ValueError(f"{len(blobs)} blobs for {len(out)} buffers")
    nbytes = count * shape.planes * shape.row_bytes
    targets = _addresses(out, nbytes, writable=True)
    if _library is None:
        for blob, room in zip(blobs, out, strict=True):
            decoded = reference.decode(shape, np.frombuffer(blob, np.uint8), first_layer, count, profile)
            np.frombuffer(room, np.uint8)[:nbytes] = decoded
        return
    sources = _addresses(blobs, 0)
    lengths = np.array([_nbytes(blob) for blob in blobs], np.int64)
    status = np.zeros(len(blobs), np.int32)
    codec = described(shape)
    if profile is not None:
        _lend(_library, codec, profile)
    arguments = (sources, lengths, targets, sources.size, first_layer, count, _scratch.room, status)
    if _library.lmc_codec_decode(ctypes.byref(codec), *_passed(arguments)):
        bad = int(np.flatnonzero(status)[0])
        raise CodecError(f"blob {bad} of {lengths[bad]} bytes: {_REASONS[int(status[bad])]}")


def _nbytes(buffer: Any) -> int:
    return memoryview(buffer).nbytes


def _passed(arguments: tuple[Any, ...]) -> list[int]:
    return [_native.address_of(a) if isinstance(a, np.ndarray) else a for a in arguments]


def _encode_slowly(
    shape: Shape,
    coding: Coding,
    chunks: Sequence[Buffer],
    out: Sequence[Buffer],
    profile: Profile | None,
    starts: Sequence[int],
) -> tuple[list[int], list[int]]:
    sizes, raw = [], []
    for i, (chunk, room) in enumerate(zip(chunks, out, strict=True)):
        start = -1 if profile is None else starts[i]
        used = profile if 0 <= start <= MOST_START else None
        blob = reference.encode(shape, coding, np.frombuffer(chunk, np.uint8)[: shape.nbytes], used, start)
        np.frombuffer(room, np.uint8)[: blob.size] = blob
        sizes.append(blob.size)
        stored = blob[parse(blob, shape, used).starts[:-1] + 10] == RAW
        raw.append(int((stored & (coding.modes != RAW)).sum()))
    return sizes, raw
