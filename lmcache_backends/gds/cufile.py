"""cuFile (GPUDirect Storage) through the library that cufile-python loads.

cufile-python 0.2 declares the results of `cuFileRead` and `cuFileWrite` unsigned and looks at neither, continues no
short transfer, registers a file each time it is opened, and loads nothing but `libcufile.so`, which NVIDIA's wheels do
not hold. So its library is taken, with prototypes of our own. API: cufile.h of CUDA 12 and 13.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from lmcache_backends.gds import cufile_probe
from lmcache_backends.gds.cufile_probe import Status
from lmcache_backends.gds.mover import Failure, Mover, MoverError, Piece
from lmcache_core.protocols import Region
from lmcache_core.types import PAGE

PROBE_S: Final = 5.0
"""Most time that opening the driver may take."""

_FIX: Final = "install CUDA's libcufile (or `pip install nvidia-cufile`), or use `mover: host`"
_ERRORS: Final = 5000
"""Error numbers of cuFile start behind it."""
_NAMES: Final = {
    1: "DRIVER_NOT_INITIALIZED", 2: "DRIVER_INVALID_PROPS", 3: "DRIVER_UNSUPPORTED_LIMIT",
    4: "DRIVER_VERSION_MISMATCH", 5: "DRIVER_VERSION_READ_ERROR", 6: "DRIVER_CLOSING", 7: "PLATFORM_NOT_SUPPORTED",
    8: "IO_NOT_SUPPORTED", 9: "DEVICE_NOT_SUPPORTED", 10: "NVFS_DRIVER_ERROR", 11: "CUDA_DRIVER_ERROR",
    12: "CUDA_POINTER_INVALID", 13: "CUDA_MEMORY_TYPE_INVALID", 14: "CUDA_POINTER_RANGE_ERROR",
    15: "CUDA_CONTEXT_MISMATCH", 16: "INVALID_MAPPING_SIZE", 17: "INVALID_MAPPING_RANGE", 18: "INVALID_FILE_TYPE",
    19: "INVALID_FILE_OPEN_FLAG", 20: "DIO_NOT_SET", 22: "INVALID_VALUE", 23: "MEMORY_ALREADY_REGISTERED",
    24: "MEMORY_NOT_REGISTERED", 25: "PERMISSION_DENIED", 26: "DRIVER_ALREADY_OPEN", 27: "HANDLE_NOT_REGISTERED",
    28: "HANDLE_ALREADY_REGISTERED", 29: "DEVICE_NOT_FOUND", 30: "INTERNAL_ERROR", 31: "GETNEWFD_FAILED",
    33: "NVFS_SETUP_ERROR", 34: "IO_DISABLED", 35: "BATCH_SUBMIT_FAILED", 36: "GPU_MEMORY_PINNING_FAILED",
    37: "BATCH_FULL", 38: "ASYNC_NOT_SUPPORTED", 39: "INTERNAL_BATCH_SETUP_ERROR", 40: "INTERNAL_BATCH_SUBMIT_ERROR",
    41: "INTERNAL_BATCH_GETSTATUS_ERROR", 42: "INTERNAL_BATCH_CANCEL_ERROR", 43: "NOMEM_ERROR", 44: "IO_ERROR",
    45: "INTERNAL_BUF_REGISTER_ERROR", 46: "HASH_OPR_ERROR", 47: "INVALID_CONTEXT_ERROR",
    48: "NVFS_INTERNAL_DRIVER_ERROR", 49: "BATCH_NOCOMPAT_ERROR", 50: "IO_MAX_ERROR",
}  # fmt: skip
_ALREADY_REGISTERED: Final = 5023
_ALREADY_OPEN: Final = 5026
_OPAQUE_FD: Final = 1

_pointer, _size, _offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64


class _Description(ctypes.Structure):
    """`CUfileDescr_t`: the descriptor lies in a union with a pointer."""

    _fields_ = (("type", ctypes.c_int), ("fd", ctypes.c_int64), ("fs_ops", _pointer))


def explain(err: int, cu_err: int = 0) -> str:
    """A cuFile error in words, with the CUDA driver's where there is one."""
    name = _NAMES.get(err - _ERRORS)
    text = f"CU_FILE_{name} ({err})" if name else f"error {err}"
    return f"{text}, {_cuda_error(cu_err)}" if cu_err else text


def _cuda_error(code: int) -> str:
    name = ctypes.c_char_p()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuGetErrorName(code, ctypes.byref(name))
    return f"{(name.value or b'CUDA error').decode()} ({code})"


def _failed(result: int) -> str:
    """What a negative result of `cuFileRead` or `cuFileWrite` means; -1 leaves it to errno."""
    if -result > _ERRORS:
        return explain(-result)
    return os.strerror(ctypes.get_errno() if result == -1 else -result)


class Api:
    """The functions of a loaded cuFile that are used here. They run without the GIL."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raise `MoverError` where functions are missing."""

        def function(symbol: str, result: Any, *arguments: Any) -> Callable[..., Any]:
            return ctypes.CFUNCTYPE(result, *arguments, use_errno=True)((symbol, library))

        moves = (ctypes.c_ssize_t, _pointer, _pointer, _size, _offset, _offset)
        try:
            self.open = function("cuFileDriverOpen", Status)
            self.close = function("cuFileDriverClose", Status)
            self.add_file = function("cuFileHandleRegister", Status, _pointer, _pointer)
            self.remove_file = function("cuFileHandleDeregister", None, _pointer)
            self.add_memory = function("cuFileBufRegister", Status, _pointer, _size, ctypes.c_int)
            self.remove_memory = function("cuFileBufDeregister", Status, _pointer)
            self.read = function("cuFileRead", *moves)
            self.write = function("cuFileWrite", *moves)
        except AttributeError as error:
            raise MoverError(f"{library._name} is no cuFile: {error}") from error
        self.path = _file_of(ctypes.cast(library.cuFileDriverOpen, _pointer).value or 0)
        """Where it was found. By its name another process may find another one, or none."""


def _file_of(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if start <= address < end:
            return line.split(maxsplit=5)[5]
    raise MoverError(f"no file is mapped at {address:#x}")


def candidates() -> Iterator[str]:
    """Other names of the library than cufile-python knows: the loader's, and those of NVIDIA's wheels."""
    yield "libcufile.so.0"
    nvidia = importlib.util.find_spec("nvidia")
    for place in (nvidia and nvidia.submodule_search_locations) or ():
        yield from map(str, sorted(Path(place).glob("*/lib/libcufile.so.0")))


def load() -> Api:
    """Load cuFile, without opening its driver. Raise `MoverError` with the fix."""
    try:
        from cufile import bindings
    except ImportError as error:
        raise MoverError(f"cufile-python cannot be imported ({error}): pip install lmcache-core[gds]") from error
    except OSError as error:
        reasons = [str(error)]
    else:
        return Api(bindings.libcufile)
    for name in candidates():
        try:
            return Api(ctypes.CDLL(name))
        except OSError as error:
            reasons.append(str(error))
    raise MoverError(f"cuFile cannot be loaded ({'; '.join(reasons)}): {_FIX}")


@functools.cache
def _verdict(library: str, seconds: float) -> tuple[str, str]:
    """Version of nvidia-fs, and why the driver cannot be opened (empty where it can)."""
    # Not in the terminal's group, and in a directory of its own: the library writes a log where it is.
    with tempfile.TemporaryDirectory(prefix="lmcache-cufile-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", os.path.abspath(cufile_probe.__file__), library],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            known = "" if Path("/proc/modules").exists() else "; it is known to hang where /proc/modules is missing"
            return "", f"opening its driver has not ended within {seconds:g} s{known}"
    try:
        said = json.loads(out.splitlines()[-1])
        err, cu_err = int(said["err"]), int(said["cu_err"])
    except (IndexError, ValueError, TypeError, KeyError):
        return "", f"opening its driver ended the process that tried it (exit {process.returncode})"
    if err:
        return "", f"cuFileDriverOpen: {explain(err, cu_err)}"
    return str(said.get("nvfs", "unknown")), ""


_probing = threading.Lock()


def probe(api: Api) -> str:
    """What a process that opened the driver found there. Raise `MoverError`. Tried once for each process of ours."""
    with _probing:
        nvfs, why_not = _verdict(api.path, PROBE_S)
    if why_not:
        raise MoverError(f"cuFile does not work here: {why_not}")
    return "compatibility mode, nvidia-fs is not loaded" if nvfs == "0.0" else f"nvidia-fs {nvfs}"


class _Driver:
    """The driver of this process, open as long as some mover uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._ours = False

    def take(self, api: Api) -> None:
        with self._lock:
            if not self._users:
                status = api.open()
                if status.err not in (0, _ALREADY_OPEN):
                    raise MoverError(f"cuFileDriverOpen: {explain(status.err, status.cu_err)}")
                self._ours = status.err == 0
            self._users += 1

    def give(self, api: Api) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._ours:
                api.close()


_driver = _Driver()


class CufileMover(Mover):
    """Each span with one call, continued where it stops early at a page's end."""

    name: ClassVar[str] = "cuFile"

    def __init__(self) -> None:
        self._threads = threading.local()
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._registered: set[int] = set()
        """Addresses of regions that cuFile knows."""
        self._ours: list[int] = []

    def start(self) -> str:
        self._api = load()
        found = probe(self._api)
        _driver.take(self._api)
        return found

    def register(self, region: Region) -> None:
        self._enter(region)
        status = self._api.add_memory(region.address, region.nbytes, 0)
        if status.err not in (0, _ALREADY_REGISTERED):
            raise MoverError(f"cuFileBufRegister: {explain(status.err, status.cu_err)}; used without")
        self._registered.add(region.address)
        if not status.err:
            self._ours.append(region.address)

    def open(self, fd: int) -> int:
        handle = _pointer()
        description = _Description(type=_OPAQUE_FD, fd=fd)
        status = self._api.add_file(ctypes.byref(handle), ctypes.byref(description))
        if status.err:
            raise MoverError(f"cuFileHandleRegister: {explain(status.err, status.cu_err)}")
        return handle.value or 0

    def shut(self, file: int) -> None:
        self._api.remove_file(file)

    def move(self, pieces: Sequence[Piece], *, write: bool) -> list[Failure | None]:
        name, call = ("cuFileWrite", self._api.write) if write else ("cuFileRead", self._api.read)
        results: list[Failure | None] = []
        for piece in pieces:
            try:
                self._enter(piece.region)
                self._whole(name, call, piece)
            except MoverError as error:
                results.append(Failure(str(error)))
            else:
                results.append(None)
        return results

    def close(self) -> None:
        for address in self._ours:
            self._api.remove_memory(address)
        _driver.give(self._api)

    def _whole(self, name: str, call: Callable[..., int], piece: Piece) -> None:
        base = piece.region.address if piece.region.address in self._registered else piece.address
        done = 0
        while done < piece.nbytes:
            left = piece.nbytes - done
            got = call(piece.file, base, left, piece.offset + done, piece.address - base + done)
            if got < 0:
                raise MoverError(f"{name}: {_failed(got)}")
            if got == 0 or got > left or (got < left and got % PAGE):
                raise MoverError(f"{name}: a transfer that ended too early, too late or inside a page")
            done += got

    def _enter(self, region: Region) -> None:
        """Make the device's primary context current on this thread: cuFile looks for one there."""
        device = region.device
        if device is None or getattr(self._threads, "device", None) == device:
            return
        if device not in self._contexts:
            self._contexts[device] = _primary_context(device)
        _drive("cuCtxSetCurrent", self._contexts[device])
        self._threads.device = device


def _drive(name: str, *arguments: Any) -> None:
    """Call the CUDA driver. Raise `MoverError`."""
    try:
        code = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    except (OSError, AttributeError) as error:
        raise MoverError(f"{name}: {error}") from error
    if code:
        raise MoverError(f"{name}: {_cuda_error(code)}")


def _primary_context(device: int) -> ctypes.c_void_p:
    context, handle = _pointer(), ctypes.c_int()
    _drive("cuInit", 0)
    _drive("cuDeviceGet", ctypes.byref(handle), device)
    _drive("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context
