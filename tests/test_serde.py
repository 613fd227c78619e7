"""Serdes: what goes in comes out, nothing is written past the bound, and crafted bytes are refused."""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lmcache_core import _native
from lmcache_core.errors import CorruptChunk
from lmcache_core.layout import DTYPE_BYTES, KVLayout
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import Serde, SerdeContext
from lmcache_core.seal import RAW_CODEC
from lmcache_core.types import MissReason
from lmcache_serde.raw import RawConfig
from lmcache_serde.zstd import SEGMENT, ZstdConfig

POISON = 0xEE


@pytest.fixture(params=["native", "fallback"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fallback":
        monkeypatch.setattr(_native, "_library", None)


def context(dtype: str = "bfloat16", elements: int = 4096) -> SerdeContext:
    layout = KVLayout("lknhd", dtype, 1, 1, 1, elements, chunk_tokens=1, block_tokens=1)
    return SerdeContext(layout=layout, chunk_bytes=layout.chunk_bytes)


def kv_like(nbytes: int, seed: int = 0) -> bytes:
    """Floats around zero, the high bytes of which compress."""
    floats = np.random.default_rng(seed).standard_normal(nbytes // 2 + 1).astype(np.float32)
    return (floats.view(np.uint32) >> 16).astype("<u2").tobytes()[:nbytes]


def encode(serde: Serde, chunk: bytes) -> bytes:
    room = bytearray([POISON]) * (serde.bound() + 64)
    (used,) = serde.encode([memoryview(chunk)], [memoryview(room)[: serde.bound()]], [-1])
    assert used <= serde.bound()
    assert set(room[serde.bound() :]) == {POISON}
    return bytes(room[:used])


def decode(serde: Serde, blob: bytes, nbytes: int) -> bytes:
    room = bytearray([POISON]) * (nbytes + 64)
    try:
        serde.decode([memoryview(blob)], [memoryview(room)[:nbytes]])
    finally:
        assert set(room[nbytes:]) == {POISON}
    return bytes(room[:nbytes])


def refuse(serde: Serde, blob: bytes, nbytes: int) -> str:
    with pytest.raises(CorruptChunk) as caught:
        decode(serde, blob, nbytes)
    assert caught.value.reason == MissReason.CORRUPT
    return str(caught.value)


# What every serde does.

CONFIGS: dict[str, Any] = {
    "raw": RawConfig(),
    "zstd": ZstdConfig(),
    "zstd whole": ZstdConfig(planes=False),
    "zstd 9": ZstdConfig(level=9),
}


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(variant: None, name: str, dtype: str) -> None:
    # From one element to several segments, the last one partial.
    for elements in (1, 63, 4096, (2 * SEGMENT + 5000) // DTYPE_BYTES[dtype]):
        ctx = context(dtype, elements)
        serde = CONFIGS[name].build(ctx)
        noise = np.random.default_rng(1).integers(0, 256, ctx.chunk_bytes, dtype=np.uint8).tobytes()
        for chunk in (kv_like(ctx.chunk_bytes), bytes(ctx.chunk_bytes), noise):
            assert decode(serde, encode(serde, chunk), ctx.chunk_bytes) == chunk


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=600), repeat=st.integers(1, 40), planes=st.booleans())
def test_any_bytes_survive_zstd(data: bytes, repeat: int, planes: bool) -> None:
    chunk = data * repeat
    serde = ZstdConfig(planes=planes).build(context("uint8", len(chunk)))
    assert decode(serde, encode(serde, chunk), len(chunk)) == chunk


@pytest.mark.parametrize("name", CONFIGS)
def test_batches_keep_their_order(name: str) -> None:
    ctx = context()
    serde = CONFIGS[name].build(ctx)
    chunks = [kv_like(ctx.chunk_bytes, seed) for seed in range(5)]
    rooms = [bytearray(serde.bound()) for _ in chunks]
    sizes = serde.encode([memoryview(c) for c in chunks], [memoryview(r) for r in rooms], range(0, 40, 8))
    out = [bytearray(ctx.chunk_bytes) for _ in chunks]
    blobs = [memoryview(room)[:size] for room, size in zip(rooms, sizes, strict=True)]
    serde.decode(blobs, [memoryview(o) for o in out])
    assert out == chunks


def test_codec_names_tell_apart_what_decodes_differently() -> None:
    names = {
        RawConfig().build(context()).codec,
        ZstdConfig().build(context()).codec,
        ZstdConfig().build(context("float32")).codec,
        ZstdConfig().build(context("uint8")).codec,
    }
    assert len(names) == 4
    assert RAW_CODEC in names
    assert all(name.isascii() and len(name) <= 32 for name in names)
    # Any level decodes the same way.
    assert ZstdConfig(level=9).build(context()).codec == ZstdConfig().build(context()).codec


def test_both_are_found_through_their_entry_points() -> None:
    plugins = Plugins()
    assert plugins.serde("raw") is RawConfig
    assert plugins.serde("zstd") is ZstdConfig


def test_settings_are_checked() -> None:
    for wrong in ({"level": 0}, {"level": 20}, {"planes": "maybe"}, {"speed": 3}):
        with pytest.raises(ValidationError):
            ZstdConfig(**wrong)


def test_raw_refuses_another_length() -> None:
    serde = RawConfig().build(context())
    assert "raw bytes" in refuse(serde, bytes(10), 8192)


# zstd: worth it, from many threads, and on hostile bytes.


def test_byte_planes_beat_plain_zstd_on_kv() -> None:
    ctx = context(elements=SEGMENT)
    chunk = kv_like(ctx.chunk_bytes)
    planes = len(encode(ZstdConfig().build(ctx), chunk))
    whole = len(encode(ZstdConfig(planes=False).build(ctx), chunk))
    assert planes < whole < len(chunk)
    assert len(chunk) / planes > 1.4


def test_incompressible_chunks_cost_only_the_table() -> None:
    ctx = context(elements=SEGMENT)
    noise = np.random.default_rng(2).integers(0, 256, ctx.chunk_bytes, dtype=np.uint8).tobytes()
    serde = ZstdConfig().build(ctx)
    assert len(encode(serde, noise)) == serde.bound() == ctx.chunk_bytes + 4 * 2 * 2


def test_one_serde_serves_many_threads() -> None:
    ctx = context(elements=100_000)
    serde = ZstdConfig().build(ctx)
    chunks = [kv_like(ctx.chunk_bytes, seed) for seed in range(8)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if decode(serde, encode(serde, chunks[i]), ctx.chunk_bytes) != chunks[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_chunk_of_another_size_is_a_bug_not_a_miss() -> None:
    serde = ZstdConfig().build(context())
    with pytest.raises(ValueError, match="expected 8192"):
        serde.encode([memoryview(bytes(8190))], [memoryview(bytearray(serde.bound()))], [0])
    blob = encode(serde, kv_like(8192))
    with pytest.raises(ValueError, match="room of 10 bytes"):
        decode(serde, blob, 10)


def test_every_truncation_and_extension_is_refused() -> None:
    ctx = context(elements=256)
    serde = ZstdConfig().build(ctx)
    blob = encode(serde, kv_like(ctx.chunk_bytes))
    for size in range(len(blob)):
        refuse(serde, blob[:size], ctx.chunk_bytes)
    refuse(serde, blob + b"\0", ctx.chunk_bytes)


def test_every_bit_flip_is_refused_or_changes_only_the_contents() -> None:
    # A frame carries no checksum of its own (the sealed object's covers it); a flip must never do more than garble.
    ctx = context(elements=256)
    serde = ZstdConfig().build(ctx)
    blob = encode(serde, kv_like(ctx.chunk_bytes))
    refused = 0
    for bit in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            decode(serde, bytes(flipped), ctx.chunk_bytes)
        except CorruptChunk:
            refused += 1
    assert refused >= 8 * 4 * 2  # at least every bit of the table


def table(*lengths: int) -> bytes:
    return struct.pack(f"<{len(lengths)}I", *lengths)


def test_bombs_are_refused() -> None:
    serde = ZstdConfig().build(context("uint8", 4096))
    sized = zstandard.ZstdCompressor(level=19)
    unsized = zstandard.ZstdCompressor(level=19, write_content_size=False)
    huge = bytes(64 << 20)
    for frame, says in (
        (sized.compress(huge), "does not declare the 4096 bytes"),
        (unsized.compress(huge), "does not declare"),
        (unsized.compress(bytes(4096)), "does not declare"),
        (sized.compress(bytes(4095)), "does not declare"),
        # Two frames, each of the right size; and a frame of nothing behind the right one.
        (sized.compress(bytes(4096)) * 2, "does not hold"),
        (sized.compress(bytes(4096)) + sized.compress(b"x"), "does not hold"),
        (sized.compress(bytes(4096)) + b"garbage!", "zstd"),
        (b"", "zstd"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"not a frame at all", "zstd"),
    ):
        assert says in refuse(serde, table(len(frame)) + frame, 4096)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    # The declared size is patched to what the layout expects; the contents decode to more, or to less.
    serde = ZstdConfig().build(context("uint8", 4096))
    for size in (300, 4095, 5000, 60_000):
        frame = bytearray(zstandard.ZstdCompressor(level=1).compress(kv_like(size)))
        parameters = zstandard.get_frame_parameters(bytes(frame))
        # Frame header descriptor 0x60: single segment, two bytes of content size minus 256 (RFC 8878, 3.1.1.1).
        assert frame[4] & 0xE0 == 0x60
        assert parameters.content_size == size
        frame[5:7] = struct.pack("<H", 4096 - 256)
        assert zstandard.frame_content_size(bytes(frame)) == 4096
        refuse(serde, table(len(frame)) + bytes(frame), 4096)


def test_lengths_in_the_table_are_never_believed() -> None:
    serde = ZstdConfig().build(context("uint8", 4096))
    stored = 1 << 31
    good = bytes(range(256)) * 16
    assert decode(serde, table(stored | 4096) + good, 4096) == good
    for lengths, body in (
        ((stored | 4095,), good[:-1]),
        ((stored | 4097,), good + b"x"),
        ((stored | 4096,), good[:-1]),
        ((2**31 - 1,), good),
        ((2**32 - 1,), good),
        ((0,), b""),
        ((stored,), b""),
    ):
        refuse(serde, table(*lengths) + body, 4096)
