"""Disks that lose what they were given: bad blocks, files that stay, a journal that finds no room."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from chunks import keys, serve, store, tier
from faults.disk import build, key_of, new_object

from lmcache_backends.cpu import CpuConfig
from lmcache_backends.gds import GdsConfig
from lmcache_core import _native
from lmcache_core.build import build as build_pipeline
from lmcache_core.config import PipelineConfig, TierConfig
from lmcache_core.errors import CorruptChunk
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import new_object as object_of
from lmcache_core.types import object_bytes, round_up


@pytest.mark.parametrize("code", [errno.ENODATA, errno.EILSEQ])
def test_bad_blocks_are_given_up_whatever_the_kernel_calls_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    backend = build(tmp_path / "kv", 2 << 20, 4096 + (16 << 10))
    assert backend.put_from([key_of(1)], [new_object(1, 1, 16 << 10)]) == [None]
    real = _native.pread_batch

    def pread(*columns: Any) -> Any:
        done = real(*columns)
        done[:] = -code
        return done

    monkeypatch.setattr(_native, "pread_batch", pread)
    found = [backend.get_into([key_of(1)], [aligned(5 * 4096)])[0] for _ in range(3)]
    backend.close()
    assert isinstance(found[1], CorruptChunk), found


def test_giving_up_objects_does_not_close_the_breaker_of_a_dead_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: KVLayout
) -> None:
    disk = tier("disk", capacity=4 << 20, backend=GdsConfig(path=tmp_path / "kv", free_floor=0))
    memory = TierConfig(name="ram", capacity=16 * 8192, backend=CpuConfig())
    pipeline = build_pipeline(PipelineConfig(chunk_tokens=layout.chunk_tokens, tiers=(memory, disk)), layout)
    try:
        names = [keys(1, at) for at in range(0, 60, 10)]
        for name in names:
            assert store(pipeline, name) == 1 and pipeline.flush(10)
        pipeline.clear("ram")
        real = _native.pread_batch

        def pread(*columns: Any) -> Any:
            done = real(*columns)
            done[:] = -errno.EIO
            return done

        monkeypatch.setattr(_native, "pread_batch", pread)
        for name in names[:5]:
            assert serve(pipeline, name) == []
        breaker = pipeline.tiers[0].read_lane.breaker
        assert pipeline.tiers[0].read_lane.drain(5) and breaker.open
        breaker._until = 0.0  # the pause is over: the next read is the probe
        assert serve(pipeline, names[0]) == []
        assert pipeline.tiers[0].read_lane.drain(5)
        assert breaker.open, "nothing was read: the disk is as dead as before"
    finally:
        pipeline.close()


def test_deletions_last_through_a_restart_though_the_journal_could_not_be_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*numbers: int) -> list[Any]:
        return backend.put_from([key_of(n) for n in numbers], [new_object(n, 1, 16 << 10) for n in numbers])

    backend = build(tmp_path / "kv", 1 << 20, 4096 + (16 << 10), free_floor=0)
    assert write(1, 2) == [None, None]
    journal = backend._volume._journal
    if (journal._room - journal._count) % 2 == 0:
        write(4)
    while journal.fits(2):
        write(3)
        backend.delete([key_of(3)])
    assert journal.fits(1) and not journal.fits(2)
    with monkeypatch.context() as patch:

        def full(fd: int, at: int, nbytes: int) -> None:
            raise OSError(errno.ENOSPC, "disk full")

        patch.setattr(os, "posix_fallocate", full)
        backend.delete([key_of(1), key_of(2)])  # did not raise: they are gone
    assert backend.contains([key_of(1), key_of(2)]) == [False, False]
    backend.close()
    backend = build(tmp_path / "kv", 1 << 20, 4096 + (16 << 10), free_floor=0)
    back = backend.contains([key_of(1), key_of(2)])
    backend.close()
    assert back == [False, False]


def test_files_that_can_be_unlinked_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build(tmp_path / "kv", 4 << 20, 4096 + (16 << 10), mode="files")
    numbers = range(1, 5)
    assert backend.put_from([key_of(n) for n in numbers], [new_object(n, 1, 16 << 10) for n in numbers]) == [None] * 4
    folder = backend._volume.folder
    real = type(folder).unlink

    def unlink(self: Any, name: str, within: Any = None) -> None:
        if name == key_of(1).hex():
            raise OSError(errno.EIO, "bad block")
        real(self, name, within)

    monkeypatch.setattr(type(folder), "unlink", unlink)
    with pytest.raises(OSError, match="bad block"):
        backend.delete([key_of(n) for n in numbers])
    monkeypatch.undo()
    left = backend.contains([key_of(n) for n in numbers])
    backend.close()
    assert left == [True, False, False, False]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODATA, errno.EILSEQ])
def test_files_on_bad_blocks_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    backend = build(tmp_path / "kv", 4 << 20, 4096 + (16 << 10), mode="files")
    assert backend.put_from([key_of(1)], [new_object(1, 1, 16 << 10)]) == [None]
    real, failing = _native.pread_batch, True

    def pread(*columns: Any) -> Any:
        done = real(*columns)
        done[:] = -code if failing else done[:]
        return done

    monkeypatch.setattr(_native, "pread_batch", pread)

    def get() -> Any:
        return backend.get_into([key_of(1)], [aligned(5 * 4096)])[0]

    assert isinstance(get(), OSError)
    failing = False
    assert isinstance(get(), int)  # once is not twice in a row
    failing = True
    found = [get() for _ in range(2)]
    backend.close()
    assert isinstance(found[0], OSError) and isinstance(found[1], CorruptChunk), found


def test_a_file_on_bad_blocks_is_dropped_and_counted_once_and_stored_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: KVLayout
) -> None:
    disk = tier("disk", capacity=8 << 20, backend=GdsConfig(path=tmp_path / "kv", mode="files", free_floor=0))
    memory = TierConfig(name="ram", capacity=16 * 8192, backend=CpuConfig())
    pipeline = build_pipeline(PipelineConfig(chunk_tokens=layout.chunk_tokens, tiers=(memory, disk)), layout)
    try:
        name = keys(1)
        assert store(pipeline, name) == 1 and pipeline.flush(10)
        pipeline.clear("ram")
        real = _native.pread_batch

        def pread(*columns: Any) -> Any:
            done = real(*columns)
            done[:] = -errno.EIO
            return done

        with monkeypatch.context() as patch:
            patch.setattr(_native, "pread_batch", pread)
            for _ in range(4):
                assert serve(pipeline, name) == []
                assert pipeline.tiers[0].drain(5)
        assert pipeline.tiers[0].counts["quarantined"] == 1
        assert pipeline.tiers[0].used == 0
        assert store(pipeline, name) == 1 and pipeline.flush(10)
        pipeline.clear("ram")
        assert len(serve(pipeline, name)) == 1
    finally:
        pipeline.close()


@pytest.mark.parametrize("mode", ["segments", "files"])
def test_an_object_of_larger_settings_is_dropped_once_and_stored_anew(
    tmp_path: Path, layout: KVLayout, mode: str
) -> None:
    """A serde or a wrapper taken away leaves objects that are longer than any buffer of the tier."""
    config = GdsConfig.model_validate({"path": tmp_path / "kv", "mode": mode, "free_floor": 0})
    names = keys(3)
    nbytes = round_up(object_bytes(layout.chunk_bytes)) + 80
    backend = config.build(BuildContext("disk", nbytes, 8 << 20, 2))
    assert backend.put_from(names[2:], [object_of(names[2], nbytes)]) == [None]
    backend.close()

    disk = tier("disk", capacity=8 << 20, backend=config)
    memory = TierConfig(name="ram", capacity=16 * 8192, backend=CpuConfig())
    pipeline = build_pipeline(PipelineConfig(chunk_tokens=layout.chunk_tokens, tiers=(memory, disk)), layout)
    try:
        medium = pipeline.tiers[0]
        assert store(pipeline, names[:2]) == 2 and pipeline.flush(10)
        assert medium.present(names) == [True] * 3
        for _ in range(3):
            pipeline.clear("ram")
            assert serve(pipeline, names) == ["disk"] * 2
            assert medium.drain(5)
        assert medium.counts["quarantined"] == 1 and medium.counts.get("get_errors", 0) == 0
        assert medium.present(names) == [True, True, False]
        assert store(pipeline, names) == 1 and pipeline.flush(10)
        pipeline.clear("ram")
        assert serve(pipeline, names) == ["disk"] * 3
    finally:
        pipeline.close()
