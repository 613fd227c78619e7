"""Chunks whose bytes follow from their keys, and media whose objects a test can damage behind the tier's back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol

from lmcache_backends.gds import GdsConfig
from lmcache_core.config import LaneConfig, TierConfig
from lmcache_core.pipeline import Pipeline, Reservation
from lmcache_core.protocols import BackendConfig
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import PAGE, ChunkKey

PATIENT = LaneConfig(threads=1, deadline=30.0, lookup_deadline=15.0)
"""One thread per direction, and no deadline that a slow machine could miss."""


def chunk(key: ChunkKey, nbytes: int) -> bytes:
    """The bytes that belong to a key; no part of them repeats."""
    return Random(key).randbytes(nbytes)


def fill(keys: Sequence[ChunkKey]) -> Callable[[Reservation], None]:
    """What `Pipeline.store` calls to write the chunks of `keys`."""

    def write(reservation: Reservation) -> None:
        for i, position in enumerate(reservation.positions):
            view = reservation.view(i)
            view[:] = chunk(keys[position], len(view))

    return write


def store(pipeline: Pipeline, keys: Sequence[ChunkKey]) -> int:
    """Store the chunks of `keys`; how many were new."""
    return pipeline.store(keys, fill(keys))


def served(pipeline: Pipeline, keys: Sequence[ChunkKey], timeout: float | None = None) -> int:
    """Retrieve, check every byte, and tell how many chunks came."""
    with pipeline.retrieve(keys, timeout) as lease:
        assert lease.keys == list(keys[: len(lease)])
        for i, key in enumerate(lease.keys):
            assert bytes(lease.view(i)) == chunk(key, pipeline.layout.chunk_bytes)
        assert (lease.reason is None) == (len(lease) == len(keys))
        return len(lease)


def tier(name: str = "store", **options: Any) -> TierConfig:
    """A storage tier, in a dict unless `backend` says otherwise."""
    options.setdefault("backend", DictConfig())
    return TierConfig(name=name, **options)


class Medium(Protocol):
    """Where a tier's objects lie, reachable behind its back."""

    def config(self) -> BackendConfig: ...
    def read(self, key: ChunkKey) -> bytes: ...
    def write(self, key: ChunkKey, obj: bytes) -> None:
        """Replace what is stored under the key."""


class InDict:
    """The dict backend."""

    def __init__(self, *, scannable: bool = True, local: bool = True) -> None:
        self._config = DictConfig(scannable=scannable, local=local)

    def config(self) -> DictConfig:
        return self._config

    def read(self, key: ChunkKey) -> bytes:
        return bytes(self._config.objects[key])

    def write(self, key: ChunkKey, obj: bytes) -> None:
        self._config.objects[key] = obj


class InFiles:
    """`gds` with a file for each object."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def config(self) -> GdsConfig:
        return GdsConfig(path=self.directory, mode="files", free_floor="0B")

    def path(self, key: ChunkKey) -> Path:
        (path,) = self.directory.rglob(key.hex())
        return path

    def read(self, key: ChunkKey) -> bytes:
        return self.path(key).read_bytes()

    def write(self, key: ChunkKey, obj: bytes) -> None:
        with self.path(key).open("r+b") as file:
            file.write(obj)
            file.truncate(len(obj))
            os.fsync(file.fileno())


class InSegments:
    """`gds` with slots in a few large files. An object there cannot become longer or shorter."""

    def __init__(self, directory: Path, nbytes: int) -> None:
        self.directory = directory
        self._nbytes = nbytes

    def config(self) -> GdsConfig:
        return GdsConfig(path=self.directory, mode="segments", free_floor="0B")

    def find(self, key: ChunkKey) -> tuple[Path, int]:
        """The file that holds the object, and where in it."""
        for path in self.directory.glob("segment-*"):
            data = path.read_bytes()
            for at in range(0, len(data), PAGE):
                if data[at + 16 : at + 48] == key:
                    return path, at
        raise KeyError(key.hex())

    def read(self, key: ChunkKey) -> bytes:
        path, at = self.find(key)
        return path.read_bytes()[at : at + self._nbytes]

    def write(self, key: ChunkKey, obj: bytes) -> None:
        path, at = self.find(key)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(obj.ljust(self._nbytes, b"\0"))
            os.fsync(file.fileno())
