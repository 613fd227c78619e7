"""Exact or miss, through the whole pipeline: damage on a medium is a counted miss, quarantined once, stored anew."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from random import Random

import pytest
import xxhash
from conftest import BuildPipeline
from media import PATIENT, InDict, InFiles, InSegments, Medium, chunk, served, store, tier
from test_identity import BASE, OTHER
from test_seal import GOLDEN, GOLDEN_IDENTITY, GOLDEN_LAYOUT

from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.seal import RAW_CODEC, VERSION, read_header, seal
from lmcache_core.testing.invariants import settle
from lmcache_core.types import HEADER_BYTES, ChunkKey, MissReason, object_bytes

Damage = Callable[[bytes, bytes, Random], bytes]
"""(the object, another object of the tier, chance) -> what the medium gives back instead."""


def resealed(obj: bytes, offset: int, data: bytes) -> bytes:
    """The object with other bytes in its header, under a header checksum that holds."""
    head = bytearray(obj[: HEADER_BYTES - 8])
    head[offset : offset + len(data)] = data
    return bytes(head) + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)) + obj[HEADER_BYTES:]


def flipped(obj: bytes, at: int, bit: int) -> bytes:
    return obj[:at] + bytes([obj[at] ^ (1 << bit)]) + obj[at + 1 :]


SAME_LENGTH: dict[str, tuple[Damage, str]] = {
    "flip in magic": (lambda a, b, r: flipped(a, 0, 0), "corrupt"),
    "flip in key": (lambda a, b, r: flipped(a, 40, 3), "corrupt"),
    "flip in reserved": (lambda a, b, r: flipped(a, 2000, 7), "corrupt"),
    "flip in header checksum": (lambda a, b, r: flipped(a, HEADER_BYTES - 1, 7), "corrupt"),
    "flip in first payload byte": (lambda a, b, r: flipped(a, HEADER_BYTES, 0), "corrupt"),
    "flip in last payload byte": (lambda a, b, r: flipped(a, len(a) - 1, 7), "corrupt"),
    "flip anywhere": (lambda a, b, r: flipped(a, r.randrange(len(a)), r.randrange(8)), "corrupt"),
    "64 bytes overwritten": (lambda a, b, r: a[:4500] + bytes(64) + a[4564:], "corrupt"),
    "zero tail": (lambda a, b, r: a[: HEADER_BYTES + 512].ljust(len(a), b"\0"), "corrupt"),
    "all zeros": (lambda a, b, r: bytes(len(a)), "corrupt"),
    "all ones": (lambda a, b, r: b"\xff" * len(a), "corrupt"),
    "halves swapped": (lambda a, b, r: a[len(a) // 2 :] + a[: len(a) // 2], "corrupt"),
    "payload halves swapped": (lambda a, b, r: a[:4096] + a[4608:] + a[4096:4608], "corrupt"),
    "payload of another": (lambda a, b, r: a[:HEADER_BYTES] + b[HEADER_BYTES:], "corrupt"),
    "header of another": (lambda a, b, r: b[:HEADER_BYTES] + a[HEADER_BYTES:], "corrupt"),
    "misdirected": (lambda a, b, r: b, "corrupt"),
    "newer version": (lambda a, b, r: resealed(a, 8, struct.pack("<H", VERSION + 1)), "version"),
    "unknown flag": (lambda a, b, r: resealed(a, 12, struct.pack("<I", 4)), "version"),
    "longer header": (lambda a, b, r: resealed(a, 10, struct.pack("<H", 8192)), "version"),
    "other identity": (lambda a, b, r: resealed(a, 16, bytes(16)), "identity"),
    "other layout": (lambda a, b, r: resealed(a, 48, bytes(16)), "layout"),
    "unknown codec": (lambda a, b, r: resealed(a, 64, b"lz9/1\0"), "codec"),
    "other raw length": (lambda a, b, r: resealed(a, 96, struct.pack("<Q", 1 << 62)), "corrupt"),
    "other stored length": (lambda a, b, r: resealed(a, 104, struct.pack("<Q", 512)), "corrupt"),
}
OTHER_LENGTH: dict[str, tuple[Damage, str]] = {
    "empty": (lambda a, b, r: b"", "corrupt"),
    "one byte short": (lambda a, b, r: a[:-1], "corrupt"),
    "half": (lambda a, b, r: a[: len(a) // 2], "corrupt"),
    "header only": (lambda a, b, r: a[:HEADER_BYTES], "corrupt"),
    "cut anywhere": (lambda a, b, r: a[: r.randrange(len(a))], "corrupt"),
    "one byte more": (lambda a, b, r: a + b"\0", "corrupt"),
}
MEDIA = ("dict", "unscannable", "segments", "files")


def medium_of(name: str, path: Path, nbytes: int) -> Medium:
    if name == "segments":
        return InSegments(path, nbytes)
    return InFiles(path) if name == "files" else InDict(scannable=name == "dict", local=False)


def damaged_once(pipeline: Pipeline, medium: Medium, keys: list[ChunkKey], damage: Damage, seed: int) -> MissReason:
    """Store, damage one object, and follow it: one counted miss, gone, stored again, exact. Return the reason."""
    size = pipeline.layout.chunk_bytes
    store(pipeline, keys)
    settle(pipeline)
    pipeline.clear("dram")
    before = pipeline.stats()
    target = keys[1]
    medium.write(target, damage(medium.read(target), medium.read(keys[2]), Random(seed)))

    with pipeline.retrieve(keys) as lease:
        assert lease.keys == keys[:1]
        assert bytes(lease.view(0)) == chunk(keys[0], size)
        reason = lease.reason
    assert reason is not None
    settle(pipeline)
    stats = pipeline.stats()
    assert stats["quarantined"] == before["quarantined"] + 1
    assert stats["misses"][reason] == before["misses"].get(reason, 0) + len(keys) - 1
    assert (
        stats["tiers"]["store"][f"quarantined_{reason}"] == before["tiers"]["store"].get(f"quarantined_{reason}", 0) + 1
    )

    # It is gone, so nobody finds it bad a second time.
    pipeline.clear("dram")
    assert pipeline.lookup([target]).count == 0 or pipeline.tiers[0].backend.contains([target]) == [False]
    with pipeline.retrieve([target]) as lease:
        assert lease.reason is MissReason.NOT_STORED
    assert pipeline.stats()["quarantined"] == stats["quarantined"]

    # The engine recomputes and stores: as if nothing had happened.
    assert store(pipeline, keys) > 0
    settle(pipeline)
    pipeline.clear("dram")
    assert served(pipeline, keys) == len(keys)
    assert pipeline.stats()["quarantined"] == stats["quarantined"]
    pipeline.clear("dram")
    return reason


@pytest.mark.parametrize("name", MEDIA)
def test_damage_is_a_counted_miss(
    pipelines: BuildPipeline, keys: list[ChunkKey], tmp_path: Path, layout: KVLayout, name: str
) -> None:
    medium = medium_of(name, tmp_path / "tier", object_bytes(layout.chunk_bytes))
    damages = SAME_LENGTH if name == "segments" else SAME_LENGTH | OTHER_LENGTH
    pipeline = pipelines(tier(backend=medium.config(), capacity=8 << 20, lane=PATIENT))
    got = {
        what: str(damaged_once(pipeline, medium, keys[3 * seed : 3 * seed + 3], damage, seed))
        for seed, (what, (damage, _)) in enumerate(damages.items())
    }
    expected = {what: reason for what, (_, reason) in damages.items()}
    assert {what: got[what] for what in got if got[what] != expected[what]} == {}
    assert pipeline.stats()["quarantined"] == len(damages)


@pytest.mark.parametrize("name", ["segments", "files"])
def test_damage_found_after_a_restart_is_a_miss(
    pipelines: BuildPipeline, keys: list[ChunkKey], tmp_path: Path, layout: KVLayout, name: str
) -> None:
    for seed, (damage, _) in enumerate(SAME_LENGTH.values()):
        medium = medium_of(name, tmp_path / str(seed), object_bytes(layout.chunk_bytes))
        config = tier(backend=medium.config(), capacity=4 << 20, lane=PATIENT)
        pipeline = pipelines(config)
        store(pipeline, keys[:3])
        settle(pipeline)
        pipeline.close()
        medium.write(keys[1], damage(medium.read(keys[1]), medium.read(keys[2]), Random(seed)))
        pipeline = pipelines(config)
        assert served(pipeline, keys[:3]) == 1
        assert served(pipeline, keys[2:3]) == 1
        store(pipeline, keys[:3])
        settle(pipeline)
        pipeline.close()
        pipeline = pipelines(config)
        assert served(pipeline, keys[:3]) == 3


def test_random_flips_in_every_medium(
    pipelines: BuildPipeline, keys: list[ChunkKey], tmp_path: Path, layout: KVLayout
) -> None:
    """One bit anywhere in any of many objects at once: exactly those objects are missing."""
    nbytes = object_bytes(layout.chunk_bytes)
    for name in MEDIA:
        medium = medium_of(name, tmp_path / name, nbytes)
        pipeline = pipelines(tier(backend=medium.config(), capacity=8 << 20, lane=PATIENT), slots=100)
        store(pipeline, keys[:90])
        settle(pipeline)
        pipeline.clear("dram")
        random = Random(name)
        bad = set(random.sample(keys[:90], 30))
        for key in bad:
            medium.write(key, flipped(medium.read(key), random.randrange(nbytes), random.randrange(8)))
        assert {key for key in keys[:90] if not served(pipeline, [key])} == bad
        assert pipeline.stats()["quarantined"] == 30


@pytest.mark.parametrize("name", ["dict", "files"])
@pytest.mark.parametrize("field", [field.name for field in fields(Identity)])
def test_an_object_of_another_identity_is_never_served(
    pipelines: BuildPipeline, tmp_path: Path, field: str, name: str
) -> None:
    """Each single field: the other's keys find nothing here, and its object under our key is refused."""
    layout = replace(BASE.layout, num_layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, block_tokens=4)
    ours = replace(BASE, layout=layout)
    (key,) = chunk_keys(ours, range(16))
    medium = medium_of(name, tmp_path / "tier", object_bytes(layout.chunk_bytes))
    pipeline = pipelines(tier(backend=medium.config(), capacity=8 << 20, lane=PATIENT), layout=layout)
    store(pipeline, [key])
    settle(pipeline)
    for value in OTHER[field]:
        theirs = replace(ours, **{field: replace(layout, version=2) if field == "layout" else value})
        other_keys = chunk_keys(theirs, range(theirs.layout.chunk_tokens))
        assert pipeline.lookup(other_keys).count == 0
        assert served(pipeline, other_keys) == 0
        pipeline.clear("dram")
        obj = bytearray(medium.read(key))
        seal(memoryview(obj), other_keys[0], theirs.layout.id, RAW_CODEC, layout.chunk_bytes, layout.chunk_bytes, 0)
        medium.write(key, bytes(obj))
        with pipeline.retrieve([key]) as lease:
            assert len(lease) == 0 and lease.reason is MissReason.IDENTITY
        store(pipeline, [key])
        settle(pipeline)
        pipeline.clear("dram")
        assert served(pipeline, [key]) == 1


def test_every_field_of_the_layout_is_checked_on_load(pipelines: BuildPipeline) -> None:
    """The key alone already tells; but even under the right key an object of another layout is refused."""
    layout = replace(BASE.layout, num_layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, block_tokens=4)
    (key,) = chunk_keys(replace(BASE, layout=layout), range(16))
    medium = InDict()
    pipeline = pipelines(tier(backend=medium.config(), lane=PATIENT), layout=layout)
    others = [other for other in OTHER["layout"] if other != BASE.layout]
    for other in others:
        store(pipeline, [key])
        settle(pipeline)
        pipeline.clear("dram")
        medium.write(key, resealed(medium.read(key), 48, other.id))
        with pipeline.retrieve([key]) as lease:
            assert lease.reason is MissReason.LAYOUT
    assert pipeline.stats()["tiers"]["store"]["quarantined_layout"] == len(others)


def test_a_golden_object_of_version_1_is_served(pipelines: BuildPipeline) -> None:
    medium = InDict()
    (key,) = chunk_keys(GOLDEN_IDENTITY, range(16))
    medium.config().objects[key] = (GOLDEN / "object-v1.bin").read_bytes()
    pipeline = pipelines(tier(backend=medium.config(), lane=PATIENT), layout=GOLDEN_LAYOUT)
    with pipeline.retrieve([key]) as lease:
        assert lease.sources == ["store"]
        assert bytes(lease.view(0)) == bytes(range(256)) * 4


def test_what_is_written_keeps_its_seal_across_tiers(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """A chunk promoted from a deep tier is written to a nearer one as the very same object, date included."""
    near, far = InDict(), InDict()
    pipeline = pipelines(
        tier("near", backend=near.config(), lane=PATIENT), tier("far", backend=far.config(), lane=PATIENT)
    )
    store(pipeline, keys[:1])
    settle(pipeline)
    old = bytearray(far.read(keys[0]))
    head = read_header(memoryview(old))
    seal(memoryview(old), keys[0], head.layout_id, head.codec, head.raw_bytes, head.stored_bytes, head.created - 1000)
    far.write(keys[0], bytes(old))
    pipeline.clear("dram")
    pipeline.clear("near")
    assert served(pipeline, keys[:1]) == 1
    settle(pipeline)
    assert near.read(keys[0]) == bytes(old)
