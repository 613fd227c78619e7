"""Sealed objects: no damage and no mix-up gets through, and the format of version 1 never changes."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.errors import CorruptChunk
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.layout import KVLayout
from lmcache_core.seal import MAGIC, RAW_CODEC, VERSION, read_header, seal, unseal
from lmcache_core.testing.memory import aligned
from lmcache_core.types import HEADER_BYTES, ChunkKey, MissReason

GOLDEN = Path(__file__).parent / "golden"
KEY = ChunkKey(bytes(range(32)))
OTHER_CHAIN = ChunkKey(KEY[:16] + bytes(16))
OTHER_IDENTITY = ChunkKey(bytes(16) + KEY[16:])
LAYOUT = b"L" * 16
CREATED = 1767225600


def sealed(nbytes: int, key: ChunkKey = KEY, seed: int = 0) -> memoryview:
    """A sealed object of `nbytes` bytes in all."""
    obj = aligned(nbytes)
    obj[HEADER_BYTES:] = random.Random(seed).randbytes(nbytes - HEADER_BYTES)
    obj[-1] |= 1  # so that every zeroed tail differs
    seal(obj, key, LAYOUT, RAW_CODEC, nbytes - HEADER_BYTES, nbytes - HEADER_BYTES, CREATED)
    return obj


def opened(obj: memoryview, key: ChunkKey = KEY, raw_bytes: int = 65536 - HEADER_BYTES) -> str:
    """`ok`, or the reason why the object was refused."""
    try:
        unseal(obj, key, LAYOUT, RAW_CODEC, raw_bytes)
    except CorruptChunk as error:
        return str(MissReason(error.reason))
    return "ok"


def patched(obj: memoryview, offset: int, data: bytes) -> memoryview:
    """The object with other bytes in its header, under a header checksum that holds."""
    obj[offset : offset + len(data)] = data
    obj[HEADER_BYTES - 8 : HEADER_BYTES] = struct.pack("<Q", xxhash.xxh3_64_intdigest(obj[: HEADER_BYTES - 8]))
    return obj


def test_an_untouched_object_opens() -> None:
    obj = sealed(65536)
    head = unseal(obj, KEY, LAYOUT, RAW_CODEC, 61440)
    assert (head.key, head.layout_id, head.codec) == (KEY, LAYOUT, RAW_CODEC)
    assert (head.raw_bytes, head.stored_bytes, head.created) == (61440, 61440, CREATED)
    assert head == read_header(obj[:HEADER_BYTES])


def test_every_single_bit_flip_of_64_kib_is_found() -> None:
    obj = sealed(65536)
    undetected = 0
    for at in range(len(obj)):
        byte = obj[at]
        for bit in range(8):
            obj[at] = byte ^ (1 << bit)
            try:
                unseal(obj, KEY, LAYOUT, RAW_CODEC, 61440)
            except CorruptChunk:
                continue
            undetected += 1
        obj[at] = byte
    assert undetected == 0
    assert opened(obj) == "ok"


def test_every_truncation_is_found() -> None:
    obj = sealed(65536)
    assert [nbytes for nbytes in range(65536) if opened(obj[:nbytes]) != "corrupt"] == []
    longer = aligned(65536 + 4096)
    longer[:65536] = obj
    assert all(opened(longer[:nbytes]) == "corrupt" for nbytes in range(65537, 65536 + 4096))


def test_every_zeroed_tail_is_found() -> None:
    obj = sealed(65536)
    for keep in range(65535, -1, -1):
        obj[keep] = 0
        assert opened(obj) == "corrupt", keep


def test_every_stale_tail_is_found() -> None:
    """The end of the object that lay in this place before, under the same key: a torn overwrite."""
    obj, before = sealed(65536), sealed(65536, seed=1)
    for keep in range(65535, HEADER_BYTES - 1, -1):
        obj[keep] = before[keep]
        if keep % 64 == 0:
            assert opened(obj) == "corrupt", keep


def test_swapped_parts_are_found() -> None:
    a, b = bytes(sealed(65536)), bytes(sealed(65536, seed=1))
    half, header = 32768, HEADER_BYTES
    mixed = [
        a[half:] + a[:half],
        a[:header] + a[half:] + a[header:half],
        a[:header] + b[header:],
        b[:header] + a[header:],
        a[:half] + b[half:],
        a[:-4096] + a[-8192:-4096],
    ]
    for obj in mixed:
        assert len(obj) == 65536
        assert opened(memoryview(obj)) == "corrupt"


def test_a_misdirected_object_is_found() -> None:
    obj = sealed(65536)
    assert opened(obj, OTHER_CHAIN) == "corrupt"
    assert opened(obj, OTHER_IDENTITY) == "identity"


@pytest.mark.parametrize(
    "offset, data, reason",
    [
        (0, b"LMCKW", "corrupt"),
        (8, struct.pack("<H", VERSION + 1), "version"),
        (8, struct.pack("<H", 0), "version"),
        (10, struct.pack("<H", 8192), "version"),
        (12, struct.pack("<I", 1), "version"),
        (12, struct.pack("<I", 1 << 31), "version"),
        (16, OTHER_IDENTITY, "identity"),
        (16, OTHER_CHAIN, "corrupt"),
        (48, b"M", "layout"),
        (64, b"raw/2", "codec"),
        (64, b"zstd/1", "codec"),
        (64, b"\xff", "codec"),
        (64 + 31, b"x", "codec"),
        (96, struct.pack("<Q", 61441), "corrupt"),
        (96, struct.pack("<Q", (1 << 64) - 1), "corrupt"),
        (104, struct.pack("<Q", 61439), "corrupt"),
        (104, struct.pack("<Q", 1 << 63), "corrupt"),
        (112, b"\0\0\0\0\0\0\0\0", "corrupt"),
    ],
)
def test_a_lying_header_is_a_miss_with_its_reason(offset: int, data: bytes, reason: str) -> None:
    obj = patched(sealed(65536), offset, data)
    assert opened(obj) == reason
    obj[offset] ^= 0xFF
    assert opened(obj) == "corrupt"  # without its checksum nothing in the header is believed


def test_a_short_object_under_a_matching_length_is_refused() -> None:
    """The raw length is the reader's, not the object's."""
    assert opened(sealed(8192)) == "corrupt"
    assert opened(sealed(8192), raw_bytes=4096) == "ok"


def test_sealing_again_changes_nothing_and_leaves_no_poison() -> None:
    obj = sealed(65536)
    before = bytes(obj)
    seal(obj, KEY, LAYOUT, RAW_CODEC, 61440, 61440, CREATED)
    assert bytes(obj) == before
    assert before[128 : HEADER_BYTES - 8] == bytes(HEADER_BYTES - 8 - 128)


@pytest.mark.parametrize("codec", ["x" * 33, "zstd/é"])
def test_a_codec_name_that_does_not_fit_is_refused(codec: str) -> None:
    with pytest.raises(ValueError, match=r"codec|ascii"):
        seal(aligned(8192), KEY, LAYOUT, codec, 4096, 4096, CREATED)


@given(st.binary(max_size=HEADER_BYTES + 64), st.booleans())
def test_arbitrary_bytes_are_refused_with_a_reason(data: bytes, magic: bool) -> None:
    obj = aligned(max(1, len(data) + 8))[: len(data) + 8]
    obj[:] = (MAGIC if magic else bytes(8)) + data
    assert opened(obj) == "corrupt"


@settings(max_examples=300)
@given(st.integers(0, HEADER_BYTES - 9), st.binary(min_size=1, max_size=64))
def test_no_header_under_a_valid_checksum_escapes_as_another_error(offset: int, data: bytes) -> None:
    obj = sealed(8192)
    intact = bytes(obj)
    patched(obj, offset, data[: HEADER_BYTES - 8 - offset])
    got = opened(obj, raw_bytes=4096)
    # Only what the format does not look at (creation time, reserved bytes) may differ and still open.
    assert got != "ok" or bytes(obj)[:120] == intact[:120]


# -- golden files: what any version 1 ever wrote stays readable -----------------------------------------------------

GOLDEN_LAYOUT = KVLayout("lknhd", "bfloat16", 2, 2, 1, 8, chunk_tokens=16, block_tokens=4)
GOLDEN_IDENTITY = Identity(
    model="org/model", weights="00ff", layout=GOLDEN_LAYOUT, revision="main", rope="theta=10000", salt="tenant"
)


def test_version_1_is_written_as_ever() -> None:
    """Byte for byte. If this fails, the format changed: that is a new version, and this file stays."""
    (key,) = chunk_keys(GOLDEN_IDENTITY, range(16))
    obj = aligned(HEADER_BYTES + 1024)
    obj[HEADER_BYTES:] = bytes(range(256)) * 4
    seal(obj, key, GOLDEN_LAYOUT.id, RAW_CODEC, 1024, 1024, CREATED)
    assert bytes(obj) == (GOLDEN / "object-v1.bin").read_bytes()


def test_version_1_is_read_as_ever() -> None:
    obj = memoryview((GOLDEN / "object-v1.bin").read_bytes())
    assert len(obj) == 5120
    assert obj[:8] == b"LMCKV\r\n\x1a"
    assert struct.unpack_from("<HHI", obj, 8) == (1, 4096, 0)
    assert bytes(obj[64:70]) == b"raw/1\0"
    assert struct.unpack_from("<QQQQ", obj, 96) == (1024, 1024, xxhash.xxh3_64_intdigest(obj[4096:]), CREATED)
    (key,) = chunk_keys(GOLDEN_IDENTITY, range(16))
    head = unseal(obj, key, GOLDEN_LAYOUT.id, RAW_CODEC, 1024)
    assert head.created == CREATED
    assert bytes(obj[HEADER_BYTES:]) == bytes(range(256)) * 4
