"""The s3 plugin keeps the contract of storage backends on a real S3 server."""

import secrets
from collections.abc import Iterator

import pytest
from lmcache_backend_s3.rig import S3Rig

from lmcache_core.testing.rig import Medium
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Medium]:
    with S3Rig().start(tmp_path_factory.mktemp("s3")) as medium:
        yield medium


class TestS3(StorageBackendTests):
    @pytest.fixture
    def open_backend(self, medium: Medium) -> OpenBackend:
        return medium.config.model_copy(update={"url": f"s3://lmcache/{secrets.token_hex(8)}"}).build
