"""The seal wrapper: the storage contract over a disk, and everything an attacker with the medium could do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from lmcache_wrapper_seal import SealConfig
from lmcache_wrapper_seal.envelope import FRONT_BYTES, OVERHEAD, open_into
from lmcache_wrapper_seal.keys import Keyring, Masters

from lmcache_backends.gds import GdsConfig
from lmcache_core.build import build
from lmcache_core.config import load
from lmcache_core.errors import ConfigError, CorruptChunk
from lmcache_core.layout import KVLayout
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import BackendConfig, BuildContext, Region, StorageBackend
from lmcache_core.seal import RAW_CODEC, seal
from lmcache_core.testing.memory import DictBackend, DictConfig, aligned
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests
from lmcache_core.types import HEADER_BYTES, ChunkKey, Got, object_bytes

OLD, NEW = f"old {'0f' * 32}", f"new {'a5' * 32}"
PAYLOAD = b"The quick brown fox" * 1000
OBJECT_BYTES = object_bytes(len(PAYLOAD))
CONTEXT = BuildContext("cold", OBJECT_BYTES, 1 << 30, threads=2)


def keys_file(path: Path, *lines: str) -> Path:
    file = path / "seal.keys"
    file.write_text("# comment\n\n" + "\n".join(lines) + "\n")
    file.chmod(0o600)
    return file


def wrapped(path: Path, backend: BackendConfig, context: BuildContext, *lines: str) -> StorageBackend:
    plugins = Plugins()
    plugins.activate([SealConfig(keys=keys_file(path, *(lines or (OLD,))))])
    built = plugins.build_backend(backend, context)
    assert isinstance(built, StorageBackend)
    return built


@pytest.fixture
def medium() -> dict[ChunkKey, bytes]:
    return {}


class Bench:
    """A sealed tier over a dict that the test, as the attacker, has in hand."""

    def __init__(self, path: Path, medium: dict[ChunkKey, bytes]) -> None:
        self.path = path
        self.medium = medium
        self.backend = self.reopen()

    def reopen(self, *lines: str) -> StorageBackend:
        self.backend = wrapped(self.path, DictConfig(objects=self.medium), CONTEXT, *lines)
        return self.backend

    def put(self, *keys: ChunkKey) -> None:
        assert self.backend.put_from(keys, [sealed_object(key) for key in keys]) == [None] * len(keys)

    def get(self, *keys: ChunkKey) -> list[bytes | Got]:
        buffers = [aligned(OBJECT_BYTES) for _ in keys]
        results = self.backend.get_into(keys, buffers)
        return [
            bytes(buffer[:got]) if isinstance(got, int) else got for got, buffer in zip(results, buffers, strict=True)
        ]

    def refused(self, *keys: ChunkKey) -> list[str]:
        """Each key is a `CorruptChunk`, and nothing of an object is left in its buffer."""
        texts: list[str] = []
        for key in keys:
            buffer = aligned(OBJECT_BYTES)
            (got,) = self.backend.get_into([key], [buffer])
            assert isinstance(got, CorruptChunk), got
            assert PAYLOAD[:64] not in bytes(buffer)
            texts.append(str(got))
        return texts


@pytest.fixture
def bench(tmp_path: Path, medium: dict[ChunkKey, bytes]) -> Bench:
    return Bench(tmp_path, medium)


def key(number: int, identity: bytes = b"one tenant's own") -> ChunkKey:
    return ChunkKey(identity + number.to_bytes(16, "big"))


def sealed_object(name: ChunkKey) -> memoryview:
    obj = aligned(OBJECT_BYTES)
    obj[HEADER_BYTES:] = PAYLOAD
    seal(obj, name, bytes(16), RAW_CODEC, len(PAYLOAD), len(PAYLOAD), 0)
    return obj


class TestSealedSegments(StorageBackendTests):
    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> OpenBackend:
        return lambda context: wrapped(tmp_path, GdsConfig(path=tmp_path / "kv"), context)


class TestSealedFiles(StorageBackendTests):
    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> OpenBackend:
        return lambda context: wrapped(tmp_path, GdsConfig(path=tmp_path / "kv", mode="files"), context)


class TestSealedRemote(StorageBackendTests):
    """Over a medium that keeps its own books."""

    @pytest.fixture
    def open_backend(self, tmp_path: Path, medium: dict[ChunkKey, bytes]) -> OpenBackend:
        return lambda context: wrapped(tmp_path, DictConfig(objects=medium, scannable=False, local=False), context)


def test_nothing_in_clear_reaches_the_disk(tmp_path: Path) -> None:
    backend = wrapped(tmp_path, GdsConfig(path=tmp_path / "kv", mode="files"), CONTEXT)
    keys = [key(i) for i in range(5)]
    assert backend.put_from(keys, [sealed_object(k) for k in keys]) == [None] * 5
    backend.close()
    files = [file.read_bytes() for file in (tmp_path / "kv").rglob("*") if file.is_file()]
    assert sum(map(len, files)) > 5 * OBJECT_BYTES
    for clear in (b"quick", b"LMCKV", RAW_CODEC.encode()):
        assert not any(clear in data for data in files)


def test_each_object_is_sealed_anew(bench: Bench) -> None:
    """The same plaintext twice: other nonces, other ciphertexts, nothing to compare."""
    bench.put(key(1))
    first = bench.medium[key(1)]
    bench.put(key(1))
    second = bench.medium[key(1)]
    assert len(first) == OBJECT_BYTES + OVERHEAD
    assert first[40:52] != second[40:52]
    same = sum(a == b for a, b in zip(first[FRONT_BYTES:], second[FRONT_BYTES:], strict=True))
    assert same < len(first) // 64, "equal bytes by chance only"


def test_swapped_objects_are_refused(bench: Bench) -> None:
    bench.put(key(1), key(2))
    bench.medium[key(1)], bench.medium[key(2)] = bench.medium[key(2)], bench.medium[key(1)]
    assert all("does not authenticate" in text for text in bench.refused(key(1), key(2)))


def test_another_identity_cannot_use_an_object(bench: Bench) -> None:
    """Same tokens, another tenant: other keys, and the object is bound to its own key in the tier."""
    mine, theirs = key(1), key(1, b"another tenant's")
    bench.put(mine)
    bench.medium[theirs] = bench.medium[mine]
    bench.refused(theirs)
    ring = Keyring(Masters.parse(OLD, "test"))
    salt = bench.medium[mine][24:40]
    here, there = ring.to_open("old", salt, mine[:16]), ring.to_open("old", salt, theirs[:16])
    assert here is not None and there is not None
    assert here.encrypt(bytes(12), b"x", None) != there.encrypt(bytes(12), b"x", None)


@pytest.mark.parametrize("at", [0, 8, 9, 24, 40, 52, 63, 64, 4096, OBJECT_BYTES, -17, -16, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_anywhere_is_refused(bench: Bench, at: int, bit: int) -> None:
    bench.put(key(1))
    data = bytearray(bench.medium[key(1)])
    data[at] ^= 1 << bit
    bench.medium[key(1)] = bytes(data)
    bench.refused(key(1))


@pytest.mark.parametrize("nbytes", [0, 1, FRONT_BYTES, OVERHEAD - 1, OVERHEAD, 4096, OBJECT_BYTES + OVERHEAD - 1])
def test_truncated_objects_are_refused(bench: Bench, nbytes: int) -> None:
    bench.put(key(1), key(2))
    bench.medium[key(1)] = bench.medium[key(1)][:nbytes]
    bench.refused(key(1))
    assert bench.get(key(2)) == [bytes(sealed_object(key(2)))]


def test_longer_and_clear_objects_are_refused(bench: Bench) -> None:
    bench.put(key(1))
    sealed = memoryview(bench.medium[key(1)])
    ring = Keyring(Masters.parse(OLD, "test"))
    with pytest.raises(CorruptChunk, match="no encrypted object of this tier"):
        open_into(ring, key(1), sealed, aligned(OBJECT_BYTES - 1))
    bench.medium[key(1)] += b"\0"
    (got,) = bench.backend.get_into([key(1)], [aligned(OBJECT_BYTES + 1)])
    assert isinstance(got, CorruptChunk)
    bench.medium[key(1)] = bytes(sealed_object(key(1)))
    assert "not an encrypted object" in bench.refused(key(1))[0], "no way back to clear text"


def test_one_bad_object_spoils_no_other(bench: Bench) -> None:
    """In one batch, larger than the staging: each key gets its own outcome."""
    keys = [key(i) for i in range(7)]
    bench.put(*keys)
    bench.medium[keys[3]] = bench.medium[keys[2]]
    del bench.medium[keys[5]]
    got = bench.get(*keys)
    for i, found in enumerate(got):
        if i == 3:
            assert isinstance(found, CorruptChunk)
        else:
            assert found == (None if i == 5 else bytes(sealed_object(keys[i])))


def test_rotation_unknown_keys_and_shredding(bench: Bench) -> None:
    bench.put(key(1))
    bench.reopen(OLD, NEW)  # every reader learns the new key first
    bench.put(key(2))
    bench.reopen(NEW, OLD)
    bench.put(key(3))
    assert [bench.medium[key(i)][8:24].rstrip(b"\0") for i in (1, 2, 3)] == [b"old", b"old", b"new"]
    assert bench.get(key(1), key(2), key(3)) == [bytes(sealed_object(key(i))) for i in (1, 2, 3)]
    bench.reopen(NEW)  # the old key is gone: so is what it sealed
    assert all("master key 'old', which is not among the keys" in text for text in bench.refused(key(1), key(2)))
    assert bench.get(key(3)) == [bytes(sealed_object(key(3)))]


def test_another_master_of_the_same_id_opens_nothing(bench: Bench) -> None:
    bench.put(key(1))
    bench.reopen(f"old {'77' * 32}")
    assert "another master key of this id" in bench.refused(key(1))[0]


def test_a_derived_key_seals_a_bounded_number_of_objects() -> None:
    ring = Keyring(Masters.parse(OLD, "test"), objects_per_key=3)
    salts = [ring.to_seal(b"i" * 16)[1] for _ in range(7)]
    assert [salts.count(salt) for salt in dict.fromkeys(salts)] == [3, 3, 1]
    assert ring.to_seal(b"j" * 16)[1] not in salts
    assert ring.to_open("old", salts[0], b"i" * 16) is ring.to_open("old", salts[0], b"i" * 16)


class Odd(DictBackend):
    """A backend that fails, and one that answers for the wrong number of keys."""

    mode = ""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        if self.mode == "raise":
            raise OSError(5, "broken")
        if self.mode == "huge":
            return [1 << 40] * len(keys)
        return super().get_into(keys, buffers)[: 1 if self.mode == "short" else None]

    def register(self, region: Region) -> None:
        self.region = region


class OddConfig(DictConfig):
    def build(self, context: BuildContext) -> DictBackend:
        backend = Odd(self.objects)
        self.objects["built"] = backend
        return backend


def test_errors_of_the_medium_are_outcomes_of_their_keys(tmp_path: Path) -> None:
    medium: dict[object, object] = {}
    backend = wrapped(tmp_path, OddConfig(objects=medium), CONTEXT)
    inner = medium.pop("built")
    assert isinstance(inner, Odd)
    assert inner.region.nbytes >= CONTEXT.threads * 2 * (OBJECT_BYTES + OVERHEAD), "staging is told to the medium"
    keys = [key(1), key(2), key(3)]
    backend.put_from(keys, [sealed_object(k) for k in keys])
    for mode, kind in (("raise", OSError), ("short", ValueError), ("huge", ValueError)):
        inner.mode = mode
        got = backend.get_into(keys, [aligned(OBJECT_BYTES) for _ in keys])
        assert len(got) == 3
        assert isinstance(got[0], kind)
    inner.mode = ""
    assert backend.get_into(keys, [aligned(OBJECT_BYTES) for _ in keys]) == [OBJECT_BYTES] * 3


# Through a whole pipeline, from a configuration file.


def config(path: Path, keys: str, tiers: str = "[cold]") -> Path:
    file = path / "kv.yaml"
    file.write_text(
        f"""
plugins:
  - {{type: seal, tiers: {tiers}, {keys}}}
tiers:
  - {{name: dram, capacity: 4MiB, backend: {{type: cpu}}}}
  - {{name: cold, capacity: 64MiB, backend: {{type: gds, path: {path}/cold, mode: files}}}}
  - {{name: open, capacity: 64MiB, backend: {{type: gds, path: {path}/open, mode: files}}}}
"""
    )
    return file


def test_a_configured_tier_is_sealed_and_the_other_is_not(tmp_path: Path) -> None:
    loaded = load(config(tmp_path, f"keys: {keys_file(tmp_path, OLD)}"), env={})
    layout = KVLayout("lknhd", "bfloat16", 2, 2, 2, 16, chunk_tokens=256, block_tokens=16)
    chunk = (PAYLOAD * 10)[: layout.chunk_bytes]
    names = [key(i) for i in range(3)]

    for _ in range(2):  # the second time what is there is found again
        pipeline = build(loaded.config, layout, plugins=loaded.plugins)
        try:
            tiers = {tier.name: tier for tier in pipeline.tiers}
            for slot in range(3):
                pipeline.slots.payload(slot)[:] = chunk
            for tier in tiers.values():
                assert tier.write(names, [0, 1, 2]) == [None] * 3
                for slot in range(3):
                    pipeline.slots.payload(slot)[:] = bytes(layout.chunk_bytes)
                assert tier.read(names, [0, 1, 2]) == [None] * 3
                assert all(bytes(pipeline.slots.payload(slot)) == chunk for slot in range(3))
                pipeline.slots.sealed[:3] = bytes(3)
        finally:
            pipeline.close()
    written = {name: b"".join(f.read_bytes() for f in (tmp_path / name).rglob("*") if f.is_file()) for name in tiers}
    assert b"quick brown" in written["open"]
    assert b"quick brown" not in written["cold"]


def problem(path: Path, keys: str, tiers: str = "[cold]") -> str:
    layout = KVLayout("lknhd", "bfloat16", 2, 2, 2, 16, chunk_tokens=256, block_tokens=16)
    with pytest.raises(ConfigError) as caught:
        build(load(config(path, keys, tiers), env={}).config, layout)
    assert "0f0f" not in str(caught.value)
    return str(caught.value)


def test_a_misspelt_tier_is_refused(tmp_path: Path) -> None:
    """It would be left in clear text."""
    text = problem(tmp_path, f"keys: {keys_file(tmp_path, OLD)}", "[clod]")
    assert "no tier has this name; did you mean `cold`?" in text
    assert "kv.yaml:3" in text


def test_keys_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be read" in problem(tmp_path, f"keys: {tmp_path}/none")
    file = keys_file(tmp_path, OLD)
    file.chmod(0o640)
    assert f"fix: chmod 600 {file}" in problem(tmp_path, f"keys: {file}")
    for line, said in ((OLD[:-1], "line 3"), (f"{OLD}\n{OLD}", "there twice"), ("#" + OLD, "holds no key")):
        assert said in problem(tmp_path, f"keys: {keys_file(tmp_path, line)}")
    assert "name the master keys once" in problem(tmp_path, "buffers: 3")
    assert "did you mean `keys`" in problem(tmp_path, "kesy: /x")
    monkeypatch.delenv("SEAL_KEYS", raising=False)
    assert "environment variable SEAL_KEYS holds no key" in problem(tmp_path, "keys_env: SEAL_KEYS")


@pytest.mark.parametrize(
    "setting", [f"keys_env: {'a5' * 32}", f"keys_env: key-1 {'a5' * 32}", f"keys: key-1 {'a5' * 32}"]
)
def test_a_key_in_the_place_of_its_name_is_not_shown(tmp_path: Path, setting: str) -> None:
    text = problem(tmp_path, setting)
    assert "a5a5" not in text and ("holds no key" in text or "cannot be read" in text)


def test_keys_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_KEYS", f"{NEW}\n{OLD}")
    plugins = Plugins()
    settings = SealConfig(keys_env="SEAL_KEYS")
    plugins.activate([settings])
    assert "a5a5" not in repr(settings) + repr(settings.build().__dict__)
    assert isinstance(plugins.build_backend(DictConfig(), CONTEXT), StorageBackend)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = keys_file(tmp_path, OLD)
    owner = file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner != 0:
        assert f"belongs to user {owner}" in problem(tmp_path, f"keys: {file}")
        return
    os.chown(file, 4242, -1)
    assert "belongs to user 4242" in problem(tmp_path, f"keys: {file}")
