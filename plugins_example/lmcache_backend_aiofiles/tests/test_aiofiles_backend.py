"""The whole contract, from the kit; and that it works as a tier."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmcache_backend_aiofiles import AiofilesBackend, AiofilesConfig

from lmcache_core.errors import BackendUnavailable
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests


class TestAiofiles(StorageBackendTests):
    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> OpenBackend:
        return lambda context: AiofilesConfig(path=tmp_path / "kv").build(context)


def test_litter_of_a_killed_writer_is_reaped(tmp_path: Path) -> None:
    (tmp_path / "0123.tmp").write_bytes(b"half")
    AiofilesBackend(tmp_path, BuildContext("t", 8192, None, 2)).close()
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendUnavailable, match="choose another"):
        AiofilesBackend(tmp_path / "file", BuildContext("t", 8192, None, 2))
