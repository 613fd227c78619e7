"""The one door to `liblmcache_host.so` (csrc/host): checksums, hashes, copies and file I/O without the GIL.

The library lies beside this file and is loaded with ctypes. Where it is missing (no compiler at install time) or
switched off with `LMCACHE_NATIVE=0`, every function does the same with xxhash, hashlib, NumPy and the standard
library, only slower; `available()` and `why_not()` tell which. Addresses are integers; whoever passes one vouches
for the memory behind it. Anything given as a buffer must be contiguous.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]
    Integers: TypeAlias = Sequence[int] | NDArray[np.int64]

ABI_VERSION: Final = 1
MAX_DIMS: Final = 6
LIBRARY: Final = Path(__file__).with_name("liblmcache_host.so")

_LEVELS: Final = {"portable": 0, "avx2": 1, "avx512": 2}
_SHA: Final = 8

_int32, _int64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Part(ctypes.Structure):
    """`lmc_part` of lmcache_host.h: one plane of the engine's pages."""

    _fields_ = (
        ("bases", _pointer),
        ("block_stride", _int64),
        ("slot_offset", _int64),
        ("slot_layer_stride", _int64),
        ("slot_block_stride", _int64),
        ("run_bytes", _int64),
        ("ndims", _int64),
        ("extents", _int64 * MAX_DIMS),
        ("page_strides", _int64 * MAX_DIMS),
        ("slot_strides", _int64 * MAX_DIMS),
    )


def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("LMCACHE_NATIVE", "1") == "0":
        return None, "switched off by LMCACHE_NATIVE=0"
    if sys.byteorder != "little":
        return None, f"{LIBRARY.name} is for little-endian machines"
    if not LIBRARY.is_file():
        return None, f"{LIBRARY.name} was not built: install a C++17 compiler and reinstall lmcache-core"
    try:
        library = ctypes.CDLL(os.fspath(LIBRARY))
        version = int(library.lmc_abi_version())
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} does not load ({error}): reinstall lmcache-core"
    if version != ABI_VERSION:
        return None, f"{LIBRARY.name} has ABI {version}, these sources need {ABI_VERSION}: reinstall lmcache-core"
    batch = [_pointer, _pointer, _pointer, _pointer, _int64, _pointer]
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "lmc_simd": (_int32, []),
        "lmc_limit_simd": (_int32, [_int32]),
        "lmc_xxh3_64_batch": (None, [_pointer, _pointer, _int64, _pointer]),
        "lmc_sha256_chain": (None, [ctypes.c_char_p, _pointer, _int64, _int64, _pointer]),
        "lmc_copy_batch": (None, [_pointer, _pointer, _pointer, _int64, _int32]),
        "lmc_pread_batch": (None, batch),
        "lmc_pwrite_batch": (None, batch),
        "lmc_split_planes": (_int32, [_pointer, _pointer, _int64, _int32]),
        "lmc_join_planes": (_int32, [_pointer, _pointer, _int64, _int32]),
        "lmc_copy_pages": (
            _int64,
            [_pointer, _int64, _int64, _int64, _pointer, _int64, _int64, _pointer, _int32, _int32, _int32],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ""


_library, _why_not = _load()


def available() -> bool:
    """Whether the compiled library is in use."""
    return _library is not None


def why_not() -> str:
    """Why the compiled library is not in use, with the fix; empty when it is."""
    return _why_not


def library() -> ctypes.CDLL | None:
    """The compiled library, for bindings of other packages to what it also holds; None when it is not in use."""
    return _library


def simd() -> str:
    """Instruction sets in use, e.g. `avx512+sha`; `none` without the library."""
    return "none" if _library is None else _simd_name(_library.lmc_simd())


def limit_simd(name: str) -> str:
    """Use at most `portable`, `avx2` or `avx512`, each perhaps with `+sha`; return what is in use now.

    For tests and measurements: results are the same for every choice.
    """
    level, _, sha = name.partition("+")
    if level not in _LEVELS or sha not in ("", "sha"):
        raise ValueError(f"unknown instruction set {name!r}; one of {', '.join(_LEVELS)}, perhaps with '+sha'")
    return "none" if _library is None else _simd_name(_library.lmc_limit_simd(_LEVELS[level] | (_SHA if sha else 0)))


def _simd_name(sets: int) -> str:
    level = next(name for name, value in _LEVELS.items() if value == sets & ~_SHA)
    return f"{level}+sha" if sets & _SHA else level


def address_of(buffer: Buffer, *, writable: bool = False) -> int:
    """Address of the first byte of a contiguous buffer. Raise `ValueError` when it is not contiguous or read-only."""
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise ValueError(f"buffer of shape {buffer.shape} and strides {buffer.strides} is not contiguous")
        array = buffer
    else:
        array = _as_bytes(buffer)
    address, read_only = array.__array_interface__["data"]
    if writable and read_only:
        raise ValueError("buffer is read-only")
    return int(address)


def _as_bytes(buffer: Any) -> NDArray[np.uint8]:
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError(f"buffer of shape {view.shape} and strides {view.strides} is not contiguous")
    return np.frombuffer(view, np.uint8)


def view_at(address: int, nbytes: int) -> memoryview:
    """Writable view of `nbytes` bytes at `address`; the caller keeps them alive."""
    return memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")


def _batch(*columns: Integers) -> list[NDArray[np.int64]]:
    """The columns as contiguous int64 vectors of one length."""
    arrays = [np.ascontiguousarray(column, dtype=np.int64) for column in columns]
    if any(array.shape != (arrays[0].size,) for array in arrays):
        raise ValueError(f"a batch needs vectors of one length, got shapes {[array.shape for array in arrays]}")
    return arrays


xxh3_64: Callable[[Any], int] = xxhash.xxh3_64_intdigest
"""XXH3-64 (seed 0) of a buffer. The xxhash package: as fast as ours, half the call overhead, no GIL either."""


def xxh3_64_batch(addresses: Integers, lengths: Integers) -> NDArray[np.uint64]:
    """XXH3-64 (seed 0) of each region of memory."""
    at, sizes = _batch(addresses, lengths)
    out = np.empty(at.size, np.uint64)
    if _library is not None:
        _library.lmc_xxh3_64_batch(address_of(at), address_of(sizes), at.size, address_of(out))
    else:
        for i in range(at.size):
            out[i] = xxh3_64(view_at(int(at[i]), int(sizes[i])))
    return out


def sha256_chain(state: bytes, tokens: NDArray[np.int32], chunk_tokens: int) -> bytes:
    """Digests of a chain: d_i = SHA-256(d_{i-1} || tokens of chunk i as little-endian int32), d_{-1} = `state`.

    Return 32 bytes for each chunk of `chunk_tokens` tokens, one after the other. `tokens` must be whole chunks.
    """
    if len(state) != 32:
        raise ValueError(f"the chain's state is 32 bytes, not {len(state)}")
    if tokens.dtype != np.int32 or tokens.ndim != 1 or not tokens.flags.c_contiguous:
        raise ValueError(f"tokens must be a contiguous vector of int32, not {tokens.dtype} of shape {tokens.shape}")
    chunks, rest = divmod(tokens.size, chunk_tokens)
    if rest:
        raise ValueError(f"{tokens.size} tokens are not whole chunks of {chunk_tokens}")
    if _library is not None:
        out = ctypes.create_string_buffer(32 * chunks)
        _library.lmc_sha256_chain(state, address_of(tokens), chunk_tokens, chunks, out)
        return out.raw
    view = np.ascontiguousarray(tokens, dtype="<i4").data.cast("B")
    step, digests = 4 * chunk_tokens, []
    for i in range(chunks):
        sha = hashlib.sha256(state)
        sha.update(view[i * step : (i + 1) * step])
        state = sha.digest()
        digests.append(state)
    return b"".join(digests)


def copy_batch(destinations: Integers, sources: Integers, lengths: Integers, threads: int = 1) -> None:
    """Copy `lengths[i]` bytes from `sources[i]` to `destinations[i]` (addresses); regions must not overlap."""
    to, at, sizes = _batch(destinations, sources, lengths)
    if _library is not None:
        _library.lmc_copy_batch(address_of(to), address_of(at), address_of(sizes), to.size, threads)
        return
    work = [(int(to[i]), int(at[i]), int(sizes[i])) for i in range(to.size)]
    if threads < 2 or len(work) < 2:
        for move in work:
            ctypes.memmove(*move)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda move: ctypes.memmove(*move), work))


def pread_batch(fds: Integers, offsets: Integers, addresses: Integers, lengths: Integers) -> NDArray[np.int64]:
    """Read `lengths[i]` bytes at `offsets[i]` of `fds[i]` into memory at `addresses[i]`.

    Return the bytes read (fewer only at end of file), or -errno, for each. Short reads and EINTR are continued.
    """
    return _io_batch("lmc_pread_batch", os.preadv, fds, offsets, addresses, lengths)


def pwrite_batch(fds: Integers, offsets: Integers, addresses: Integers, lengths: Integers) -> NDArray[np.int64]:
    """Write `lengths[i]` bytes from memory at `addresses[i]` to `offsets[i]` of `fds[i]`.

    Return the bytes written, or -errno, for each. Short writes and EINTR are continued.
    """
    return _io_batch("lmc_pwrite_batch", os.pwritev, fds, offsets, addresses, lengths)


def _io_batch(
    name: str,
    transfer: Callable[[int, list[memoryview], int], int],
    fds: Integers,
    offsets: Integers,
    addresses: Integers,
    lengths: Integers,
) -> NDArray[np.int64]:
    files, starts, at, sizes = _batch(fds, offsets, addresses, lengths)
    out = np.empty(at.size, np.int64)
    if _library is not None:
        numbers = files.astype(np.int32)
        function = getattr(_library, name)
        function(address_of(numbers), address_of(starts), address_of(at), address_of(sizes), at.size, address_of(out))
        return out
    for i in range(at.size):
        out[i] = _whole(transfer, int(files[i]), int(starts[i]), int(at[i]), int(sizes[i]))
    return out


def _whole(
    transfer: Callable[[int, list[memoryview], int], int], fd: int, offset: int, address: int, length: int
) -> int:
    moved = 0
    while moved < length:
        try:
            got = transfer(fd, [view_at(address + moved, length - moved)], offset + moved)
        except OSError as error:
            return -(error.errno or errno.EIO)
        if not got:
            break
        moved += got
    return moved


def split_planes(elements: Buffer, planes: Buffer, itemsize: int) -> None:
    """Byte k of every `itemsize`-byte element (2 or 4) into plane k; the planes follow each other in `planes`."""
    source, target, count = _planes(elements, planes, itemsize)
    if _library is not None:
        _library.lmc_split_planes(address_of(source), address_of(target, writable=True), count, itemsize)
    else:
        target.reshape(itemsize, count)[:] = source.reshape(count, itemsize).T


def join_planes(planes: Buffer, elements: Buffer, itemsize: int) -> None:
    """The inverse of `split_planes`."""
    source, target, count = _planes(planes, elements, itemsize)
    if _library is not None:
        _library.lmc_join_planes(address_of(source), address_of(target, writable=True), count, itemsize)
    else:
        target.reshape(count, itemsize)[:] = source.reshape(itemsize, count).T


def _planes(source: Buffer, target: Buffer, itemsize: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
    if itemsize not in (2, 4):
        raise ValueError(f"byte planes need elements of 2 or 4 bytes, not {itemsize}")
    given, room = _as_bytes(source), _as_bytes(target)
    if given.size != room.size or given.size % itemsize:
        raise ValueError(f"cannot arrange {given.size} bytes of {itemsize}-byte elements into {room.size} bytes")
    return given, room, given.size // itemsize


def copy_pages(
    parts: Any,
    layers: int,
    num_blocks: int,
    block_ids: NDArray[np.int64],
    slots: NDArray[np.int64],
    *,
    to_slots: bool,
    skip_negative: bool,
    threads: int,
) -> int:
    """`lmc_copy_pages` of lmcache_host.h; `parts` is a ctypes array of `Part`. Only when `available()`."""
    if _library is None:
        raise RuntimeError(f"no native library: {_why_not}")
    chunks, blocks = block_ids.shape
    result: int = _library.lmc_copy_pages(
        parts,
        len(parts),
        layers,
        num_blocks,
        address_of(block_ids),
        chunks,
        blocks,
        address_of(slots),
        to_slots,
        skip_negative,
        threads,
    )
    return result
