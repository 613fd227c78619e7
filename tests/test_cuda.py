"""The CUDA library without a GPU: its kernels' arithmetic on the host, and clean refusals where there is no driver.

tests/gpu runs the same cases on a device.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_emulation
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_copies import (
    ENGINES,
    POISON,
    SHAPES,
    Array,
    Engine,
    at,
    both_ways,
    fill,
    geometries,
    lay,
    layer_bases,
    numbered,
)

from lmcache_core import _cuda, _native
from lmcache_core.copies import SKIP, PagedKV, PageGeometry, Plane, copy_reference
from lmcache_core.gpu import CudaError, GpuPagedKV, How, Rope
from lmcache_core.layout import DTYPE_BYTES
from lmcache_serde.cachegen.format import DTYPES
from lmcache_serde.cachegen.reference import from_float, to_float


@pytest.fixture(scope="module")
def emulation() -> ctypes.CDLL:
    library = cuda_emulation.build()
    if library is None:
        pytest.skip("no C++ compiler here")
    return library


@pytest.fixture
def emulated(emulation: ctypes.CDLL) -> Iterator[cuda_emulation.Pages]:
    """`PagedKV` copies by the kernels' arithmetic."""
    pages = cuda_emulation.Pages(emulation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "available", lambda: True)
        patch.setattr(_native, "copy_pages", pages)
        yield pages


# Arithmetic.


def test_divisions_by_multiplication(emulation: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    divisors = [*range(1, 70), *(2**k + d for k in range(7, 31) for d in (-1, 0, 1)), 2**31 - 1]
    for d in divisors:
        near = [n for k in (1, 2, 3, (2**31 - 1) // d) for n in (k * d - 1, k * d, k * d + 1) if 0 <= n < 2**31]
        for n in [0, 1, 2**31 - 1, *near, *rng.integers(0, 2**31, 20).tolist()]:
            assert emulation.emulate_divide(n, d) == n // d, (n, d)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_conversions_equal_the_reference(emulation: ctypes.CDLL, dtype: str) -> None:
    rng = np.random.default_rng(1)
    item = DTYPE_BYTES[dtype]
    codes = np.arange(1 << 8 * item, dtype=np.uint32)
    values = np.zeros(codes.size, np.float32)
    emulation.emulate_loads(DTYPES[dtype], codes.ctypes.data, codes.size, values.ctypes.data)
    assert np.array_equal(values, to_float(codes.astype(f"u{item}"), dtype), equal_nan=True)

    ties = (np.arange(0, 65536, 7, dtype=np.uint32) << 16) + np.array([[0x7FFF], [0x8000], [0x8001]], np.uint32)
    small = np.arange(0x33000000, 0x38900000, 0x1FFF, dtype=np.uint32)  # denormals of float16, and below
    known = values[np.isfinite(values)]
    between = (known[:-1] + known[1:]) / 2 if item == 1 else known
    bits = np.concatenate([ties.ravel(), small, rng.integers(0, 2**32, 50000, dtype=np.uint32)])
    numbers = np.concatenate([bits.view(np.float32), between, -between])
    numbers = np.ascontiguousarray(numbers[np.isfinite(numbers)])
    out = np.zeros(numbers.size, np.uint32)
    emulation.emulate_stores(DTYPES[dtype], numbers.ctypes.data, numbers.size, out.ctypes.data)
    assert np.array_equal(out, from_float(numbers, dtype))


# Pages.


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "vllm amx"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pages_to_canonical_slots_and_back(emulated: cuda_emulation.Pages, name: str, shape: str) -> None:
    layout = lay(**SHAPES[shape])
    ids = np.random.default_rng(1).permutation(9)[: 2 * layout.blocks].reshape(2, layout.blocks)
    both_ways(ENGINES[name](layout, 9), layout, numbered(layout, 2), ids)


# One launch takes 128 bases, 32 slots and 512 block ids.
@pytest.mark.parametrize(
    "changes, chunks",
    [
        ({"num_layers": 70, "kv_heads": 1, "head_dim": 16, "chunk_tokens": 4, "block_tokens": 2}, 3),
        ({"num_layers": 1, "kv_heads": 1, "head_dim": 16, "chunk_tokens": 4, "block_tokens": 2}, 40),
        ({"num_layers": 2, "kv_heads": 1, "head_dim": 16, "chunk_tokens": 520, "block_tokens": 1}, 2),
        ({"num_layers": 1, "kv_heads": 1, "head_dim": 16, "chunk_tokens": 100, "block_tokens": 1}, 12),
    ],
    ids=["layers", "chunks", "blocks", "ids"],
)
@pytest.mark.parametrize("name", ["nhd apart", "hnd packed, block-major"])
def test_batches_of_several_launches(
    emulated: cuda_emulation.Pages, name: str, changes: dict[str, int], chunks: int
) -> None:
    layout = lay(**changes)
    blocks = chunks * layout.blocks
    ids = np.random.default_rng(1).permutation(blocks + 1)[:blocks].reshape(chunks, layout.blocks)
    both_ways(ENGINES[name](layout, blocks + 1), layout, numbered(layout, chunks), ids)


def test_mla_latents_and_opaque_pages(emulated: cuda_emulation.Pages) -> None:
    layout = lay(planes=1, kv_heads=1, head_dim=72)
    pages = np.full((layout.num_layers, 5, layout.block_tokens, 72), 0xEEEE, np.uint16)

    def store(layer: int, plane: int, block: int, token: int, head: int, vector: Array) -> None:
        pages[layer, block, token] = vector

    engine = Engine(PageGeometry.nhd(layout), pages, layer_bases(pages), 5, store)
    both_ways(engine, layout, numbered(layout, 2), np.array([[4, 0], [1, 3]]))

    opaque = replace(layout, order="pages", packing="test/1")
    paged = PagedKV(layer_bases(pages), PageGeometry.opaque(opaque), 5)
    slot = np.zeros(opaque.chunk_bytes, np.uint8)
    paged.gather([[4, 1]], [slot.ctypes.data])
    assert np.array_equal(slot.view(np.uint16), pages[:, [4, 1]].ravel())


@settings(max_examples=20)
@given(made=geometries(), data=st.data())
def test_random_geometries_equal_the_reference(
    emulation: ctypes.CDLL, made: tuple[PageGeometry, int], data: st.DataObject
) -> None:
    geometry, page_bytes = made
    num_blocks, chunks = 7, data.draw(st.integers(0, 2), label="chunks")
    shift = data.draw(st.sampled_from([0, 1, 8]), label="shift")
    order = data.draw(st.permutations(range(num_blocks)), label="blocks")
    ids = np.array(order[: chunks * geometry.blocks], np.int64).reshape(chunks, geometry.blocks)
    if ids.size:
        ids[0, 0] = data.draw(st.sampled_from([SKIP, int(ids[0, 0])]))
    room = geometry.num_layers * num_blocks * page_bytes + 64
    pages = np.random.default_rng(0).integers(0, 256, room, dtype=np.uint8)
    bases = pages.ctypes.data + shift + np.arange(geometry.num_layers) * num_blocks * page_bytes
    offsets = np.array([[plane.page_offset] for plane in geometry.planes])
    slot_room = geometry.chunk_bytes + 32
    slots = np.random.default_rng(1).integers(0, 256, chunks * slot_room + 1, dtype=np.uint8)
    addresses = at(slots, chunks, slot_room, shift)
    expected = pages.copy()
    move = cuda_emulation.Pages(emulation)
    paged = PagedKV(bases, geometry, num_blocks)
    parts = paged._parts

    assert (
        move(parts, geometry.num_layers, num_blocks, ids, addresses, to_slots=False, skip_negative=True, threads=1) == 0
    )
    scattered = pages.copy()
    pages[...] = expected
    copy_reference(geometry, bases + offsets, ids, addresses, to_slots=False)
    assert np.array_equal(scattered, pages)

    ids = np.abs(ids)
    expected = np.full_like(slots, POISON)
    copy_reference(geometry, bases + offsets, ids, at(expected, chunks, slot_room, shift), to_slots=True)
    slots[...] = POISON
    assert (
        move(parts, geometry.num_layers, num_blocks, ids, addresses, to_slots=True, skip_negative=False, threads=1) == 0
    )
    assert np.array_equal(slots, expected)


def test_wrong_block_ids_are_found_before_anything_is_copied(emulated: cuda_emulation.Pages) -> None:
    layout = lay("pages", packing="test/1")
    pages = np.zeros((3, 4, layout.block_bytes), np.uint8)
    slot = np.full(layout.chunk_bytes, POISON, np.uint8)
    paged = PagedKV(layer_bases(pages), PageGeometry.opaque(layout), 4)
    for bad in (4, -1, -2, 2**40):
        with pytest.raises(ValueError, match=rf"block id {bad} \(chunk 0, block 1\) is outside \[0, 4\)"):
            paged.gather([[0, bad]], [slot.ctypes.data])
    assert (slot == POISON).all()
    # A launch takes two planes.
    three = PageGeometry(1, 1, 3, 3, 0, 0, (Plane(1), Plane(1, (), 1, 1), Plane(1, (), 2, 2)))
    paged = PagedKV([pages.ctypes.data], three, 1)
    with pytest.raises(ValueError, match="refuses this geometry"):
        paged.gather([0], [slot.ctypes.data])


# Rotation.


def rotated(kv: Array, dtype: str, delta: Array, rotary: int, interleaved: bool) -> tuple[Array, Array]:
    """Canonical KV `[chunk, layer, plane, token, head, dim]` with K moved by `delta` tokens; the table used."""
    frequency = 10000.0 ** (-np.arange(0, rotary, 2) / rotary)
    angle = delta[:, None] * frequency
    table = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    if dtype == "bfloat16":
        k = (kv[:, :, 0].astype(np.uint32) << 16).view(np.float32)
    else:
        k = kv[:, :, 0].view(dtype).astype(np.float32)
    first = np.arange(0, rotary, 2) if interleaved else np.arange(rotary // 2)
    second = first + 1 if interleaved else first + rotary // 2
    cos, sin = (table[:, None, None, None, :, i] for i in (0, 1))
    x, y = k[..., first], k[..., second]
    out = k.copy()
    out[..., first], out[..., second] = x * cos - y * sin, x * sin + y * cos
    moved = kv.copy()
    if dtype == "bfloat16":
        bits = out.view(np.uint32)
        moved[:, :, 0] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    else:
        moved[:, :, 0] = out.astype(dtype).view(kv.dtype)
    return moved, table


def finite(layout: Any, chunks: int) -> Array:
    """Random canonical KV of finite values, as bits."""
    shape = numbered(layout, chunks).shape
    values = np.random.default_rng(5).normal(0, 3, shape).astype(np.float32)
    if layout.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(layout.dtype).view(f"u{np.dtype(layout.dtype).itemsize}")


ROTATIONS = [
    ("bfloat16", 64, False),
    ("bfloat16", 64, True),
    ("float16", 32, False),
    ("float16", 36, True),
    ("float32", 48, False),
    ("float32", 6, True),
]


@pytest.mark.parametrize("dtype, rotary, interleaved", ROTATIONS)
@pytest.mark.parametrize("name", ["nhd apart", "hnd apart", "nhd packed"])
def test_keys_are_rotated_on_their_way(
    emulated: cuda_emulation.Pages, name: str, dtype: str, rotary: int, interleaved: bool
) -> None:
    layout = lay(dtype=dtype)
    kv = finite(layout, 2)
    moved, table = rotated(kv, dtype, np.array([3.0, -1000.0]), rotary, interleaved)
    ids = np.array([[5, 0], [2, 3]])
    engine = ENGINES[name](layout, 6)
    slots = kv.view(np.uint8).reshape(2, -1)
    emulated.rope = Rope(table.ctypes.data, dtype, layout.head_dim, rotary, interleaved)
    engine.paged.scatter(ids, slots.ctypes.data + np.arange(2) * layout.chunk_bytes)
    got = engine.pages.copy()
    fill(engine, layout, moved, ids)
    assert np.array_equal(got, engine.pages)


@pytest.mark.parametrize(
    "change", [{"rotary_dims": 8}, {"rotary_dims": 128}, {"rotary_dims": 3}, {"head_dims": 48}, {"table": 0}]
)
def test_rotations_that_cannot_be_are_refused(emulated: cuda_emulation.Pages, change: dict[str, int]) -> None:
    layout = lay()
    engine = ENGINES["nhd apart"](layout, 6)
    slot = np.zeros(layout.chunk_bytes, np.uint8)
    emulated.rope = replace(Rope(slot.ctypes.data, "bfloat16", 64, 64), **change)
    with pytest.raises(ValueError, match="refuses"):
        engine.paged.gather([0, 1], [slot.ctypes.data])


# The library where there is no driver.


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if _cuda._library is None:
        assert not shutil.which("nvcc"), _cuda.why_not()
        pytest.skip(_cuda.why_not())
    return _cuda._library


def test_it_exports_what_its_header_says_and_needs_only_libc(library: ctypes.CDLL) -> None:
    header = (cuda_emulation.ROOT / "csrc/include/lmcache_cuda.h").read_text()
    for name in _cuda._SIGNATURES:
        assert f" {name}(" in header
    if shutil.which("nm") and shutil.which("readelf"):
        symbols = subprocess.run(["nm", "-D", "--defined-only", _cuda.LIBRARY], capture_output=True, text=True)
        exported = {line.split()[-1] for line in symbols.stdout.splitlines()}
        assert exported == {*_cuda._SIGNATURES, "lmc_cuda_abi_version", "lmc_cuda_error"}
        dynamic = subprocess.run(["readelf", "-d", _cuda.LIBRARY], capture_output=True, text=True).stdout
        needed = {line.split("[")[1].split(".so")[0] for line in dynamic.splitlines() if "(NEEDED)" in line}
        assert needed <= {"libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}


def test_without_a_driver_every_call_is_refused(library: ctypes.CDLL) -> None:
    if _cuda.available():
        pytest.skip("there is a GPU here")
    assert "no CUDA device" in _cuda.why_not()
    out, number = ctypes.c_uint64(), np.zeros(1, np.int64)
    calls: dict[str, tuple[Any, ...]] = {
        "device_count": (),
        "multiprocessors": (0,),
        "stream_create": (0, ctypes.byref(out)),
        "event_create": (0, ctypes.byref(out)),
        "pin": (number.ctypes.data, 8),
        "unpin": (number.ctypes.data,),
        "unreachable": (0, number.ctypes.data, 1),
        "copy_batch": (0, number.ctypes.data, number.ctypes.data, number.ctypes.data, 1, 0),
        "ring_create": (0, 4096, 4096, 2, ctypes.byref(out)),
    }
    for name, arguments in calls.items():
        with pytest.raises(CudaError, match=f"^{name}: .*CUDA error (35|100|999)") as caught:
            _cuda.call(name, *arguments)
        assert caught.value.code < -1000
    engine = ENGINES["nhd apart"](lay(), 4)
    with pytest.raises(CudaError, match="unreachable"):
        GpuPagedKV(engine.bases, engine.geometry, 4, how=How(0))


def test_a_missing_library_says_how_to_get_it(tmp_path: Path) -> None:
    program = """
import pathlib, sys
from lmcache_core import _cuda
_cuda.LIBRARY = pathlib.Path(sys.argv[1])
_cuda._library, _cuda._why_not = _cuda._load()
print(_cuda.available(), _cuda.why_not())
try:
    _cuda.Stream()
except _cuda.CudaError as error:
    print(error)
"""
    for name, content, native, expected in [
        ("missing.so", None, "1", "put nvcc 11.8 or newer on PATH and reinstall"),
        ("broken.so", b"no library", "1", "does not load"),
        ("any.so", None, "0", "switched off by LMCACHE_NATIVE=0"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        env = {**os.environ, "LMCACHE_NATIVE": native}
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        ran = subprocess.run(command, capture_output=True, text=True, env=env)
        assert ran.returncode == 0, ran.stderr
        first, second = ran.stdout.splitlines()
        assert first.startswith("False") and expected in first
        assert expected in second


def test_measuring_without_a_gpu_ends_with_the_reason(tmp_path: Path) -> None:
    if _cuda.available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, str(cuda_emulation.ROOT / "benchmarks" / "gpu.py"), "--no-build", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("nothing was measured: ") and "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir())
    ran = subprocess.run([*command, "--wheels", str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 2 and f"no wheels in {tmp_path}" in ran.stderr
