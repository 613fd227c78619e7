"""Builds and loads tests/cuda_emulation.cpp: the CUDA kernels' arithmetic, run on the host."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcache_core import _cuda, _native
from lmcache_serde.cachegen import native
from lmcache_serde.cachegen.format import DTYPES, TABLES, Coding, Shape
from lmcache_serde.cachegen.profile import Profile

ROOT = Path(__file__).parents[1]


@functools.cache
def build() -> ctypes.CDLL | None:
    """The library; None where there is no compiler."""
    compiler = next(filter(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")), None)
    if compiler is None:
        return None
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = ROOT / "tests" / "cuda_emulation.cpp"
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "emulation.so"
        subprocess.run([compiler, *options, f"-I{ROOT}/csrc/include", source, "-o", out], check=True)
        library = ctypes.CDLL(str(out))  # stays when the file is gone
    library.emulate_copy_pages.restype = ctypes.c_int64
    library.emulate_copy_pages.argtypes = [*_cuda._SIGNATURES["lmc_cuda_copy_pages"]]
    pointer, uint64 = ctypes.c_void_p, ctypes.c_uint64
    library.emulate_decode.argtypes = [pointer, uint64, pointer, uint64, pointer, pointer]
    library.emulate_encode.restype = ctypes.c_int64
    library.emulate_encode.argtypes = [
        *(pointer, pointer, uint64, pointer, uint64, pointer, pointer),
        *(ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint8, pointer),
    ]
    library.emulate_divide.argtypes = [ctypes.c_uint32, ctypes.c_uint32]
    library.emulate_divide.restype = ctypes.c_int64
    for name in ("emulate_loads", "emulate_stores"):
        getattr(library, name).argtypes = [ctypes.c_int32, pointer, ctypes.c_int64, pointer]
    return library


def _lent(profile: Profile) -> Any:
    addresses = [_native.address_of(part) for part in native.profile_parts(profile)]
    return ctypes.byref(native.profile_at(profile, addresses))


class Codec:
    """The codec's kernels, as loops."""

    def __init__(self, library: ctypes.CDLL, shape: Shape) -> None:
        self._library, self._shape = library, shape
        sizes = [DTYPES[shape.dtype], shape.layers, shape.planes, shape.tokens, shape.channels]
        self._given = np.array(sizes, np.int32)

    def encode(
        self, coding: Coding, chunk: NDArray[np.uint8], profile: Profile | None = None, start: int = 0
    ) -> NDArray[np.uint8]:
        out = np.full(self._shape.bound + 64, 0xEE, np.uint8)
        lent = None if profile is None else _lent(profile)
        coding = coding.checked(self._shape)
        at = [array.ctypes.data for array in (chunk, self._given, coding.modes, coding.offsets)]
        rest = (coding.n_raw, coding.tile_tokens, coding.level, out.ctypes.data)
        size = self._library.emulate_encode(at[0], at[1], TABLES.id, lent, start, at[2], at[3], *rest)
        assert (out[size:] == 0xEE).all()
        return out[:size]

    def decode(self, blob: NDArray[np.uint8], profile: Profile | None = None) -> NDArray[np.uint8] | None:
        """The chunk; None where the blob is refused."""
        lent = None if profile is None else _lent(profile)
        out = np.full(self._shape.nbytes, 0xEE, np.uint8)
        given = (blob.ctypes.data, blob.size, self._given.ctypes.data, TABLES.id, lent, out.ctypes.data)
        return None if self._library.emulate_decode(*given) else out


class Pages:
    """`_native.copy_pages` by the kernels' arithmetic."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.rope: _cuda.Rope | None = None

    def __call__(
        self,
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
        chunks, blocks = block_ids.shape
        turn = None if self.rope is None else ctypes.byref(_cuda.rope_of(self.rope))
        result: int = self._library.emulate_copy_pages(
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
            turn,
        )
        return result
