"""The fp8 serde: its error bound for every value, exact codes against another implementation, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmcache_serde_fp8 import GROUP, Fp8, Fp8Config, group_size

from lmcache_backends.gds import GdsConfig
from lmcache_core.build import build
from lmcache_core.cli import main
from lmcache_core.config import PipelineConfig, load
from lmcache_core.errors import ConfigError, CorruptChunk, Unsupported
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import SerdeContext
from lmcache_core.testing.serde import OpenSerde, SerdeTests
from lmcache_core.types import ChunkKey, MissReason


class TestFp8(SerdeTests):
    @pytest.fixture
    def open_serde(self) -> OpenSerde:
        return Fp8Config().build


def layout_of(dtype: str, heads: int = 2, dim: int = 32, tokens: int = 4) -> KVLayout:
    return KVLayout("lknhd", dtype, 1, 2, heads, dim, chunk_tokens=tokens, block_tokens=tokens)


FP8 = {"serde": {"type": "fp8"}, "lossy": True}

VALUES = 512
"""Values in a chunk of `layout_of(dtype)`."""


def built(layout: KVLayout) -> Fp8:
    return Fp8Config().build(SerdeContext(layout=layout, chunk_bytes=layout.chunk_bytes))


def to_floats(chunk: bytes, dtype: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    with np.errstate(invalid="ignore"):
        if dtype == "bfloat16":
            return (np.frombuffer(chunk, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return np.frombuffer(chunk, {"float16": "<f2", "float32": "<f4"}[dtype]).astype(np.float64)


def from_floats(values: Any, dtype: str) -> bytes:
    """Values in a type; bfloat16 by cutting off."""
    with np.errstate(over="ignore"):
        single = np.asarray(values, np.float64).astype(np.float32)
        if dtype == "bfloat16":
            return (single.view(np.uint32) >> 16).astype("<u2").tobytes()
        return single.astype({"float16": "<f2", "float32": "<f4"}[dtype]).tobytes()


def there_and_back(serde: Fp8, chunk: bytes) -> tuple[bytes, bytes]:
    blob, found = bytearray(serde.bound()), bytearray(b"\xdb" * len(chunk))
    assert serde.encode([memoryview(chunk)], [memoryview(blob)], [0]) == [len(blob)]
    serde.decode([memoryview(bytes(blob))], [memoryview(found)])
    return bytes(blob), bytes(found)


def check_bound(chunk: bytes, found: bytes, layout: KVLayout) -> None:
    """What the module promises, for every value."""
    want, got = to_floats(chunk, layout.dtype), to_floats(found, layout.dtype)
    largest = np.abs(want.reshape(-1, group_size(layout))).max(axis=1).repeat(group_size(layout))
    allowed = np.maximum(np.maximum(np.abs(want) / 16, largest * 2.0**-17), 2.0**-126)
    if layout.dtype == "float16":
        allowed += 2.0**-25  # half a step of its own smallest numbers
    assert (np.abs(got - want) <= allowed).all()
    assert (np.signbit(got) == np.signbit(want)).all()


DTYPES = ("bfloat16", "float16", "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_error_bound_holds_for_any_bits(dtype: str, data: st.DataObject) -> None:
    """Any pattern of bits that is a number below 2^120: subnormal, huge, zeros of both signs, mixed in one group."""
    layout = layout_of(dtype)
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    bits = random.integers(0, 256, layout.chunk_bytes, dtype=np.uint8).tobytes()
    values = to_floats(bits, dtype)
    values[~np.isfinite(values) | (np.abs(values) >= 2.0**120)] = 0.0
    spread = data.draw(st.sampled_from([0, 3, 20, 200]))
    if spread:  # otherwise nearly every group has one value that dwarfs the rest
        centre = data.draw(st.integers(-14, 12) if dtype == "float16" else st.integers(-126, 115))
        exponents = np.clip(centre - random.integers(0, spread + 1, len(values)), -149, 119)
        values = np.sign(values) * (1 + random.random(len(values))) * np.exp2(exponents)
    values[random.random(len(values)) < data.draw(st.sampled_from([0, 0.1, 1]))] *= 0.0
    chunk = from_floats(values, dtype)
    check_bound(chunk, there_and_back(built(layout), chunk)[1], layout)


def test_every_bfloat16() -> None:
    """Each of them once as the largest of its group, and once beside 1.0."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = to_floats(bits.tobytes(), "bfloat16")
    bits = bits[np.isfinite(values) & (np.abs(values) < 2.0**120)]
    for other in (0, 0x3F80):
        rows = np.full((len(bits), 32), other, "<u2")
        rows[:, 5] = bits
        layout = layout_of("bfloat16", heads=1, dim=32, tokens=len(bits) // 2)
        chunk = rows[: 2 * (len(bits) // 2)].tobytes()
        check_bound(chunk, there_and_back(built(layout), chunk)[1], layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_torch(dtype: str) -> None:
    """Nearest, ties to even, subnormals included: bit for bit another implementation's, given our scales."""
    torch = pytest.importorskip("torch")
    layout = layout_of(dtype, heads=4, dim=64, tokens=64)
    random = np.random.default_rng(1)
    count = layout.chunk_bytes // (4 if dtype == "float32" else 2)
    values = random.standard_normal(count) * np.exp2(random.integers(-12, 3, count))
    values[::7] = np.round(values[::7] * 256) / 256  # ties
    chunk = from_floats(values, dtype)
    serde = built(layout)
    blob, found = there_and_back(serde, chunk)
    groups = count // group_size(layout)
    scales = np.frombuffer(blob, np.int8, groups).astype(np.int32)
    scaled = np.ldexp(to_floats(chunk, dtype).reshape(groups, -1), -scales[:, None]).astype(np.float32)
    assert 232 < np.abs(scaled).max() <= 464
    codes = torch.from_numpy(scaled).to(torch.float8_e4m3fn)
    assert codes.view(torch.uint8).numpy().tobytes() == blob[groups:]
    decoded = np.ldexp(codes.float().numpy(), scales[:, None])
    assert from_floats(decoded.reshape(-1), dtype) == found


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_e4m3_holds_comes_back_as_it_was(dtype: str) -> None:
    layout = layout_of(dtype)
    chunk = from_floats(np.tile([448.0, -1.0, 0.0, -0.0, 0.5, 1.125, 2.0**-9, -(2.0**-6)], VALUES // 8), dtype)
    assert there_and_back(built(layout), chunk)[1] == chunk
    assert there_and_back(built(layout), bytes(layout.chunk_bytes))[1] == bytes(layout.chunk_bytes)


def test_the_largest_float16_stays_one() -> None:
    chunk = from_floats(np.tile([65504.0, -65504.0, 63488.0, 1.0], VALUES // 4), "float16")
    found = to_floats(there_and_back(built(layout_of("float16")), chunk)[1], "float16")
    assert found[:4].tolist() == [65504.0, -65504.0, 65504.0, 1.0]


def test_error_and_size_of_values_like_a_cache() -> None:
    layout = layout_of("bfloat16", heads=8, dim=128, tokens=64)
    random = np.random.default_rng(3)
    channels = np.exp(random.standard_normal(128) * 1.5)  # some channels of K are far larger than the others
    values = random.standard_normal((layout.chunk_bytes // 256, 128)) * channels
    chunk = from_floats(values.reshape(-1), "bfloat16")
    blob, found = there_and_back(built(layout), chunk)
    want, got = to_floats(chunk, "bfloat16"), to_floats(found, "bfloat16")
    assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < 0.028
    assert len(blob) / len(chunk) < 0.51


def test_groups_are_parts_of_heads() -> None:
    """And small enough in number that scales stay below 4 % of the values."""
    expected = {(8, 128): 128, (8, 64): 64, (1, 576): 96, (4, 256): 128, (2, 80): 80, (1, 131): 131, (4, 16): 32}
    expected |= {(3, 16): 48, (1, 16): 16, (6, 8): 48}
    for (heads, dim), group in expected.items():
        layout = layout_of("bfloat16", heads, dim)
        assert group_size(layout) == group
        assert built(layout).codec == f"fp8-e4m3/1/group{group}"
        if heads * dim >= GROUP[0]:
            assert built(layout).bound() <= 0.52 * layout.chunk_bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 2.0**120])
def test_what_is_no_number_is_refused(dtype: str, bad: float) -> None:
    layout = layout_of(dtype)
    serde = built(layout)
    for at in (0, 77, VALUES - 1):
        values = np.ones(VALUES)
        values[at] = bad
        with pytest.raises(ValueError, match="NaN, infinity or values from"):
            there_and_back(serde, from_floats(values, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blobs_that_were_never_written_are_refused(dtype: str) -> None:
    layout = layout_of(dtype)
    serde = built(layout)
    blob, _ = there_and_back(serde, from_floats(np.ones(VALUES), dtype))
    groups = VALUES // group_size(layout)
    bad = {0: (127, 113, -118 % 256, 128), groups: (0x7F, 0xFF), len(blob) - 1: (0x7F, 0xFF)}
    crafted = [blob[:at] + bytes([value]) + blob[at + 1 :] for at, values in bad.items() for value in values]
    if dtype == "float16":
        crafted.append(bytes([16]) + blob[1:groups] + b"\x7e" + blob[groups + 1 :])
    for wrong in (*crafted, b"", blob[:-1], blob + b"\0"):
        with pytest.raises(CorruptChunk) as caught:
            serde.decode([memoryview(wrong)], [memoryview(bytearray(layout.chunk_bytes))])
        assert caught.value.reason == MissReason.CORRUPT


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=VALUES + VALUES // 32, max_size=VALUES + VALUES // 32), st.sampled_from(DTYPES))
def test_any_bytes_decode_to_numbers_or_are_refused(blob: bytes, dtype: str) -> None:
    layout = layout_of(dtype)
    room = bytearray(layout.chunk_bytes)
    try:
        built(layout).decode([memoryview(blob)], [memoryview(room)])
    except CorruptChunk:
        return
    assert np.isfinite(to_floats(bytes(room), dtype)).all()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float8_e4m3fn", "float8_e5m2"])
def test_types_without_a_meaning_here_are_refused(dtype: str) -> None:
    with pytest.raises(Unsupported, match=f"not {dtype}: use serde zstd"):
        built(layout_of(dtype))


def test_opaque_pages_are_refused() -> None:
    pages = KVLayout("pages", "bfloat16", 1, 2, 2, 32, chunk_tokens=4, block_tokens=4, packing="vllm-cpu/1/amx")
    with pytest.raises(Unsupported, match=r"vllm-cpu/1/amx.*opaque"):
        built(pages)
    tiers = [
        {"name": "dram", "capacity": "1MiB", "backend": {"type": "cpu"}},
        {"name": "cold", "capacity": "1MiB", "backend": {"type": "gds", "path": "/none"}, **FP8},
    ]
    config = PipelineConfig.model_validate({"chunk_tokens": 4, "tiers": tiers})
    with pytest.raises(ConfigError, match=r"tiers\.cold\.serde") as caught:
        build(config, pages)
    assert "opaque" in str(caught.value)


def test_through_a_tier(tmp_path: Any) -> None:
    """From a configuration to a disk and back; a chunk with NaN is dropped and counted, the others are stored."""
    tiers = [
        {"name": "dram", "capacity": "4MiB", "backend": {"type": "cpu"}},
        {"name": "cold", "capacity": "64MiB", "backend": GdsConfig(path=tmp_path), **FP8},
    ]
    layout = layout_of("bfloat16", heads=2, dim=64, tokens=16)
    loaded = load({"chunk_tokens": 16, "tiers": tiers}, env={})
    pipeline = build(loaded.config, layout, plugins=loaded.plugins)
    try:
        (tier,) = pipeline.tiers
        names = [ChunkKey(bytes([i]) * 32) for i in range(3)]
        random = np.random.default_rng(5)
        chunks = [from_floats(random.standard_normal(layout.chunk_bytes // 2), "bfloat16") for _ in names]
        for slot, chunk in enumerate(chunks):
            pipeline.slots.payload(slot)[:] = chunk
            assert tier.write(names[slot : slot + 1], [slot]) == [None]
            assert tier.read(names[slot : slot + 1], [slot]) == [None]
            check_bound(chunk, bytes(pipeline.slots.payload(slot)), layout)
        pipeline.slots.payload(0)[:2] = b"\xff\x7f"
        assert tier.write([ChunkKey(b"n" * 32)], [0]) == [MissReason.ERROR]
        assert tier.stats()["encode_errors"] == 1
        assert "NaN" in tier.last_error
    finally:
        pipeline.close()


def test_lmcachectl_check_sends_it_numbers(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kv.yaml"
    file.write_text(
        f"""
tiers:
  - {{name: dram, capacity: 128MiB, backend: {{type: cpu}}}}
  - {{name: cold, capacity: 64MiB, serde: {{type: fp8}}, lossy: true, backend: {{type: gds, path: {tmp_path}/kv}}}}
"""
    )
    assert main(["check", str(file)]) == 0, capsys.readouterr().out
    assert "codec fp8-e4m3/1" in capsys.readouterr().out
