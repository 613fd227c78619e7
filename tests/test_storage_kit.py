"""The storage kit over the backends here. That it finds bugs: test_kit_storage.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcache_backends.gds import GdsConfig
from lmcache_core.testing.memory import DictConfig
from lmcache_core.testing.stateful import StorageStateMachineTests
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests


class TestDict(StorageStateMachineTests):
    @pytest.fixture(params=[True, False], ids=["scannable", "unscannable"])
    def open_backend(self, request: pytest.FixtureRequest) -> OpenBackend:
        objects: dict[Any, Any] = {}
        scannable = request.param
        return lambda given: DictConfig(objects=objects, scannable=scannable, limit=given.capacity).build(given)


class TestUnlimitedDict(StorageBackendTests):
    @pytest.fixture
    def open_backend(self) -> OpenBackend:
        return DictConfig(local=False).build


class TestGds(StorageStateMachineTests):
    examples, steps = 3, 12

    @pytest.fixture(params=["segments-auto", "segments-buffered", "files-auto", "files-buffered"])
    def open_backend(self, request: pytest.FixtureRequest, tmp_path: Path) -> OpenBackend:
        mode, io = request.param.split("-")
        self.other = GdsConfig(path=tmp_path / "other", mode=mode, io=io, free_floor="0B").build
        return GdsConfig(path=tmp_path / "tier", mode=mode, io=io, free_floor="0B").build

    def elsewhere(self) -> OpenBackend:
        return self.other
