"""Page copies on a GPU: every layout and path against the host's copies, byte for byte. `make gpu` runs these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from test_copies import ENGINES, POISON, SHAPES, Array, Engine, fill, lay, numbered
from test_cuda import ROTATIONS, finite, rotated

from lmcache_core import _cuda
from lmcache_core.copies import SKIP
from lmcache_core.gpu import Event, GpuPagedKV, How, Ring, Rope, Stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _cuda.available(), reason=_cuda.why_not())]
PATHS = ("kernel", "staged", "engine")


class Device:
    """A stream, memory on the device by way of torch, and copies that are finished when the call returns."""

    def __init__(self) -> None:
        self.torch: Any = pytest.importorskip("torch")
        self.stream = Stream(0)
        self.event = Event(0)
        self.ring_memory = self.torch.empty(48 << 20, dtype=self.torch.uint8, device="cuda")
        self.ring = Ring(self.ring_memory.data_ptr(), 48 << 20, places=3)
        self.torch.cuda.synchronize()

    def how(self, path: Literal["kernel", "staged", "engine"] = "kernel", **options: Any) -> How:
        return How(self.stream.handle, path=path, ring=self.ring if path == "staged" else None, **options)

    def wait(self) -> None:
        self.event.record(self.stream.handle)
        self.event.synchronize()

    def memory(self, array: Array) -> Any:
        """The array's bytes in device memory."""
        return self.torch.from_numpy(array.reshape(-1).view(np.uint8).copy()).cuda()

    def pinned(self, nbytes: int) -> Any:
        return self.torch.full((nbytes,), POISON, dtype=self.torch.uint8).pin_memory()

    def paged(self, engine: Engine, pages: Any, how: How) -> GpuPagedKV:
        bases = np.asarray(engine.bases) - engine.pages.ctypes.data + pages.data_ptr()
        return GpuPagedKV(bases, engine.geometry, engine.num_blocks, how=how, owner=pages)

    def close(self) -> None:
        for thing in (self.ring, self.event, self.stream):
            thing.close()


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    found = Device()
    yield found
    found.close()


def both_ways(device: Device, engine: Engine, layout: Any, ids: Array, how: How, *, on_device: bool) -> None:
    """As in test_copies: gather gives what was stored; scatter changes just the blocks it names."""
    kv = numbered(layout, len(ids))
    fill(engine, layout, kv, ids)
    pages = device.memory(engine.pages)
    room = layout.chunk_bytes + 128
    slots = device.pinned(len(ids) * room)
    slots = slots.cuda() if on_device else slots
    addresses = slots.data_ptr() + np.arange(len(ids)) * room
    paged = device.paged(engine, pages, how)
    device.torch.cuda.synchronize()
    paged.gather(ids, addresses)
    device.wait()
    got = slots.cpu().numpy().reshape(len(ids), room)
    assert np.array_equal(got[:, : layout.chunk_bytes], kv.view(np.uint8).reshape(len(ids), -1))
    assert (got[:, layout.chunk_bytes :] == POISON).all()

    other, left_out = ~kv, ids.copy()
    left_out[0, 0] = SKIP
    got = np.full_like(got, POISON)
    got[:, : layout.chunk_bytes] = other.view(np.uint8).reshape(len(ids), -1)
    slots.copy_(device.torch.from_numpy(got.reshape(-1)))
    device.torch.cuda.synchronize()
    paged.scatter(left_out, addresses)
    device.wait()
    sources = other.view(np.uint8).reshape(len(ids), -1)
    engine.paged.scatter(left_out, sources.ctypes.data + np.arange(len(ids)) * layout.chunk_bytes)
    assert np.array_equal(pages.cpu().numpy(), engine.pages.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("on_device", [False, True], ids=["pinned", "device"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in ENGINES if name != "vllm amx"])
def test_pages_to_slots_and_back(device: Device, name: str, shape: str, on_device: bool, path: Any) -> None:
    layout = lay(**SHAPES[shape])
    ids = np.random.default_rng(1).permutation(9)[: 9 // layout.blocks * layout.blocks].reshape(-1, layout.blocks)
    both_ways(device, ENGINES[name](layout, 9), layout, ids, device.how(path), on_device=on_device)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ctas", [0, 4])
def test_large_batches(device: Device, path: Any, ctas: int) -> None:
    layout = lay(num_layers=70, kv_heads=4, chunk_tokens=64, block_tokens=16)
    ids = np.random.default_rng(3).permutation(170)[:160].reshape(40, 4)
    engine = ENGINES["hnd packed, block-major"](layout, 170)
    both_ways(device, engine, layout, ids, device.how(path, ctas=ctas), on_device=False)


@pytest.mark.parametrize("path", ["kernel", "staged"])
@pytest.mark.parametrize("dtype, rotary, interleaved", ROTATIONS)
def test_keys_are_rotated_on_their_way(device: Device, dtype: str, rotary: int, interleaved: bool, path: Any) -> None:
    layout = lay(dtype=dtype)
    kv = finite(layout, 2)
    moved, table = rotated(kv, dtype, np.array([3.0, -1000.0]), rotary, interleaved)
    ids = np.array([[5, 0], [2, 3]])
    engine = ENGINES["hnd apart"](layout, 6)
    pages, slots, turns = (device.memory(array) for array in (engine.pages, kv, table))
    rope = Rope(turns.data_ptr(), dtype, layout.head_dim, rotary, interleaved)
    device.torch.cuda.synchronize()
    paged = device.paged(engine, pages, replace(device.how(path), rope=rope))
    paged.scatter(ids, slots.data_ptr() + np.arange(2) * layout.chunk_bytes)
    device.wait()
    fill(engine, layout, moved, ids)
    assert np.array_equal(pages.cpu().numpy(), engine.pages.reshape(-1).view(np.uint8))


def test_memory_out_of_reach_is_refused_and_does_no_harm(device: Device) -> None:
    layout = lay()
    engine = ENGINES["nhd apart"](layout, 4)
    with pytest.raises(ValueError, match="the base of layer 0, plane 0 is not memory of GPU 0"):
        GpuPagedKV(engine.bases, engine.geometry, 4, how=device.how())
    paged = device.paged(engine, device.memory(engine.pages), device.how())
    slot = np.zeros(layout.chunk_bytes, np.uint8)
    with pytest.raises(ValueError, match="neither memory of this GPU nor pinned"):
        paged.gather([[0, 1]], [slot.ctypes.data])
    with pytest.raises(ValueError, match=r"block id 4 .* outside \[0, 4\)"):
        paged.gather([[0, 4]], [slot.ctypes.data])
    device.wait()


def test_pinned_memory_and_batches_of_copies(device: Device) -> None:
    source = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    target = np.zeros_like(source)
    for array in (source, target):
        _cuda.pin(array.ctypes.data, array.nbytes)
    try:
        middle = device.torch.zeros(1 << 20, dtype=device.torch.uint8, device="cuda")
        device.torch.cuda.synchronize()
        at = np.arange(64, dtype=np.int64) * (1 << 14)
        lengths = np.full(64, 1 << 14, np.int64)
        _cuda.copy_batch(at[::-1].copy() + middle.data_ptr(), at + source.ctypes.data, lengths, device.stream.handle)
        _cuda.copy_batch(at + target.ctypes.data, at + middle.data_ptr(), lengths, device.stream.handle)
        device.wait()
        assert np.array_equal(target.reshape(64, -1), source.reshape(64, -1)[::-1])
    finally:
        for array in (source, target):
            _cuda.unpin(array.ctypes.data)
    with pytest.raises(_cuda.CudaError, match="unpin"):
        _cuda.unpin(source.ctypes.data)
