"""The native library and its fallbacks give the same bytes, at every instruction set the machine has."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core import _native

SIMD = ("portable", "portable+sha", "avx2+sha", "avx512+sha")
EVERYTHING = "avx512+sha"


@pytest.fixture(params=[*SIMD, "fallback"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test once per implementation of everything."""
    name: str = request.param
    if name == "fallback":
        monkeypatch.setattr(_native, "_library", None)
    elif not _native.available():
        pytest.skip(f"no native library: {_native.why_not()}")
    elif _native.limit_simd(name) != name:
        _native.limit_simd(EVERYTHING)
        pytest.skip(f"this CPU has no {name}")
    yield name
    if name != "fallback":
        _native.limit_simd(EVERYTHING)


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


# Checksums.


def test_xxh3_equals_the_xxhash_package_for_every_length_class(variant: str) -> None:
    data = noise(4096 + 64)
    base = _native.address_of(data)
    lengths = np.arange(4097)
    for shift in (0, 1, 13):
        got = _native.xxh3_64_batch(np.full(4097, base + shift), lengths)
        assert got.tolist() == [xxhash.xxh3_64_intdigest(data[shift : shift + n].tobytes()) for n in range(4097)]


def test_xxh3_of_large_buffers(variant: str) -> None:
    data = noise((3 << 20) + 100, seed=1)
    base = _native.address_of(data)
    rng = random.Random(2)
    cases = [(rng.randrange(64), rng.randrange(4097, 3 << 20)) for _ in range(20)]
    cases += [(0, 1 << 20), (0, (1 << 20) + 1), (0, 1024 * 17), (0, 1024 * 17 + 64), (5, 3 << 20)]
    got = _native.xxh3_64_batch([base + at for at, _ in cases], [n for _, n in cases])
    assert got.tolist() == [xxhash.xxh3_64_intdigest(data[at : at + n].tobytes()) for at, n in cases]


def test_xxh3_of_one_buffer_takes_every_kind() -> None:
    data = noise(5000, seed=3)
    expected = xxhash.xxh3_64_intdigest(data.tobytes())
    assert _native.xxh3_64(data) == expected
    assert _native.xxh3_64(data.data) == expected
    assert _native.xxh3_64(bytearray(data)) == expected


def test_batches_need_columns_of_one_length() -> None:
    with pytest.raises(ValueError, match="one length"):
        _native.xxh3_64_batch([1, 2], [3])
    column = np.zeros((2, 1), np.int64)
    with pytest.raises(ValueError, match="one length"):
        _native.copy_batch(column, column, column)


# Prefix hashing.


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 8, 9, 16, 21, 22, 23, 24, 256, 1000])
def test_sha256_chain_equals_hashlib(variant: str, chunk_tokens: int) -> None:
    rng = np.random.default_rng(chunk_tokens)
    tokens = rng.integers(0, 2**31, 5 * chunk_tokens, dtype=np.int32)
    state = hashlib.sha256(b"seed").digest()
    expected: list[bytes] = []
    for i in range(5):
        chunk = tokens[i * chunk_tokens : (i + 1) * chunk_tokens]
        expected.append(hashlib.sha256((expected[-1] if expected else state) + chunk.astype("<i4").tobytes()).digest())
    assert _native.sha256_chain(state, tokens, chunk_tokens) == b"".join(expected)


def test_sha256_chain_continues_where_it_stopped(variant: str) -> None:
    tokens = np.arange(64, dtype=np.int32)
    whole = _native.sha256_chain(bytes(32), tokens, 16)
    first = _native.sha256_chain(bytes(32), tokens[:16], 16)
    assert first + _native.sha256_chain(first, tokens[16:], 16) == whole
    assert _native.sha256_chain(bytes(32), tokens[:0], 16) == b""


def test_sha256_chain_refuses_what_it_would_hash_wrongly(variant: str) -> None:
    tokens = np.arange(64, dtype=np.int32)
    with pytest.raises(ValueError, match="32 bytes"):
        _native.sha256_chain(bytes(31), tokens, 16)
    with pytest.raises(ValueError, match="int32"):
        _native.sha256_chain(bytes(32), tokens.astype(np.int64), 16)
    with pytest.raises(ValueError, match="whole chunks"):
        _native.sha256_chain(bytes(32), tokens, 48)
    with pytest.raises(ValueError, match="contiguous"):
        _native.sha256_chain(bytes(32), tokens[::2], 16)


# Copies.


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("scale", [1, 300], ids=["cached", "streaming"])
def test_copy_batch(variant: str, threads: int, scale: int) -> None:
    rng = random.Random(scale)
    lengths = [n * scale for n in (0, 1, 63, 64, 4096, 16384, 16385, 70001)]
    gap = 97
    source = noise(sum(lengths) + gap * len(lengths), seed=4)
    target = np.full(source.size + 64, 0xEE, np.uint8)
    expected = target.copy()
    to, at = [], []
    position = 0
    for n in lengths:
        shift = rng.randrange(gap)
        at.append(_native.address_of(source) + position)
        to.append(_native.address_of(target) + position + shift)
        expected[position + shift : position + shift + n] = source[position : position + n]
        position += n + gap
    _native.copy_batch(to, at, lengths, threads)
    assert np.array_equal(target, expected)


# File I/O.


def test_pread_and_pwrite(variant: str, tmp_path: Path) -> None:
    data, back = noise(300_000, seed=5), np.zeros(300_000, np.uint8)
    source, target = _native.address_of(data), _native.address_of(back)
    lengths = [100_000, 0, 199_999, 1]
    starts = [0, 100_000, 100_000, 299_999]
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        wrote = _native.pwrite_batch([fd] * 4, starts, [source + s for s in starts], lengths)
        assert wrote.tolist() == lengths
        assert (tmp_path / "file").read_bytes() == data.tobytes()
        assert _native.pread_batch([fd] * 4, starts, [target + s for s in starts], lengths).tolist() == lengths
        assert np.array_equal(back, data)
        # Short at the end of the file, nothing behind it.
        back[:] = 0xEE
        assert _native.pread_batch([fd, fd], [299_990, 400_000], [target, target + 50], [40, 40]).tolist() == [10, 0]
        assert back[:10].tobytes() == data[-10:].tobytes()
        assert set(back[10:].tolist()) == {0xEE}
    finally:
        os.close(fd)


def test_io_errors_are_errno_per_item(variant: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    room = np.zeros(10, np.uint8)
    at = _native.address_of(room)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    pipe = os.pipe()
    try:
        got = _native.pread_batch([-1, fd, pipe[0]], [0, 0, 0], [at] * 3, [10] * 3)
        assert got.tolist() == [-errno.EBADF, 10, -errno.ESPIPE]
        assert _native.pwrite_batch([fd], [0], [at], [10]).tolist() == [-errno.EBADF]
    finally:
        for number in (fd, *pipe):
            os.close(number)


def test_short_writes_are_continued_until_the_error_shows(variant: str, tmp_path: Path) -> None:
    # Beyond the file size limit the kernel first writes what fits, then says EFBIG.
    data = noise(8192, seed=6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        assert _native.pwrite_batch([fd], [0], [_native.address_of(data)], [8192]).tolist() == [-errno.EFBIG]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == data[:4096].tobytes()


# Byte planes.


@pytest.mark.parametrize("itemsize", [2, 4])
@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 300), data=st.data())
def test_planes_against_numpy(itemsize: int, count: int, data: st.DataObject) -> None:
    elements = noise(count * itemsize, seed=data.draw(st.integers(0, 9)))
    for name in SIMD:
        _native.limit_simd(name)
        planes, back = np.zeros_like(elements), np.zeros_like(elements)
        _native.split_planes(elements, planes, itemsize)
        assert np.array_equal(planes.reshape(itemsize, count), elements.reshape(count, itemsize).T)
        _native.join_planes(planes, back, itemsize)
        assert np.array_equal(back, elements)
    _native.limit_simd(EVERYTHING)


def test_planes_of_a_large_buffer(variant: str) -> None:
    elements = noise(1 << 20, seed=7)
    planes, back = np.zeros_like(elements), np.zeros_like(elements)
    _native.split_planes(elements, planes, 2)
    assert np.array_equal(planes[: 1 << 19], elements[::2])
    _native.join_planes(planes, back, 2)
    assert np.array_equal(back, elements)


def test_planes_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="2 or 4"):
        _native.split_planes(bytes(6), bytearray(6), 3)
    with pytest.raises(ValueError, match="cannot arrange 7 bytes"):
        _native.split_planes(bytes(7), bytearray(7), 2)
    with pytest.raises(ValueError, match="cannot arrange"):
        _native.join_planes(bytes(8), bytearray(6), 2)
    with pytest.raises(ValueError, match="read-only"):
        _native.split_planes(bytes(8), bytes(8), 2)


# Buffers and loading.


def test_addresses_are_only_taken_of_contiguous_buffers() -> None:
    array = np.arange(100, dtype=np.int64).reshape(10, 10)
    assert _native.address_of(array) == array.ctypes.data
    assert _native.address_of(array.data) == array.ctypes.data
    with pytest.raises(ValueError, match="not contiguous"):
        _native.address_of(array[:, 1:])
    with pytest.raises(ValueError, match="contiguous"):
        _native.address_of(memoryview(bytes(10))[::2])
    with pytest.raises(ValueError, match="read-only"):
        _native.address_of(b"constant", writable=True)


def test_a_view_is_the_memory_itself() -> None:
    array = np.zeros(16, np.uint8)
    view = _native.view_at(array.ctypes.data, 16)
    view[3:5] = b"ab"
    assert array[3:5].tobytes() == b"ab"
    assert len(view) == 16


def test_unknown_instruction_sets_are_refused() -> None:
    for name in ("sse9", "avx2+aes", ""):
        with pytest.raises(ValueError, match="unknown instruction set"):
            _native.limit_simd(name)


def test_the_environment_switches_the_library_off() -> None:
    program = (
        "from lmcache_core import _native as n\n"
        "assert not n.available() and n.simd() == n.limit_simd('avx2') == 'none', n.simd()\n"
        "assert 'LMCACHE_NATIVE=0' in n.why_not()\n"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "LMCACHE_NATIVE": "0"}, check=True)


@pytest.mark.parametrize(
    "content, says",
    [(None, "was not built"), (b"not a library", "does not load")],
    ids=["missing", "broken"],
)
def test_a_library_that_cannot_be_used_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, says: str
) -> None:
    monkeypatch.delenv("LMCACHE_NATIVE", raising=False)
    path = tmp_path / "liblmcache_host.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(_native, "LIBRARY", path)
    library, why = _native._load()
    assert library is None
    assert says in why
    assert "reinstall" in why


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not _native.available():
        pytest.skip(f"no native library: {_native.why_not()}")
    monkeypatch.setattr(_native, "ABI_VERSION", 99)
    library, why = _native._load()
    assert library is None
    assert "these sources need 99" in why


def test_the_descriptor_is_what_the_header_declares() -> None:
    header = Path(__file__).parents[1] / "csrc/include/lmcache_host.h"
    assert f"#define LMC_ABI_VERSION {_native.ABI_VERSION}" in header.read_text()
    assert f"#define LMC_MAX_DIMS {_native.MAX_DIMS}" in header.read_text()
    assert ctypes.sizeof(_native.Part) == 8 * (7 + 3 * _native.MAX_DIMS)
