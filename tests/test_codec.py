"""The `cachegen` codec: every implementation equals the reference, loss stays within its bound, damage is an error."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from codec_cases import KINDS, any_case, any_turned, chunk, coding, floats, reseal, tampered
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lmcache_core import _native
from lmcache_serde.cachegen import native, reference
from lmcache_serde.cachegen.format import (
    ANCHORED,
    AUTO,
    AUX,
    DTYPES,
    LOSSLESS,
    PER_TOKEN,
    RAW,
    ROW,
    TABLES,
    CodecError,
    Coding,
    Shape,
    parse,
)
from lmcache_serde.cachegen.profile import Profile, calibrate

GOLDEN = Path(__file__).parent / "golden" / "codec"
SETS = ("portable", "avx2", "avx512")


@pytest.fixture(params=SETS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.simd()
    wanted = str(request.param)
    if _native.limit_simd(wanted + "+sha").split("+")[0] != wanted:
        pytest.skip(f"{wanted} is not there: {_native.why_not() or before}")
    yield wanted
    _native.limit_simd("avx512+sha")


def encode(
    shape: Shape, how: Coding, data: NDArray[np.uint8], profile: Profile | None = None, start: int = -1
) -> tuple[NDArray[np.uint8], int]:
    room = np.full(shape.bound + (AUX if profile else 0), 0xAA, np.uint8)
    (size,), (raw,) = native.encode(shape, how, [data], [room], profile, [start])
    return room[:size], raw


def decode(shape: Shape, blob: NDArray[np.uint8], profile: Profile | None = None) -> NDArray[np.uint8]:
    out = np.full(shape.nbytes, 0xAA, np.uint8)
    native.decode(shape, [blob], [out], profile=profile)
    return out


def test_every_instruction_set_equals_the_reference(simd: str) -> None:
    rng = np.random.default_rng(4)
    for _ in range(40):
        shape, how, data = any_case(rng)
        expected = reference.encode(shape, how, data)
        blob, raw = encode(shape, how, data)
        assert np.array_equal(blob, expected), (shape, how)
        stored = expected[parse(expected, shape).starts[:-1] + 10] == RAW
        assert raw == (stored & (how.modes != RAW)).sum()
        values = reference.decode(shape, blob)
        assert np.array_equal(decode(shape, blob), values), (shape, how)
        layer = np.zeros(shape.nbytes // shape.layers, np.uint8)
        native.decode(shape, [blob], [layer], shape.layers - 1, 1)
        assert np.array_equal(layer, values[-layer.size :])


@pytest.fixture
def every_set() -> Iterator[list[str]]:
    """The instruction sets that are here, to go through with `_native.limit_simd`."""
    yield [name for name in SETS if _native.limit_simd(name + "+sha").split("+")[0] == name]
    _native.limit_simd("avx512+sha")


def test_every_instruction_set_transforms_as_the_reference(every_set: list[str]) -> None:
    rng = np.random.default_rng(12)
    turned = 0
    for _ in range(12):
        shape, how, data, profile, start = any_turned(rng)
        expected = reference.encode(shape, how, data, profile, start)
        info = parse(expected, shape, profile)
        modes = expected[info.starts[:-1] + 10]
        turned += int(((modes == ANCHORED) | (modes == PER_TOKEN)).sum())
        values = reference.decode(shape, expected, profile=profile)
        assert info.start == start
        for name in every_set:
            _native.limit_simd(name + "+sha")
            blob, raw = encode(shape, how, data, profile, start)
            assert np.array_equal(blob, expected), (name, shape, how)
            assert raw == ((modes == RAW) & (how.modes != RAW)).sum()
            assert np.array_equal(decode(shape, blob, profile), values), (name, shape, how)
            layer = np.zeros(shape.nbytes // shape.layers, np.uint8)
            native.decode(shape, [blob], [layer], shape.layers - 1, 1, profile)
            assert np.array_equal(layer, values[-layer.size :])
    assert turned > 10


def test_sums_beyond_32_bits_are_taken_modulo_2_to_the_32(every_set: list[str]) -> None:
    """Only a damaged blob makes them; every decoder must make the same of it."""
    rng = np.random.default_rng(0)
    signs = np.ones((1, 1))
    while len(signs) < 128:
        signs = np.block([[signs, signs], [signs, -signs]])
    basis = np.rint(np.broadcast_to(signs / np.sqrt(128) * 2.0**13, (1, 2, 1, 128, 128))).astype(np.int16)
    profile = Profile(2, rng.integers(1 << 62, size=32, dtype=np.uint64), np.zeros((1, 128), np.float32), basis)
    shape = Shape("bfloat16", 1, 2, 33, 128)
    how = Coding(3, np.full(2, ANCHORED, np.uint8), np.full(2, -24, np.int16), 0)
    blob = encode(shape, how, chunk(rng, shape, "plain"), profile, 0)[0].copy()
    starts = parse(blob, shape, profile).starts
    anchors = np.where(basis[0, 0, 0, :, 5] < 0, -32600, 32600)  # all of one sign in the sum of channel 5
    assert abs(int((anchors * basis[0, 0, 0, :, 5].astype(np.int64)).sum())) > 1 << 31
    for start in starts[:-1]:
        assert blob[start + 10] == ANCHORED
        blob[start + ROW.itemsize : start + ROW.itemsize + 256].view("<i2")[:] = anchors
    reseal(blob, shape, starts)
    want = reference.decode(shape, blob, profile=profile)
    for level in every_set:
        _native.limit_simd(level + "+sha")
        assert np.array_equal(decode(shape, blob, profile), want), level


def test_what_a_call_is_lent_lives_as_long_as_the_call() -> None:
    """Since Python 3.12 two threads that meet a new profile both make its matrices, and those of one are dropped."""
    library = _native.library()
    assert library is not None
    shape, _, _, profile, _ = any_turned(np.random.default_rng(0))
    codec = native.described(shape)
    native._lend(library, codec, profile)
    matrices = [weakref.ref(matrix) for matrix in profile.matrices]
    del profile.__dict__["matrices"]
    gc.collect()
    assert all(matrix() is not None for matrix in matrices)
    del codec
    gc.collect()
    assert all(matrix() is None for matrix in matrices)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("mode", [ANCHORED, PER_TOKEN, LOSSLESS])
def test_any_number_of_tiles_side_by_side_is_decoded_alike(simd: str, groups: int, mode: int) -> None:
    rng = np.random.default_rng(12)
    for missing, dtype in ((0, "bfloat16"), (5, "bfloat16"), (0, "float16")):
        shape = Shape(dtype, 1, 1, 65, 64 * groups - missing)
        blob, _ = encode(shape, coding(shape, (mode,), tile_tokens=32, n_raw=missing % 2), chunk(rng, shape, "plain"))
        assert blob[int(parse(blob, shape).starts[0]) + 10] == mode
        assert np.array_equal(decode(shape, blob), reference.decode(shape, blob))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", KINDS)
def test_lossless_is_exact_and_never_larger_than_its_bound(dtype: str, kind: str) -> None:
    shape = Shape(dtype, 2, 2, 50, 72)
    data = chunk(np.random.default_rng(5), shape, kind)
    blob, _ = encode(shape, coding(shape, (LOSSLESS, LOSSLESS)), data)
    assert blob.size <= shape.bound
    assert np.array_equal(decode(shape, blob), data)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    mode=st.sampled_from([ANCHORED, PER_TOKEN]),
    kind=st.sampled_from(["plain", "outliers", "sparse", "sink"]),
    offset=st.integers(-100, 32),
)
def test_no_value_is_further_off_than_half_a_step(seed: int, dtype: str, mode: int, kind: str, offset: int) -> None:
    shape = Shape(dtype, 1, 1, 70, 128)
    data = chunk(np.random.default_rng(seed), shape, kind)
    blob, _ = encode(shape, coding(shape, (mode,), offset), data)
    start = int(parse(blob, shape).starts[0])
    head = blob[start : start + 16].view(ROW)[0]
    bits = np.uint32 if dtype == "float32" else np.uint16
    x = reference.to_float(data.view(bits), dtype).reshape(70, 128).astype(np.float64)
    y = reference.to_float(decode(shape, blob).view(bits), dtype).reshape(70, 128).astype(np.float64)
    if head["mode"] == RAW:
        assert np.array_equal(x, y)
        return
    side = start + 16
    record = side + (256 if mode == ANCHORED else 80)
    codes = np.array([head["code"]]) if mode == ANCHORED else blob[side : side + 70].astype(np.int64)
    kinds = blob[record : record + 128] >> 5
    step = 2.0 ** (codes / 8 + int(head["base"]))[:, None] * 2.0 ** np.where(kinds > 2, kinds - 2.0, 0)
    digits = {"bfloat16": 8, "float16": 11, "float32": 24}[dtype]
    last_place = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(y), 1e-30))) + 1 - digits, -24)
    assert (np.abs(x - y) <= step / 2 * (1 + 2**-7) + last_place / 2).all()


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    mode=st.sampled_from([ANCHORED, PER_TOKEN]),
    kind=st.sampled_from(["plain", "outliers", "sparse"]),
    offset=st.integers(-100, 32),
)
def test_no_transformed_value_is_further_off_than_stated(
    seed: int, dtype: str, mode: int, kind: str, offset: int
) -> None:
    """The bound of docs/codec.md, of every value of K and V."""
    rng = np.random.default_rng(seed)
    shape = Shape(dtype, 1, 2, 70, 128)
    sample = rng.standard_normal((1, 2, 200, 128), np.float32) @ rng.standard_normal((1, 2, 128, 128), np.float32)
    profile = calibrate([sample], 2, 1 / 2.0 ** np.arange(3, 35))
    data = chunk(rng, shape, kind)
    blob, _ = encode(shape, coding(shape, (mode, mode), offset), data, profile, 1000)
    bits = np.uint32 if dtype == "float32" else np.uint16
    x, y = (
        reference.to_float(raw.view(bits), dtype).reshape(2, 70, 128).astype(np.float64)
        for raw in (data, decode(shape, blob, profile))
    )
    digits = {"bfloat16": 8, "float16": 11, "float32": 24}[dtype]
    for plane, start in enumerate(parse(blob, shape, profile).starts[:2]):
        head = blob[start : start + 16].view(ROW)[0]
        if head["mode"] == RAW:
            assert np.array_equal(x[plane], y[plane])
            continue
        side = start + 16
        record = side + (256 if mode == ANCHORED else 80)
        codes = np.array([head["code"]]) if mode == ANCHORED else blob[side : side + 70].astype(np.int64)
        kinds = blob[record : record + 128] >> 5
        steps = 2.0 ** (codes / 8 + int(head["base"]))[:, None] * 2.0 ** np.where(kinds > 2, kinds - 2.0, 0)
        basis = np.abs(profile.basis[0, plane, 0].astype(np.float64)) / 2**13
        off = np.broadcast_to(steps / 2 * (1 + 2**-7), (70, 128)) @ basis
        # Fixed point, and a basis of whole numbers: parts of the token's largest value.
        size = np.abs(x[plane]).max(1, keepdims=True) + np.abs(profile.mean[0]).max()
        off = off + 128 * 2**-11 * size
        if plane == 0:
            off = np.tile(off.reshape(70, 2, 2, 32).sum(2, keepdims=True), (1, 1, 2, 1)).reshape(70, 128)
        last_place = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(y[plane]), 1e-30))) + 1 - digits, -24)
        assert (np.abs(x[plane] - y[plane]) <= off + last_place / 2).all()


def test_noise_costs_no_more_than_the_bound_and_is_counted() -> None:
    shape = Shape("bfloat16", 3, 2, 40, 64)
    data = chunk(np.random.default_rng(6), shape, "noise")
    blob, raw = encode(shape, coding(shape), data)
    assert blob.size == shape.bound
    assert raw == shape.rows
    assert np.array_equal(decode(shape, blob), data)


def test_zeros_cost_next_to_nothing() -> None:
    shape = Shape("bfloat16", 2, 2, 256, 64)
    data = np.zeros(shape.nbytes, np.uint8)
    for modes in ((ANCHORED, PER_TOKEN), (LOSSLESS, LOSSLESS)):
        blob, _ = encode(shape, coding(shape, modes), data)
        assert np.array_equal(decode(shape, blob), data)
    blob, _ = encode(shape, coding(shape), data)
    assert shape.nbytes / blob.size > 40


def test_neighbouring_tokens_that_resemble_each_other_cost_less() -> None:
    rng = np.random.default_rng(7)
    shape = Shape("float32", 1, 1, 256, 64)
    steps = rng.standard_normal((256, 64)).astype(np.float32)
    rough, smooth = steps, np.cumsum(steps, 0, dtype=np.float32)
    sizes = [encode(shape, coding(shape, (ANCHORED,)), v.reshape(-1).view(np.uint8))[0].size for v in (rough, smooth)]
    assert sizes[1] < 0.75 * sizes[0]


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_sinks_are_found_and_kept_exactly(sinks: int) -> None:
    shape = Shape("bfloat16", 3, 2, 64, 64)
    values = floats(np.random.default_rng(8), shape, "plain")
    if sinks:
        values[1::2, sinks - 1] *= 0.05
    data = (values.view(np.uint32) >> 16).astype(np.uint16)
    blob, _ = encode(shape, coding(shape, n_raw=AUTO), data.reshape(-1).view(np.uint8))
    assert parse(blob, shape).n_raw == sinks
    decoded = decode(shape, blob).view(np.uint16).reshape(data.shape)
    assert np.array_equal(decoded[:, :sinks], data[:, :sinks])


def test_without_the_library_the_reference_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    shape, how, data = any_case(rng)
    expected, raw = encode(shape, how, data)
    values = decode(shape, expected)
    monkeypatch.setattr(native, "_library", None)
    blob, slow_raw = encode(shape, how, data)
    assert np.array_equal(blob, expected)
    assert slow_raw == raw
    assert np.array_equal(decode(shape, blob), values)


@pytest.mark.parametrize("modes", [(ANCHORED, PER_TOKEN), (LOSSLESS, LOSSLESS)])
def test_every_flipped_bit_and_every_cut_is_an_error(modes: tuple[int, int]) -> None:
    shape = Shape("bfloat16", 1, 2, 20, 64)
    rng = np.random.default_rng(10)
    blob, _ = encode(shape, coding(shape, modes, n_raw=2), chunk(rng, shape, "plain"))
    out = np.empty(shape.nbytes, np.uint8)
    for at in range(blob.size):
        for bit in range(8) if at < 96 else [int(rng.integers(8))]:
            if at == 6:
                continue  # the level's number means nothing to a decoder, but its check does: below
            blob[at] ^= 1 << bit
            with pytest.raises(CodecError):
                native.decode(shape, [blob], [out])
            blob[at] ^= 1 << bit
    blob[6] ^= 1
    with pytest.raises(CodecError, match="check"):
        native.decode(shape, [blob], [out])
    blob[6] ^= 1
    for length in [*range(0, blob.size, 7), blob.size - 1]:
        with pytest.raises(CodecError):
            native.decode(shape, [blob[:length].copy()], [out])
        if length % 64 == 0:
            with pytest.raises(CodecError):
                reference.decode(shape, blob[:length].copy())
    with pytest.raises(CodecError):
        native.decode(shape, [np.concatenate([blob, blob[:16]])], [out])


def test_tampered_blobs_under_good_checks_meet_the_same_end_everywhere(simd: str) -> None:
    rng = np.random.default_rng(11)
    refused = 0
    for case in range(6):
        shape = Shape(str(rng.choice(list(DTYPES))), 1, 2, 24, 70)
        modes = ((ANCHORED, PER_TOKEN), (LOSSLESS, ANCHORED))[case % 2]
        blob, _ = encode(shape, coding(shape, modes, tile_tokens=16, n_raw=case % 3), chunk(rng, shape, "plain"))
        for _ in range(25):
            bad = tampered(rng, blob, shape)
            try:
                expected = reference.decode(shape, bad)
            except CodecError:
                refused += 1
                with pytest.raises(CodecError):
                    decode(shape, bad)
            else:
                assert np.array_equal(decode(shape, bad), expected)
    assert refused > 60


def test_tampered_transformed_blobs_meet_the_same_end_everywhere(every_set: list[str]) -> None:
    rng = np.random.default_rng(13)
    refused = 0
    for _ in range(4):
        shape, how, data, profile, start = any_turned(rng)
        blob, _ = encode(shape, how, data, profile, start)
        for _ in range(10):
            bad = tampered(rng, blob, shape, profile)
            try:
                expected = reference.decode(shape, bad, profile=profile)
            except CodecError:
                refused += 1
                expected = None
            for name in every_set:
                _native.limit_simd(name + "+sha")
                if expected is None:
                    with pytest.raises(CodecError):
                        decode(shape, bad, profile)
                else:
                    assert np.array_equal(decode(shape, bad, profile), expected), name
    assert refused > 10


def test_lies_about_the_transform_are_refused() -> None:
    rng = np.random.default_rng(14)
    shape, how, data, profile, _ = any_turned(rng)
    other = Profile(profile.heads, profile.turns, profile.mean + 1, profile.basis)
    blob, _ = encode(shape, how, data, profile, 7)
    plain, _ = encode(shape, how, data, profile, -1)
    assert np.array_equal(decode(shape, plain, profile), decode(shape, plain))
    starts = parse(blob, shape, profile).starts
    end = int(starts[0])
    # transform, profile, aux, a position that cannot be, a reserved word
    for at, value in ((19, 2), (19, 0), (32, blob[32] ^ 1), (40, 32), (end - 10, 1), (end - 1, 1)):
        bad = blob.copy()
        bad[at] = value
        reseal(bad, shape, starts)
        for decoder in (reference.decode, decode):
            with pytest.raises(CodecError):
                decoder(shape, bad, profile=profile)
    for theirs in (None, other):
        for decoder in (reference.decode, decode):
            with pytest.raises(CodecError):
                decoder(shape, blob, profile=theirs)
    with pytest.raises(ValueError, match="does not fit"):
        decode(Shape("float8_e5m2", shape.layers, 2, shape.tokens, shape.channels), blob, profile)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=600), whole=st.booleans())
def test_arbitrary_bytes_are_an_error(data: bytes, whole: bool) -> None:
    shape = Shape("bfloat16", 1, 1, 4, 64)
    blob = np.frombuffer(data, np.uint8)
    if whole:
        good, _ = encode(shape, coding(shape), np.zeros(shape.nbytes, np.uint8))
        blob = np.concatenate([good[:48], blob])
    with pytest.raises(CodecError):
        native.decode(shape, [blob.copy()], [np.empty(shape.nbytes, np.uint8)])


def test_calls_that_make_no_sense_are_refused() -> None:
    shape = Shape("bfloat16", 2, 2, 8, 64)
    good = coding(shape)
    data, room = np.zeros(shape.nbytes, np.uint8), np.zeros(shape.bound, np.uint8)
    with pytest.raises(ValueError, match="where"):
        native.encode(shape, good, [data[:-1]], [room])
    with pytest.raises(ValueError, match="where"):
        native.encode(shape, good, [data], [room[:-1]])
    with pytest.raises(ValueError, match="modes"):
        native.encode(shape, Coding(3, good.modes[:-1], good.offsets), [data], [room])
    with pytest.raises(ValueError, match="offsets"):
        native.encode(shape, Coding(3, good.modes, good.offsets + 100), [data], [room])
    with pytest.raises(ValueError, match="layers"):
        native.decode(shape, [room], [data], 1, 2)
    with pytest.raises(ValueError, match="dtype"):
        Shape("int8", 1, 1, 1, 1)
    with pytest.raises(ValueError, match="tokens"):
        Shape("bfloat16", 1, 1, 2000, 1)
    blob, _ = encode(shape, good, data)
    with pytest.raises(CodecError, match="channels"):
        reference.decode(Shape("bfloat16", 2, 2, 8, 63), blob)


def golden_input(shape: Shape) -> NDArray[np.uint8]:
    """Sums of bytes of a counter's hash, near Gaussian, exact in every float: no library's random numbers."""
    count = shape.nbytes // shape.item
    mixed = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(8)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    total = sum((mixed >> np.uint64(8 * k) & np.uint64(255)).astype(np.int64) for k in range(6)) - 765
    channel = np.arange(count) % shape.channels
    values = ((total * (1 + channel % 5) + 600 * (channel % 3)) / 256).astype(np.float32)
    return np.ascontiguousarray(reference.from_float(values, shape.dtype)).view(np.uint8)


GOLDEN_CASES = [
    ("bfloat16-lossy", Shape("bfloat16", 1, 2, 40, 70)),
    ("float16-lossy", Shape("float16", 1, 2, 40, 70)),
    ("float8_e4m3fn-lossy", Shape("float8_e4m3fn", 1, 2, 40, 70)),
    ("bfloat16-lossless", Shape("bfloat16", 1, 1, 150, 64)),
    ("float16-lossless", Shape("float16", 1, 1, 150, 64)),
]


def golden_coding(name: str, shape: Shape) -> Coding:
    lossless = name.endswith("lossless")
    return coding(
        shape, (LOSSLESS,) if lossless else (ANCHORED, PER_TOKEN), n_raw=1, tile_tokens=256 if lossless else 32
    )


@pytest.mark.parametrize("name, shape", GOLDEN_CASES)
def test_blobs_of_version_1_are_read_and_written_for_ever(name: str, shape: Shape) -> None:
    blob = np.fromfile(GOLDEN / f"{name}.blob", np.uint8)
    data = golden_input(shape)
    values = data if name.endswith("lossless") else np.fromfile(GOLDEN / f"{name}.values", np.uint8)
    assert RAW not in blob[parse(blob, shape).starts[:-1] + 10]
    assert np.array_equal(reference.decode(shape, blob), values)
    assert np.array_equal(decode(shape, blob), values)
    assert np.array_equal(encode(shape, golden_coding(name, shape), data)[0], blob)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_blobs_with_a_transform_are_read_and_written_for_ever(dtype: str) -> None:
    profile = Profile.load(GOLDEN / "turned.profile")
    shape = Shape(dtype, 1, 2, 40, 70)
    blob, values = (np.fromfile(GOLDEN / f"{dtype}-turned.{kind}", np.uint8) for kind in ("blob", "values"))
    assert RAW not in blob[parse(blob, shape, profile).starts[:-1] + 10]
    assert np.array_equal(reference.decode(shape, blob, profile=profile), values)
    assert np.array_equal(decode(shape, blob, profile), values)
    assert np.array_equal(encode(shape, golden_coding("lossy", shape), golden_input(shape), profile, 12345)[0], blob)


def test_the_tables_are_those_of_version_1() -> None:
    assert TABLES.id == 0xDF4C4F122739F3F5
    assert all(table.sum() == 2048 and table.min() > 0 for table in [*TABLES.lossy, *TABLES.lossless])
    assert TABLES.support[-1] == 127 and TABLES.length[-1] == 256
