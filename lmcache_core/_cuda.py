"""The one door to `liblmcache_cuda.so` (csrc/cuda): page copies and the codec on NVIDIA GPUs, without the GIL.

Nothing here needs torch: streams, events and addresses are integers, and those of torch will do
(`torch.cuda.current_stream().cuda_stream`, `tensor.data_ptr()`). The library loads anywhere; where there is no driver
or no GPU every call raises `CudaError` and `why_not()` says what is missing. Whoever passes an address vouches for
the memory behind it, and keeps it until what was queued on the stream has been done.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lmcache_core import _native

if TYPE_CHECKING:
    from numpy.typing import NDArray

ABI_VERSION: Final = 1
LIBRARY: Final = Path(__file__).with_name("liblmcache_cuda.so")
DTYPES: Final = {"bfloat16": 0, "float16": 1, "float32": 2}
PATHS: Final = {"kernel": 0, "staged": 1, "engine": 2}

MALFORMED: Final = -errno.EINVAL
UNREACHABLE: Final = -errno.EFAULT

_CUDA_ERROR: Final = -1000

_int32, _int64, _uint64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


class CudaError(RuntimeError):
    """A call into the CUDA library failed; `code` is its result."""

    def __init__(self, what: str, code: int, why: str) -> None:
        number = f" (CUDA error {_CUDA_ERROR - code})" if code <= _CUDA_ERROR else ""
        super().__init__(f"{what}: {why}{number}")
        self.code = code


class _Rope(ctypes.Structure):
    """`lmc_rope` of lmcache_cuda.h."""

    _fields_ = (
        ("table", _int64),
        ("dtype", _int32),
        ("head_dims", _int32),
        ("rotary_dims", _int32),
        ("interleaved", _int32),
    )


class _How(ctypes.Structure):
    """`lmc_cuda_how` of lmcache_cuda.h."""

    _fields_ = (
        ("device", _int32),
        ("path", _int32),
        ("ctas", _int32),
        ("reserved", _int32),
        ("stream", _uint64),
        ("ring", _uint64),
        ("slot_bytes", _int64),
        ("rope", _pointer),
    )


_SIGNATURES: Final[dict[str, list[Any]]] = {
    "lmc_cuda_device_count": [],
    "lmc_cuda_multiprocessors": [_int32],
    "lmc_cuda_bus_id": [_int32, _pointer, _int32],
    "lmc_cuda_memory": [_int32, _pointer, _pointer],
    "lmc_cuda_allocate": [_int32, _int64, _pointer],
    "lmc_cuda_free": [_int32, _int64],
    "lmc_cuda_stream_create": [_int32, _pointer],
    "lmc_cuda_stream_destroy": [_uint64],
    "lmc_cuda_event_create": [_int32, _pointer],
    "lmc_cuda_event_destroy": [_uint64],
    "lmc_cuda_record": [_uint64, _uint64],
    "lmc_cuda_query": [_uint64],
    "lmc_cuda_synchronize": [_uint64],
    "lmc_cuda_wait": [_uint64, _uint64],
    "lmc_cuda_pin": [_int64, _int64],
    "lmc_cuda_unpin": [_int64],
    "lmc_cuda_unreachable": [_int32, _pointer, _int64],
    "lmc_cuda_copy_batch": [_int32, _pointer, _pointer, _pointer, _int64, _uint64],
    "lmc_cuda_ring_create": [_int32, _int64, _int64, _int64, _pointer],
    "lmc_cuda_ring_destroy": [_uint64],
    "lmc_cuda_codec_numbers": [_pointer, _int64],
    "lmc_cuda_codec_scratch": [_pointer, _int64, _int32],
    "lmc_cuda_codec_decode": [
        *(_int32, _pointer, _uint64, _pointer, _pointer, _pointer, _int64, _int32, _int32),
        *(_int64, _int64, _int64, _int32, _uint64),
    ],
    "lmc_cuda_codec_encode": [
        *(_int32, _pointer, _uint64, _pointer, _pointer, _int64, _int64, _int64, _int64, _int64, _uint64),
    ],
    "lmc_cuda_copy_pages": [
        *(_pointer, _int64, _int64, _int64, _pointer, _int64, _int64, _pointer, _int32, _int32, _pointer),
    ],
}


def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("LMCACHE_NATIVE", "1") == "0":
        return None, "switched off by LMCACHE_NATIVE=0"
    if not LIBRARY.is_file():
        return None, f"{LIBRARY.name} was not built: put nvcc 11.8 or newer on PATH and reinstall lmcache-core"
    try:
        library = ctypes.CDLL(os.fspath(LIBRARY))
        version = int(library.lmc_cuda_abi_version())
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = _int64, arguments
        library.lmc_cuda_error.restype, library.lmc_cuda_error.argtypes = ctypes.c_char_p, [_int64]
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} does not load ({error}): reinstall lmcache-core"
    if version != ABI_VERSION:
        return None, f"{LIBRARY.name} has ABI {version}, these sources need {ABI_VERSION}: reinstall lmcache-core"
    return library, ""


_library, _why_not = _load()


def call(name: str, *arguments: Any) -> int:
    """Call `lmc_cuda_<name>`; raise `CudaError` for a negative result, and where there is no library."""
    if _library is None:
        raise CudaError(name, -errno.ENOSYS, _why_not)
    result: int = getattr(_library, f"lmc_cuda_{name}")(*arguments)
    if result < 0:
        raise CudaError(name, result, _library.lmc_cuda_error(result).decode())
    return result


def why_not() -> str:
    """Why no GPU can be used, with the fix where there is one; empty when one can."""
    try:
        return "" if call("device_count") else "no CUDA device: the driver lists none (see CUDA_VISIBLE_DEVICES)"
    except CudaError as error:
        return _why_not or f"no CUDA device: {error}; install a driver that knows CUDA 12 or newer"


def available() -> bool:
    """Whether the library is there and there is a GPU for it."""
    return not why_not()


def multiprocessors(device: int) -> int:
    """Streaming multiprocessors of a device."""
    return call("multiprocessors", device)


def bus_id(device: int) -> str:
    """PCI bus id of a device as the kernel writes it, e.g. `0000:3b:00.0`."""
    out = ctypes.create_string_buffer(32)
    call("bus_id", device, out, len(out))
    return out.value.decode().lower()


def memory(device: int) -> tuple[int, int]:
    """Bytes of device memory: free now, and in all."""
    free, total = _int64(), _int64()
    call("memory", device, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def allocate(nbytes: int, device: int) -> int:
    """Address of `nbytes` of device memory; `free` gives them back."""
    return _created("allocate", device, nbytes)


def free(address: int, device: int) -> None:
    """Give back what `allocate` gave; waits for the device."""
    call("free", device, address)


def _created(name: str, *arguments: int) -> int:
    out = _uint64()
    call(name, *arguments, ctypes.byref(out))
    return out.value


class Stream:
    """A stream of a device; `handle` is its address."""

    def __init__(self, device: int = 0) -> None:
        self.handle = _created("stream_create", device)

    def close(self) -> None:
        call("stream_destroy", self.handle)


class Event:
    """Fires when the work queued on a stream before `record` is done. One that was never recorded has fired."""

    def __init__(self, device: int = 0) -> None:
        self.handle = _created("event_create", device)

    def record(self, stream: int) -> None:
        call("record", self.handle, stream)

    def hold(self, stream: int) -> None:
        """Let what is queued on the stream from now on start after it has fired."""
        call("wait", stream, self.handle)

    def fired(self) -> bool:
        return bool(call("query", self.handle))

    def synchronize(self) -> None:
        """Wait, without the GIL, until it has fired."""
        call("synchronize", self.handle)

    def close(self) -> None:
        call("event_destroy", self.handle)


class Ring:
    """`places` equal parts of `nbytes` of device memory at `address`, for copies by way of the copy engine.

    The caller owns the memory and closes the ring before giving it back. For one copy at a time.
    """

    def __init__(self, address: int, nbytes: int, places: int = 4, device: int = 0) -> None:
        self.handle = _created("ring_create", device, address, nbytes, places)

    def close(self) -> None:
        call("ring_destroy", self.handle)


def pin(address: int, nbytes: int) -> None:
    """Pin host memory and map it for all devices."""
    call("pin", address, nbytes)


def unpin(address: int) -> None:
    """Undo `pin`."""
    call("unpin", address)


def unreachable(addresses: NDArray[np.int64], device: int) -> int | None:
    """Index of the first address that kernels on the device cannot reach, None when there is none."""
    found = call("unreachable", device, _native.address_of(addresses), addresses.size)
    return found - 1 if found else None


def copy_batch(
    destinations: NDArray[np.int64],
    sources: NDArray[np.int64],
    lengths: NDArray[np.int64],
    stream: int,
    device: int = 0,
) -> None:
    """Queue copies of `lengths[i]` bytes between any two of device and host memory; contiguous vectors of int64."""
    if not destinations.shape == sources.shape == lengths.shape == (destinations.size,):
        raise ValueError("a batch needs vectors of one length")
    at = (_native.address_of(column) for column in (destinations, sources, lengths))
    call("copy_batch", device, *at, destinations.size, stream)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation of K on its way, to move it by `delta` positions: see `lmc_rope` in lmcache_cuda.h.

    `table` is the address, for the device, of float32 `[chunks, rotary_dims / 2, 2]`: cos and sin of delta times the
    frequency of each pair. Pairs are (i, i + rotary_dims / 2), or (2 i, 2 i + 1) when `interleaved`. With paths
    `kernel` and `staged`, for heads in multiples of 16 bytes.
    """

    table: int
    dtype: str
    """A key of `DTYPES`."""
    head_dims: int
    rotary_dims: int
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class How:
    """Which way the bytes of `copy_pages` go.

    * `kernel`: a kernel reads and writes pages and slots where they lie: slots in device memory, or pinned;
    * `staged`: the kernel and the copy engine meet in `ring`;
    * `engine`: the copy engine alone, one copy for each run of contiguous bytes: for few and long runs.
    """

    stream: int
    device: int = 0
    path: Literal["kernel", "staged", "engine"] = "kernel"
    ctas: int = 0
    """At most so many thread blocks, to leave the rest of the device to others; 0: as many as are useful."""
    ring: Ring | None = None
    rope: Rope | None = None


def rope_of(rope: Rope) -> _Rope:
    """The rotation as the C ABI has it."""
    return _Rope(rope.table, DTYPES[rope.dtype], rope.head_dims, rope.rotary_dims, rope.interleaved)


def copy_pages(
    parts: Any,
    layers: int,
    num_blocks: int,
    block_ids: NDArray[np.int64],
    slots: NDArray[np.int64],
    how: How,
    *,
    slot_bytes: int,
    to_slots: bool,
    skip_negative: bool,
) -> int:
    """`lmc_cuda_copy_pages` of lmcache_cuda.h; `parts` is a ctypes array of `_native.Part`.

    Return 0, or 1 + the flat index of the first block id outside [0, num_blocks), and then nothing was queued.
    """
    rope = rope_of(how.rope) if how.rope is not None else None
    options = _How(
        device=how.device,
        path=PATHS[how.path],
        ctas=how.ctas,
        stream=how.stream,
        ring=how.ring.handle if how.ring is not None else 0,
        slot_bytes=slot_bytes,
        rope=ctypes.addressof(rope) if rope is not None else None,
    )
    chunks, blocks = block_ids.shape
    return call(
        "copy_pages",
        parts,
        len(parts),
        layers,
        num_blocks,
        _native.address_of(block_ids),
        chunks,
        blocks,
        _native.address_of(slots),
        to_slots,
        skip_negative,
        ctypes.byref(options),
    )
