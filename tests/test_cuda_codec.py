"""The codec's CUDA kernels, run as loops on the host, against the reference: every byte and every value."""

from __future__ import annotations

import ctypes

import cuda_emulation
import numpy as np
import pytest
from codec_cases import any_turned, tampered
from cuda_cases import CASES

from lmcache_core import _cuda
from lmcache_serde.cachegen import cuda, reference
from lmcache_serde.cachegen.format import AUTO, LOSSLESS, TABLES, CodecError, Shape, check64, parse


@pytest.fixture(scope="module")
def emulation() -> ctypes.CDLL:
    library = cuda_emulation.build()
    if library is None:
        pytest.skip("no C++ compiler here")
    return library


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_values_equal_the_reference(emulation: ctypes.CDLL, name: str) -> None:
    case = CASES[name]
    codec = cuda_emulation.Codec(emulation, case.shape)
    chunk = case.chunk()
    blob = reference.encode(case.shape, case.coding, chunk)
    assert np.array_equal(codec.encode(case.coding, chunk), blob)
    decoded = codec.decode(blob)
    assert decoded is not None
    assert np.array_equal(decoded, reference.decode(case.shape, blob))


def test_the_cases_reach_every_kind_of_channel_and_model() -> None:
    modes, kinds = set(), set()
    models: dict[bool, set[int]] = {False: set(), True: set()}
    for case in CASES.values():
        blob = reference.encode(case.shape, case.coding, case.chunk())
        info = parse(blob, case.shape)
        for number, start in enumerate(info.starts[:-1]):
            row = blob[start : info.starts[number + 1]]
            opened = reference._open_row(case.shape, info, number, row, np.zeros_like(_elements(case.shape)))
            modes.add(int(row[10]))
            if opened is not None:
                kinds |= {(opened.mode, int(kind)) for kind in opened.record >> 5}
                models[opened.mode == 3] |= {int(model) for model in opened.record & 31}
    assert modes == {0, 1, 2, 3}
    assert {kind for mode, kind in kinds if mode == 1} == {0, 1, 2, 3, 4, 5}
    assert {kind for mode, kind in kinds if mode == 2} >= {0, 3}
    assert len(models[False]) > len(TABLES.lossy) // 2 and len(models[True]) > 2


def _elements(shape: Shape) -> np.ndarray:
    return np.zeros((shape.tokens, shape.channels), f"u{shape.item}")


def resealed(blob: np.ndarray, shape: Shape) -> np.ndarray:
    """The blob with checks that fit whatever it now holds, where its row table allows that."""
    rows_at = 64 + (4 * shape.rows + 15) // 16 * 16
    ends = blob[64 : 64 + 4 * shape.rows].view("<u4")
    for start, end in zip([rows_at, *ends[:-1]], ends, strict=True):
        if rows_at <= start < end <= blob.size and not (start | end) % 16:
            blob[start : start + 8].view("<u8")[0] = check64(blob[start + 8 : end])
    blob[56:64].view("<u8")[0] = check64(blob[:56], blob[64:rows_at])
    return blob


@pytest.mark.parametrize(
    "name", ["usual", "bfloat16 mode 3", "random bits", "single tokens", "neighbours alike, in ranges"]
)
def test_damage_is_refused_where_the_reference_refuses_it(emulation: ctypes.CDLL, name: str) -> None:
    case = CASES[name]
    codec = cuda_emulation.Codec(emulation, case.shape)
    blob = reference.encode(case.shape, case.coding, case.chunk())
    rng = np.random.default_rng(0)
    heads = [
        *range(64 + 4 * case.shape.rows),
        *(int(s) + i for s in parse(blob, case.shape).starts[:-1] for i in range(48)),
    ]
    places = [*rng.choice(heads, 30), *rng.integers(0, blob.size, 30)]
    for i, place in enumerate(places):
        damaged = blob.copy()
        damaged[place] ^= 1 << rng.integers(8)
        if i % 2:
            damaged = resealed(damaged, case.shape)
        decoded = codec.decode(damaged)
        try:
            expected = reference.decode(case.shape, damaged)
        except CodecError:
            assert decoded is None, place
        else:
            assert decoded is not None and np.array_equal(decoded, expected), place
    for length in (0, 63, 64, blob.size // 2 & ~15, blob.size - 1, blob.size - 16):
        assert codec.decode(blob[:length].copy()) is None


def test_transformed_chunks_are_coded_as_the_reference_does(emulation: ctypes.CDLL) -> None:
    """Whole and tampered with, with the profile and without."""
    rng = np.random.default_rng(1)
    refused = encoded = 0
    for _ in range(10):
        shape, how, data, profile, start = any_turned(rng)
        codec = cuda_emulation.Codec(emulation, shape)
        blob = reference.encode(shape, how, data, profile, start)
        if how.n_raw != AUTO and LOSSLESS not in how.modes:
            encoded += 1
            assert np.array_equal(codec.encode(how, data, profile, start), blob)
        plain = reference.encode(shape, how, data)
        assert codec.decode(blob) is None
        for good in (blob, plain):
            decoded = codec.decode(good, profile)
            assert decoded is not None and np.array_equal(decoded, reference.decode(shape, good, profile=profile))
        for _ in range(4):
            damaged = tampered(rng, blob, shape, profile)
            decoded = codec.decode(damaged, profile)
            try:
                expected = reference.decode(shape, damaged, profile=profile)
            except CodecError:
                refused += 1
                assert decoded is None
            else:
                assert decoded is not None and np.array_equal(decoded, expected)
    assert refused > 10 and encoded > 3


def test_where_there_is_no_gpu_the_codec_says_so() -> None:
    if _cuda.available():
        pytest.skip("there is a GPU here")
    assert cuda.why_not() == _cuda.why_not()


@pytest.mark.skipif(_cuda._library is None, reason=f"no CUDA library: {_cuda._why_not}")
def test_scratch_memory_and_refusals_need_no_gpu() -> None:
    case = CASES["usual"]
    assert 0 < cuda.scratch_bytes(case.shape, 16) < cuda.scratch_bytes(case.shape, 16, case.coding)
    count = _cuda.call("codec_numbers", None, 0)
    numbers = np.zeros(count, np.int32)
    _cuda.call("codec_numbers", numbers.ctypes.data, count)
    assert numbers[0] == len(TABLES.lossy) and numbers[1] == len(TABLES.lossless)
    with pytest.raises(_cuda.CudaError, match="malformed"):  # no multiple of 16
        cuda.decode(case.shape, [8], [4096], [0], (0, 1 << 20), 0, 0)
    with pytest.raises(_cuda.CudaError, match="malformed"):  # too little scratch memory
        cuda.encode(case.shape, case.coding, [0], [0], (0, 1 << 10), 0, 0, 0)
    with pytest.raises(ValueError, match="vectors of one length"):
        cuda.decode(case.shape, [0], [4096, 1], [0], (0, 1 << 20), 0, 0)
