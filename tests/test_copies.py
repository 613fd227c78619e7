"""Pages <-> slots: every geometry against plain indexing, random geometries against the NumPy reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lmcache_core import _native
from lmcache_core.copies import SKIP, Dim, PagedKV, PageGeometry, Plane, copy_reference
from lmcache_core.layout import DTYPE_BYTES, KVLayout

Array = NDArray[Any]
POISON = 0xEE
SIMD = ("portable+sha", "avx2+sha", "avx512+sha")


@pytest.fixture(params=[*SIMD, "fallback"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test once per implementation of the copies."""
    name: str = request.param
    if name == "fallback":
        monkeypatch.setattr(_native, "_library", None)
    elif _native.limit_simd(name) != name:
        _native.limit_simd(SIMD[-1])
        pytest.skip(f"no native library, or a CPU without {name}")
    yield name
    if name != "fallback":
        _native.limit_simd(SIMD[-1])


def lay(order: str = "lknhd", dtype: str = "bfloat16", **changes: Any) -> KVLayout:
    sizes = {"num_layers": 3, "planes": 2, "kv_heads": 3, "head_dim": 64, "chunk_tokens": 64, "block_tokens": 32}
    return KVLayout(order=order, dtype=dtype, **{**sizes, **changes})  # type: ignore[arg-type]


def numbered(layout: KVLayout, chunks: int, seed: int = 0) -> Array:
    """Random canonical KV `[chunk, layer, plane, token, head, dim]` of elements of the layout's size."""
    shape = (
        chunks,
        layout.num_layers,
        layout.planes,
        layout.chunk_tokens,
        layout.kv_heads,
        layout.head_dim,
    )
    item = DTYPE_BYTES[layout.dtype]
    return np.random.default_rng(seed).integers(0, 1 << 8 * item, shape, dtype=f"u{item}")


@dataclass
class Engine:
    """Pages of some engine, and how it stores one token of one head, written the slow and obvious way."""

    geometry: PageGeometry
    pages: Array
    bases: Any
    num_blocks: int
    store: Callable[[int, int, int, int, int, Array], None]
    """store(layer, plane, block, token in block, head, vector)"""

    @property
    def paged(self) -> PagedKV:
        return PagedKV(self.bases, self.geometry, self.num_blocks, owner=self.pages)


def fill(engine: Engine, layout: KVLayout, kv: Array, block_ids: Array) -> None:
    """Put canonical `kv` into the engine's blocks, token by token."""
    for chunk, layer, plane, token, head in np.ndindex(*kv.shape[:5]):
        block, inside = divmod(token, layout.block_tokens)
        engine.store(layer, plane, int(block_ids[chunk, block]), inside, head, kv[chunk, layer, plane, token, head])


def empty(shape: tuple[int, ...], item: int) -> Array:
    pages = np.empty(shape, f"u{item}")
    pages.view(np.uint8)[...] = POISON
    return pages


def layer_bases(pages: Array, axis: int = 0) -> Array:
    return pages.ctypes.data + np.arange(pages.shape[axis]) * pages.strides[axis]


def nhd_apart(layout: KVLayout, blocks: int) -> Engine:
    shape = (2, layout.num_layers, blocks, layout.block_tokens, layout.kv_heads, layout.head_dim)
    pages = empty(shape, DTYPE_BYTES[layout.dtype])

    def store(layer: int, plane: int, block: int, token: int, head: int, vector: Array) -> None:
        pages[plane, layer, block, token, head] = vector

    bases = np.stack([layer_bases(pages[0]), layer_bases(pages[1])])
    return Engine(PageGeometry.nhd(layout), pages, bases, blocks, store)


def nhd_packed(layout: KVLayout, blocks: int) -> Engine:
    d = layout.head_dim
    pages = empty((layout.num_layers, blocks, layout.block_tokens, layout.kv_heads, 2 * d), DTYPE_BYTES[layout.dtype])

    def store(layer: int, plane: int, block: int, token: int, head: int, vector: Array) -> None:
        pages[layer, block, token, head, plane * d : (plane + 1) * d] = vector

    return Engine(PageGeometry.nhd(layout, packed=True), pages, layer_bases(pages), blocks, store)


def hnd_packed_block_major(layout: KVLayout, blocks: int) -> Engine:
    d = layout.head_dim
    shape = (blocks, layout.num_layers, layout.kv_heads, layout.block_tokens, 2 * d)
    pages = empty(shape, DTYPE_BYTES[layout.dtype])

    def store(layer: int, plane: int, block: int, token: int, head: int, vector: Array) -> None:
        pages[block, layer, head, token, plane * d : (plane + 1) * d] = vector

    geometry = PageGeometry.hnd(layout, packed=True, block_stride=pages.strides[0])
    return Engine(geometry, pages, layer_bases(pages, axis=1), blocks, store)


def hnd_apart(layout: KVLayout, blocks: int) -> Engine:
    shape = (layout.num_layers, 2, blocks, layout.kv_heads, layout.block_tokens, layout.head_dim)
    pages = empty(shape, DTYPE_BYTES[layout.dtype])

    def store(layer: int, plane: int, block: int, token: int, head: int, vector: Array) -> None:
        pages[layer, plane, block, head, token] = vector

    bases = np.stack([layer_bases(pages[:, 0]), layer_bases(pages[:, 1])])
    return Engine(PageGeometry.hnd(layout), pages, bases, blocks, store)


def padded(layout: KVLayout, blocks: int) -> Engine:
    """Heads padded to odd strides: nothing is aligned, nothing merges."""
    item = DTYPE_BYTES[layout.dtype]
    d = layout.head_dim
    shape = (layout.num_layers, blocks, layout.block_tokens + 1, layout.kv_heads + 1, 2 * d + 3)
    pages = empty(shape, item)

    def store(layer: int, plane: int, block: int, token: int, head: int, vector: Array) -> None:
        start = 1 + plane * (d + 1)
        pages[layer, block, token, head, start : start + d] = vector

    geometry = PageGeometry.strided(
        layout,
        block_stride=pages.strides[1],
        token_stride=pages.strides[2],
        head_stride=pages.strides[3],
        plane_offsets=(item, (d + 2) * item),
    )
    return Engine(geometry, pages, layer_bases(pages), blocks, store)


def vllm_cpu(isa: str) -> Callable[[KVLayout, int], Engine]:
    """The packings as ENGINES describes them, index by index."""

    def make(layout: KVLayout, blocks: int) -> Engine:
        n, d = layout.block_tokens, layout.head_dim
        pages = empty((layout.num_layers, blocks, layout.kv_heads, 2, n * d), DTYPE_BYTES[layout.dtype])
        dims = np.arange(d)

        def store(layer: int, plane: int, block: int, token: int, head: int, vector: Array) -> None:
            if isa != "amx":
                at = dims * n + token if plane == 0 else token * d + dims
            elif plane == 0:
                at = token // 16 * 16 * d + dims // 2 * 32 + token % 16 * 2 + dims % 2
            else:
                at = dims // 16 * 16 * n + token // 2 * 32 + dims % 16 * 2 + token % 2
            pages[layer, block, head, plane, at] = vector

        return Engine(PageGeometry.vllm_cpu(layout, isa), pages, layer_bases(pages), blocks, store)

    return make


ENGINES: dict[str, Callable[[KVLayout, int], Engine]] = {
    "nhd apart": nhd_apart,
    "nhd packed": nhd_packed,
    "hnd apart": hnd_apart,
    "hnd packed, block-major": hnd_packed_block_major,
    "padded": padded,
    "vllm vec": vllm_cpu("vec"),
    "vllm amx": vllm_cpu("amx"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "usual": {},
    "one head": {"kv_heads": 1, "head_dim": 128},
    "narrow": {"head_dim": 16, "block_tokens": 16},
    "odd tiles": {"head_dim": 48, "block_tokens": 16, "chunk_tokens": 48},
    "float32": {"dtype": "float32", "head_dim": 80, "block_tokens": 16},
    "bytes": {"dtype": "float8_e4m3fn", "head_dim": 32},
}


def both_ways(engine: Engine, layout: KVLayout, kv: Array, ids: Array) -> None:
    """Gather must give `kv`; scatter of other bytes must change exactly the blocks it names."""
    slots = np.full((len(ids), layout.chunk_bytes + 128), POISON, np.uint8)
    addresses = slots.ctypes.data + np.arange(len(ids)) * slots.strides[0]
    fill(engine, layout, kv, ids)
    engine.paged.gather(ids, addresses)
    assert np.array_equal(slots[:, : layout.chunk_bytes], kv.view(np.uint8).reshape(len(ids), -1))
    assert (slots[:, layout.chunk_bytes :] == POISON).all()

    other = ~kv
    slots[:, : layout.chunk_bytes] = other.view(np.uint8).reshape(len(ids), -1)
    engine.paged.scatter(ids, addresses)
    got = engine.pages.copy()
    fill(engine, layout, other, ids)
    # `fill` overwrites what was stored and leaves the rest: equal only if scatter touched nothing else.
    assert np.array_equal(got, engine.pages)


@pytest.mark.parametrize(
    "name, shape",
    # amx packs 2-byte elements only
    [(n, s) for n in ENGINES for s in SHAPES if n != "vllm amx" or DTYPE_BYTES[lay(**SHAPES[s]).dtype] == 2],
)
def test_pages_to_canonical_slots_and_back(variant: str, name: str, shape: str) -> None:
    layout = lay(**SHAPES[shape])
    engine = ENGINES[name](layout, 9)
    ids = np.random.default_rng(1).permutation(9)[: 2 * layout.blocks].reshape(2, layout.blocks)
    both_ways(engine, layout, numbered(layout, 2), ids)


@pytest.mark.parametrize("name", ENGINES)
def test_large_batches_stream_the_same_bytes(variant: str, name: str) -> None:
    layout = lay(num_layers=24, kv_heads=4, chunk_tokens=64)
    kv = numbered(layout, 4, seed=2)
    assert kv.nbytes > 4 << 20
    ids = np.random.default_rng(3).permutation(10)[:8].reshape(4, 2)
    engine = ENGINES[name](layout, 10)
    threaded = PagedKV(engine.bases, engine.geometry, 10, threads=3)
    fill(engine, layout, kv, ids)
    slots = np.zeros((4, layout.chunk_bytes), np.uint8)
    addresses = slots.ctypes.data + np.arange(4) * layout.chunk_bytes
    for paged in (engine.paged, threaded):
        slots[:] = POISON
        paged.gather(ids, addresses)
        assert np.array_equal(slots, kv.view(np.uint8).reshape(4, -1))
    engine.pages.view(np.uint8)[...] = POISON
    threaded.scatter(ids, addresses)
    got = engine.pages.copy()
    engine.pages.view(np.uint8)[...] = POISON
    fill(engine, layout, kv, ids)
    assert np.array_equal(got, engine.pages)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sequences_of_transformers(variant: str, dtype: str) -> None:
    layout = lay(dtype=dtype, block_tokens=64)
    length = 64 * 3 + 17
    shape = (2, layout.num_layers, layout.kv_heads, length, layout.head_dim)
    tensors = empty(shape, DTYPE_BYTES[dtype])

    def store(layer: int, plane: int, block: int, token: int, head: int, vector: Array) -> None:
        tensors[plane, layer, head, block * 64 + token] = vector

    bases = np.stack([layer_bases(tensors[0]), layer_bases(tensors[1])])
    engine = Engine(PageGeometry.sequence(layout, length), tensors, bases, 3, store)
    both_ways(engine, layout, numbered(layout, 2), np.array([[2], [0]]))


def test_mla_latents(variant: str) -> None:
    layout = lay(planes=1, kv_heads=1, head_dim=72)
    pages = empty((layout.num_layers, 5, layout.block_tokens, 72), 2)

    def store(layer: int, plane: int, block: int, token: int, head: int, vector: Array) -> None:
        pages[layer, block, token] = vector

    engine = Engine(PageGeometry.nhd(layout), pages, layer_bases(pages), 5, store)
    both_ways(engine, layout, numbered(layout, 2), np.array([[4, 0], [1, 3]]))


@pytest.mark.parametrize("page_bytes", [0, 12800], ids=["dense", "padded"])
@pytest.mark.parametrize("block_major", [False, True])
def test_opaque_pages(variant: str, page_bytes: int, block_major: bool) -> None:
    layout = lay("pages", packing="test/1", page_bytes=page_bytes, kv_heads=1)
    size = layout.block_bytes
    rng = np.random.default_rng(4)
    pages = rng.integers(0, 256, (5, 3, size) if block_major else (3, 5, size), dtype=np.uint8)
    geometry = PageGeometry.opaque(layout, block_stride=pages.strides[0] if block_major else None)
    paged = PagedKV(layer_bases(pages, axis=1 if block_major else 0), geometry, 5)
    ids = np.array([[4, 1], [0, 3]])
    slots = np.zeros((2, layout.chunk_bytes), np.uint8)
    addresses = slots.ctypes.data + np.arange(2) * layout.chunk_bytes
    paged.gather(ids, addresses)
    by_layer = pages.swapaxes(0, 1) if block_major else pages
    assert np.array_equal(slots, np.stack([by_layer[:, chunk] for chunk in ids]).reshape(2, -1))
    slots ^= 0xFF
    expected = by_layer.copy()
    expected[:, ids.ravel()] ^= 0xFF
    paged.scatter(ids, addresses)
    assert np.array_equal(by_layer, expected)


def test_an_opaque_chunk_can_be_depacked_where_it_lies(variant: str) -> None:
    # A slot of opaque pages is itself a paged KV of `blocks` blocks per layer.
    layout = lay()
    opaque = replace(layout, order="pages", packing="vllm-cpu/1/amx")
    kv = numbered(layout, 1)
    engine = ENGINES["vllm amx"](layout, 4)
    fill(engine, layout, kv, np.array([[2, 1]]))
    slot = np.zeros(opaque.chunk_bytes, np.uint8)
    PagedKV(engine.bases, PageGeometry.opaque(opaque), 4).gather([[2, 1]], [slot.ctypes.data])
    canonical = np.zeros(layout.chunk_bytes, np.uint8)
    bases = slot.ctypes.data + np.arange(layout.num_layers) * (opaque.blocks * opaque.block_bytes)
    PagedKV(bases, PageGeometry.vllm_cpu(layout, "amx"), layout.blocks).gather([0, 1], [canonical.ctypes.data])
    assert canonical.tobytes() == kv.tobytes()


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("pad", [0, 1])
def test_every_small_transposition(variant: str, item: int, pad: int) -> None:
    for rows, columns in np.ndindex(36, 36):
        shape = (2, rows + 1, columns + 1)
        padded_page = np.arange(2 * (rows + 1) * (columns + 1 + pad), dtype=f"u{item}").reshape(2, rows + 1, -1)
        page = padded_page[:, :, : columns + 1]
        slot = np.zeros((2, columns + 1, rows + 1), page.dtype)
        dims = (
            Dim(2, page.strides[0], slot.strides[0]),
            Dim(rows + 1, page.strides[1], slot.strides[2]),
            Dim(columns + 1, page.strides[2], slot.strides[1]),
        )
        geometry = PageGeometry(1, 1, slot.nbytes, padded_page.nbytes, 0, 0, (Plane(item, dims),))
        paged = PagedKV([page.ctypes.data], geometry, 1)
        paged.gather([0], [slot.ctypes.data])
        assert np.array_equal(slot, page.swapaxes(1, 2)), shape
        before = padded_page.copy()
        page[...] = 0
        paged.scatter([0], [slot.ctypes.data])
        assert np.array_equal(padded_page, before), shape


# Random geometries: any nest of loops, merged, permuted, padded and offset at will.


@st.composite
def geometries(draw: st.DrawFn) -> tuple[PageGeometry, int]:
    """A geometry whose slot side is a permutation of the loops, and bytes of one page."""
    run = draw(st.sampled_from([1, 2, 4, 8, 12, 16, 64, 100, 128]))
    extents = draw(st.lists(st.sampled_from([1, 2, 3, 8, 16, 17, 32]), max_size=4))
    planes, layers, blocks = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def strides(order: list[int], pad: bool) -> tuple[list[int], int]:
        size, out = run, [0] * len(extents)
        for i in order:
            out[i] = size
            size *= extents[i]
            if pad and draw(st.booleans()):
                size += draw(st.sampled_from([run, 1, 64]))
        return out, size

    loops = list(range(len(extents)))
    slot, slot_size = strides(draw(st.permutations(loops)), pad=False)
    page, page_size = strides(draw(st.permutations(loops)), pad=True)
    gap = draw(st.sampled_from([0, 3, 64]))
    block_first = draw(st.booleans())
    dims = tuple(Dim(*triple) for triple in zip(extents, page, slot, strict=True))
    outer = (slot_size, blocks * planes * slot_size) if block_first else (layers * slot_size, slot_size)
    plane_step = (blocks if block_first else layers * blocks) * slot_size
    return PageGeometry(
        num_layers=layers,
        blocks=blocks,
        chunk_bytes=planes * layers * blocks * slot_size,
        block_stride=planes * (page_size + gap),
        slot_layer_stride=outer[1],
        slot_block_stride=outer[0],
        planes=tuple(Plane(run, dims, p * (page_size + gap), p * plane_step) for p in range(planes)),
    ), planes * (page_size + gap)


@pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.why_not()}")
@settings(max_examples=200, deadline=None)
@given(made=geometries(), data=st.data())
def test_random_geometries_equal_the_reference(made: tuple[PageGeometry, int], data: st.DataObject) -> None:
    geometry, page_bytes = made
    num_blocks, chunks = 7, data.draw(st.integers(0, 2), label="chunks")
    shift = data.draw(st.sampled_from([0, 1, 8]), label="shift")
    order = data.draw(st.permutations(range(num_blocks)), label="blocks")
    ids = np.array(order[: chunks * geometry.blocks], np.int64).reshape(chunks, geometry.blocks)
    rng = np.random.default_rng(0)
    pages = rng.integers(0, 256, geometry.num_layers * num_blocks * page_bytes + 64, dtype=np.uint8)
    bases = pages.ctypes.data + shift + np.arange(geometry.num_layers) * num_blocks * page_bytes
    offsets = np.array([[plane.page_offset] for plane in geometry.planes])
    slot_room = geometry.chunk_bytes + 32
    paged = PagedKV(bases, geometry, num_blocks)
    for simd in SIMD:
        _native.limit_simd(simd)
        expected = np.full(chunks * slot_room + 1, POISON, np.uint8)
        slots = expected.copy()
        copy_reference(geometry, bases + offsets, ids, at(expected, chunks, slot_room, shift), to_slots=True)
        paged.gather(ids, at(slots, chunks, slot_room, shift))
        assert np.array_equal(slots, expected)
        # Back into other pages: the blocks named are restored, everything else stays.
        before = pages.copy()
        pages[...] = POISON
        paged.scatter(ids, at(slots, chunks, slot_room, shift))
        scattered = pages.copy()
        pages[...] = POISON
        copy_reference(geometry, bases + offsets, ids, at(slots, chunks, slot_room, shift), to_slots=False)
        assert np.array_equal(scattered, pages)
        pages[...] = before
    _native.limit_simd(SIMD[-1])


def at(slots: Array, chunks: int, room: int, shift: int) -> Array:
    return slots.ctypes.data + (shift & 1) + np.arange(chunks) * room


# Refusals.


def small() -> tuple[PagedKV, Array, Array]:
    layout = lay("pages", packing="test/1")
    pages = np.zeros((3, 4, layout.block_bytes), np.uint8)
    slot = np.full(layout.chunk_bytes, POISON, np.uint8)
    return PagedKV(layer_bases(pages), PageGeometry.opaque(layout), 4, owner=pages), pages, slot


@pytest.mark.parametrize("bad", [4, -1, -2, 2**62, -(2**62)])
def test_block_ids_outside_the_pages_are_refused_before_a_byte_moves(variant: str, bad: int) -> None:
    paged, pages, slot = small()
    with pytest.raises(ValueError, match=rf"block id {bad} \(chunk 0, block 1\) is outside \[0, 4\)"):
        paged.gather([[0, bad]], [slot.ctypes.data])
    assert (slot == POISON).all()
    if bad != SKIP:
        with pytest.raises(ValueError, match="is outside"):
            paged.scatter([[0, bad]], [slot.ctypes.data])
        assert not pages.any()


def test_scatter_leaves_skipped_blocks_alone(variant: str) -> None:
    paged, pages, slot = small()
    paged.scatter([[SKIP, 2]], [slot.ctypes.data])
    assert (pages[:, 2] == POISON).all()
    pages[:, 2] = 0
    assert not pages.any()


def test_an_empty_batch_is_fine(variant: str) -> None:
    paged, _, _ = small()
    paged.gather([], [])
    paged.scatter(np.empty((0, 2), np.int64), np.empty(0, np.int64))


@pytest.mark.parametrize(
    "ids, slots, says",
    [
        ([[0, 1]], [1, 2], "2 block ids are needed for each chunk"),
        ([0, 1, 2], [1], "2 block ids are needed"),
        ([[0], [1]], [1], "2 block ids are needed"),
        ([[0.5, 1.0]], [1], "block ids must be integers"),
        ([[0, 1]], [1.5], "slot addresses must be integers"),
    ],
)
def test_batches_that_do_not_fit_are_refused(ids: Any, slots: Any, says: str) -> None:
    paged, _, _ = small()
    with pytest.raises(ValueError, match=says):
        paged.gather(ids, slots)


def test_bases_must_match_the_geometry() -> None:
    geometry = PageGeometry.nhd(lay())
    for shape in ((2,), (1, 3), (3, 2), (2, 3, 1)):
        with pytest.raises(ValueError, match="bases must be of shape"):
            PagedKV(np.zeros(shape, np.int64), geometry, 4)
    with pytest.raises(ValueError, match="num_blocks"):
        PagedKV(np.zeros(3, np.int64), geometry, 0)


def test_geometries_that_do_not_fill_their_slot_are_refused() -> None:
    good = PageGeometry.nhd(lay())
    plane = good.planes[0]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"chunk_bytes": good.chunk_bytes + 1}, "the planes hold"),
        ({"planes": (plane, replace(plane, slot_offset=good.chunk_bytes))}, "reaches outside its slot"),
        ({"planes": (plane, replace(plane, page_offset=-1))}, "reaches outside"),
        ({"planes": (replace(plane, run_bytes=0),)}, "at least 1"),
        ({"planes": (replace(plane, dims=(Dim(2, -8, 8),)),)}, "not negative"),
        ({"planes": (replace(plane, dims=(Dim(1, 0, 0),) * 7),)}, "at most 6 loops"),
        ({"planes": ()}, "at least 1"),
        ({"blocks": 0}, "at least 1"),
    ]
    for change, says in wrong:
        with pytest.raises(ValueError, match=says):
            replace(good, **change)


def test_constructors_refuse_layouts_that_mean_something_else() -> None:
    opaque = lay("pages", packing="test/1")
    with pytest.raises(ValueError, match="'lknhd', the layout says 'pages'"):
        PageGeometry.nhd(opaque)
    with pytest.raises(ValueError, match="'pages', the layout says 'lknhd'"):
        PageGeometry.opaque(lay())
    with pytest.raises(ValueError, match="packed side by side"):
        PageGeometry.nhd(lay(planes=1), packed=True)
    with pytest.raises(ValueError, match="plane offsets"):
        PageGeometry.strided(lay(), block_stride=1, token_stride=1, head_stride=1, plane_offsets=(0,))
    with pytest.raises(ValueError, match="block_tokens must be chunk_tokens"):
        PageGeometry.sequence(lay(), 100)
    with pytest.raises(ValueError, match="planes must be 2"):
        PageGeometry.vllm_cpu(lay(planes=1), "vec")
    for isa, layout in (("neon", lay()), ("amx", lay(dtype="float32")), ("amx", lay(head_dim=24))):
        with pytest.raises(ValueError, match=f"no known packing '{isa}'"):
            PageGeometry.vllm_cpu(layout, isa)


VLLM = """
import numpy as np, torch
from vllm import _custom_ops as ops
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.layout import KVLayout

for isa, dtype, name in (("amx", torch.bfloat16, "bfloat16"), ("vec", torch.bfloat16, "bfloat16"),
                         ("vec", torch.float32, "float32"), ("vec16", torch.float16, "float16")):
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        continue
    layout = KVLayout("lknhd", name, 1, 2, 3, 64, chunk_tokens=64, block_tokens=32)
    pages = torch.zeros(4, 3, 32, 128, dtype=dtype)
    k, v = torch.randn(2, 64, 3, 64).to(dtype)
    k_cache, v_cache = pages.view(4, 3, 64, 64).chunk(2, dim=2)
    ids = [3, 1]
    where = torch.cat([torch.arange(32) + 32 * i for i in ids])
    ops.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, where, isa)
    out = torch.zeros(2, 64, 3, 64, dtype=dtype)
    PagedKV([pages.data_ptr()], PageGeometry.vllm_cpu(layout, isa), 4).gather([ids], [out.data_ptr()])
    assert torch.equal(out, torch.stack([k, v])), isa
    print("checked", isa, name)
"""


def test_packings_are_what_vllm_writes() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", VLLM], capture_output=True, text=True, env=os.environ)
    if "reshape_and_cache" in ran.stderr and "has no attribute" in ran.stderr:
        pytest.skip("this vLLM has no CPU attention")
    assert ran.returncode == 0, ran.stderr
    assert "checked vec bfloat16" in ran.stdout
