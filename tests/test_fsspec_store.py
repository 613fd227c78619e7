"""The fsspec backend beside its contract: directories, other filesystems, settings, and which client is used."""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import BuildPipeline
from media import PATIENT, served, store, tier
from pydantic import ValidationError

import lmcache_backends.fsspec_store as module
from lmcache_backends.fsspec_store import FsspecConfig
from lmcache_backends.fsspec_store.backend import FsspecBackend
from lmcache_backends.fsspec_store.object_store import Native
from lmcache_backends.fsspec_store.stores import Files, LocalFiles, Objects
from lmcache_core.config import LaneConfig, PipelineConfig
from lmcache_core.errors import BackendError, BackendUnavailable, CorruptChunk, NoSpace
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests, key_of, new_object
from lmcache_core.types import ChunkKey

pytestmark = pytest.mark.timeout(60)

CONTEXT = BuildContext("cold", 8192, None, 4, False, 0.5)
SLACK_S = 0.5


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[FsspecBackend]:
    backend = FsspecConfig(url=f"file://{tmp_path}/kv").build(CONTEXT)
    yield backend
    backend.close()


def put(backend: FsspecBackend, *numbers: int) -> list[object]:
    keys = [key_of(number) for number in numbers]
    return list(backend.put_from(keys, [new_object(key, 8192) for key in keys]))


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


# -- a directory -----------------------------------------------------------------------------------------------------
def test_a_tier_in_a_directory_evicts_and_restarts(
    pipelines: BuildPipeline, keys: list[ChunkKey], tmp_path: Path
) -> None:
    footprint = 8192 + 4096  # header page and chunk of 1 KiB in whole blocks, and one for the name
    config = tier(backend=FsspecConfig(url=f"file://{tmp_path}/kv"), capacity=10 * footprint, lane=PATIENT)
    first = pipelines(config, slots=16)
    store(first, keys[:8])
    settle(first)
    store(first, keys[40:46])
    settle(first)
    stats = first.stats()["tiers"]["store"]
    assert stats["evicted"] == 4
    assert stats["used_bytes"] == 10 * footprint
    assert len(files(tmp_path / "kv")) == 10
    first.close()
    second = pipelines(config, slots=16)
    assert second.stats()["tiers"]["store"]["recovered"] == 10
    assert served(second, keys[40:46]) == 6
    assert served(second, keys[:8]) == 4
    # Oldest first: what was written before the restart goes before what is written after it.
    store(second, keys[80:89])
    settle(second)
    second.clear("dram")
    assert served(second, keys[80:89]) == 9
    small = tier(backend=FsspecConfig(url=f"file://{tmp_path}/kv"), capacity=3 * footprint, lane=PATIENT)
    second.close()
    third = pipelines(small, slots=16)
    settle(third)
    assert len(files(tmp_path / "kv")) == 3


def test_names_are_digests_and_files_are_private(backend: FsspecBackend, tmp_path: Path) -> None:
    assert put(backend, 1) == [None]
    name = key_of(1).hex()
    assert files(tmp_path) == [f"kv/{name[32]}/{name[33]}/{name}"]
    for path in (tmp_path / "kv").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_litter_of_dead_writers_is_removed(tmp_path: Path) -> None:
    temporary = tmp_path / "kv/tmp"
    temporary.mkdir(parents=True)
    dead, alive, foreign = (temporary / name for name in ("0" * 32, "1" * 32, "notes.txt"))
    for path in (dead, alive, foreign):
        path.write_bytes(b"x")
    long_ago = time.time() - 3600
    os.utime(dead, (long_ago, long_ago))
    os.utime(foreign, (long_ago, long_ago))
    backend = FsspecConfig(url=f"file://{tmp_path}/kv").build(CONTEXT)
    assert files(temporary) == sorted([alive.name, foreign.name])
    backend.clear()
    assert files(temporary) == [foreign.name]
    backend.close()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    others = ["kv/0/0/README", f"kv/0/0/{'f' * 64}", f"kv/{'0' * 64}", "kv/photo.jpg"]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    backend = FsspecConfig(url=f"file://{tmp_path}/kv").build(BuildContext("cold", 8192, 1 << 20, 4))
    assert not list(backend.scan() or ())
    put(backend, 1)
    assert [key for key, _ in backend.scan() or ()] == [key_of(1)]
    backend.clear()
    assert files(tmp_path) == sorted(others)
    backend.close()


def test_a_planted_link_is_not_followed(backend: FsspecBackend, tmp_path: Path) -> None:
    put(backend, 1)
    (path,) = (tmp_path / "kv").rglob(key_of(1).hex())
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    (result,) = backend.get_into([key_of(1)], [aligned(8192)])
    assert isinstance(result, BackendError)
    assert put(backend, 1) == [None]
    assert not path.is_symlink()


def test_a_directory_that_vanishes_is_made_again(backend: FsspecBackend, tmp_path: Path) -> None:
    assert put(backend, 1, 2) == [None, None]
    (tmp_path / "kv").rename(tmp_path / "gone")
    assert backend.contains([key_of(1)]) == [False]
    assert backend.get_into([key_of(1)], [aligned(8192)]) == [None]
    assert put(backend, 1, 2) == [None, None]
    assert backend.get_into([key_of(1)], [aligned(8192)]) == [8192]


def test_a_file_larger_than_any_object_is_not_read(backend: FsspecBackend, tmp_path: Path) -> None:
    put(backend, 1)
    (path,) = (tmp_path / "kv").rglob(key_of(1).hex())
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    (result,) = backend.get_into([key_of(1)], [aligned(8192)])
    assert isinstance(result, CorruptChunk)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", ["_fill_temporary", "_rename", "_make"])
def test_a_full_disk_is_no_space(
    step: str, number: int, backend: FsspecBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(LocalFiles, step, full)
    (result,) = put(backend, 1)
    assert isinstance(result, NoSpace)
    assert files(tmp_path) == []
    monkeypatch.undo()
    assert put(backend, 1) == [None]


def test_a_hung_directory(backend: FsspecBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call ends in time, nothing is written late, neither here nor there, and it works again afterwards."""
    put(backend, 1)
    release = threading.Event()
    read, fill_temporary, ended = LocalFiles._read, LocalFiles._fill_temporary, threading.Semaphore(0)

    def hung_read(self: LocalFiles, path: str, buffer: memoryview) -> int | None:
        try:
            release.wait(30)
            return read(self, path, buffer)
        finally:
            ended.release()

    def hung_write(self: LocalFiles, temporary: str, buffer: memoryview) -> None:
        fill_temporary(self, temporary, buffer)
        release.wait(30)
        ended.release()

    monkeypatch.setattr(LocalFiles, "_read", hung_read)
    monkeypatch.setattr(LocalFiles, "_fill_temporary", hung_write)
    buffer = aligned(8192)
    before = bytes(buffer)
    for call in (lambda: backend.get_into([key_of(1)], [buffer]), lambda: put(backend, 2)):
        began = time.monotonic()
        (result,) = call()
        assert time.monotonic() - began < 0.5 + SLACK_S
        assert isinstance(result, BackendError)
    release.set()
    for _ in range(2):
        assert ended.acquire(timeout=10)
    monkeypatch.undo()
    assert put(backend, 3) == [None]
    assert bytes(buffer) == before
    end = time.monotonic() + 10
    while len(files(tmp_path)) > 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert [Path(name).name for name in files(tmp_path)] == sorted(key_of(i).hex() for i in (1, 3))


# -- filesystems that know less --------------------------------------------------------------------------------------
class TestRenaming(StorageBackendTests):
    """A filesystem whose writes are not atomic, by the blocking methods every fsspec filesystem has."""

    @pytest.fixture
    def open_backend(self) -> OpenBackend:
        root = f"/{secrets.token_hex(8)}"

        def open_backend(context: BuildContext) -> FsspecBackend:
            memory = fsspec.filesystem("memory")
            kept = Files(memory, root, atomic=False, threads=4, name="cold")
            return FsspecBackend(kept, root, context, concurrency=4, timeout=None, secrets=frozenset())

        return open_backend


@pytest.mark.parametrize("same_size", [True, False])
def test_a_server_that_does_not_rename_onto_files(same_size: bool) -> None:
    """What is there under the name is the object, if it has the size."""

    class Refusing:
        def __init__(self) -> None:
            self.fs = fsspec.filesystem("memory")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.fs, name)

        def mv(self, old: str, new: str) -> None:
            if self.fs.exists(new):
                raise FileExistsError(new)
            self.fs.mv(old, new)

    root = f"/{secrets.token_hex(8)}"
    kept = Files(Refusing(), root, atomic=False, threads=2, name="cold")
    backend = FsspecBackend(kept, root, CONTEXT, concurrency=4, timeout=None, secrets=frozenset())
    assert put(backend, 1) == [None]
    (again,) = backend.put_from([key_of(1)], [new_object(key_of(1), 8192 if same_size else 6000)])
    assert (again is None) == same_size
    assert backend.get_into([key_of(1)], [aligned(8192)]) == [8192]
    assert [entry for entry in fsspec.filesystem("memory").find(root) if "/tmp/" in entry] == []
    backend.close()


# -- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "url, said",
    [
        ("bucket/kv", "must be a URL"),
        ("s3:/bucket", "must be a URL"),
        ("s3://", "must name a bucket"),
        ("file:///", "must name a bucket or a directory"),
        ("simplecache::s3://bucket/kv", "chained"),
        ("filecache://x::s3://bucket/kv", "chained"),
    ],
)
def test_urls_that_make_no_sense(url: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FsspecConfig(url=url)


def test_secrets_are_shown_nowhere() -> None:
    canary = f"canary-{secrets.token_hex(8)}"
    config = FsspecConfig(
        url="s3://bucket/kv",
        storage_options={
            "key": canary,
            "secret": canary,
            "connection_string": canary,
            "client_kwargs": {"aws_secret_access_key": canary},
            "endpoint_url": "http://127.0.0.1:1",
        },
    )
    for text in (repr(config), str(config), config.model_dump_json(), repr(config.model_dump())):
        assert canary not in text
    assert "127.0.0.1" in repr(config)
    with pytest.raises(BackendUnavailable) as caught:
        config.build(BuildContext("cold", 8192, None, 4, False, 1.0))
    assert canary not in str(caught.value)
    with pytest.raises(ValidationError) as refused:
        FsspecConfig(url=f"s3:/{canary}", storage_options={"secret": canary})
    assert canary not in str(refused.value)


def test_a_server_that_is_not_there_stops_the_start() -> None:
    options = {"key": "a", "secret": "b", "endpoint_url": "http://127.0.0.1:1"}
    with pytest.raises(BackendUnavailable, match=r"tier `cold`: .*check the url, the credentials"):
        FsspecConfig(url="s3://bucket/kv", storage_options=options).build(CONTEXT)


def test_unknown_protocols_and_missing_packages_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="tier `cold`: nosuch://x/y cannot be opened"):
        FsspecConfig(url="nosuch://x/y").build(CONTEXT)
    with pytest.raises(BackendUnavailable, match="obstore is for s3, gs and az"):
        FsspecConfig(url="memory://x", client="obstore").build(CONTEXT)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"fsspec is not installed: `pip install lmcache-core\[fsspec\]`"):
        FsspecConfig(url="memory://x").build(CONTEXT)
    with pytest.raises(BackendUnavailable, match="obstore is not installed"):
        FsspecConfig(url="s3://bucket/x", client="obstore").build(CONTEXT)


@pytest.mark.parametrize(
    "url, options, client, kind",
    [
        ("s3://bucket/kv", {"key": "a", "secret": "b"}, "auto", Native),
        ("s3://bucket/kv", {"anon": True, "client_kwargs": {"region_name": "r"}}, "auto", Native),
        ("s3://bucket/kv", {"key": "a", "secret": "b"}, "fsspec", Objects),
        ("s3://bucket/kv", {"key": "a", "secret": "b", "requester_pays": True}, "auto", Objects),
        ("s3://bucket/kv", {"key": "a", "secret": "b", "client_kwargs": {"verify": False}}, "auto", Objects),
        ("s3://bucket/kv", {}, "auto", Objects),  # a profile or a program may know the keys
        ("s3://bucket/kv", {"access_key_id": "a", "secret_access_key": "b"}, "obstore", Native),
        ("memory://x", {}, "auto", Files),
        ("file:///x", {}, "auto", LocalFiles),
    ],
)
def test_which_client_is_used(
    url: str, options: dict[str, Any], client: Any, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    config = FsspecConfig(url=url, storage_options=options, client=client)
    opened, root, _ = config._store(options, frozenset(), CONTEXT)
    assert type(opened) is kind
    assert root.rpartition("/")[2] in ("kv", "x")


def test_options_are_those_of_the_client() -> None:
    with pytest.raises(BackendUnavailable, match="tier `cold`"):
        FsspecConfig(url="s3://bucket/kv", client="obstore", storage_options={"no_such": "x"}).build(CONTEXT)


def test_a_share_of_the_disk_is_a_capacity(tmp_path: Path) -> None:
    written = {"name": "cold", "capacity": "1%", "backend": {"type": "fsspec", "url": f"file://{tmp_path}/kv"}}
    memory = {"name": "dram", "capacity": "1MiB", "backend": {"type": "cpu"}}
    config = PipelineConfig.model_validate({"tiers": [memory, written]})
    assert config.tiers[1].capacity is not None


def test_the_timeout_is_shorter_than_the_deadline() -> None:
    backend = FsspecConfig(url=f"memory://{secrets.token_hex(4)}", timeout="100ms").build(CONTEXT)
    assert backend.limit == pytest.approx(0.1)
    backend.close()


def test_tiers_share_a_process_global_store_by_name_only(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """`memory://` is one store for the process: the path tells tiers apart."""
    names = [secrets.token_hex(4) for _ in range(2)]
    lane = LaneConfig(threads=1, deadline=30.0, lookup_deadline=15.0)
    first, second = (pipelines(tier(backend=FsspecConfig(url=f"memory://{name}"), lane=lane)) for name in names)
    store(first, keys[:4])
    settle(first)
    assert served(second, keys[:4]) == 0
    first.clear("dram")
    assert served(first, keys[:4]) == 4
