"""The fsspec backend: the storage contract on memory, on a directory and on S3, by each client."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from lmcache_backends.fsspec_store import FsspecConfig
from lmcache_backends.fsspec_store.rig import FsspecRig
from lmcache_core.testing.rig import Medium
from lmcache_core.testing.stateful import StorageStateMachineTests
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: object) -> None:
        pass


pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The endpoint of moto's S3, in this process. One request at a time: moto itself is not thread-safe."""
    app, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def in_turn(environment: Any, start_response: Any) -> Any:
        with turn:
            return app(environment, start_response)

    server = make_server("127.0.0.1", 0, in_turn, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("PUT", "/bucket")
        assert connection.getresponse().status == 200
        connection.close()
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Medium]:
    with FsspecRig().start(tmp_path_factory.mktemp("weed")) as medium:
        yield medium


class TestMemory(StorageStateMachineTests):
    @pytest.fixture
    def open_backend(self) -> OpenBackend:
        return FsspecConfig(url=f"memory://{secrets.token_hex(8)}").build


class TestDirectory(StorageBackendTests):
    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> OpenBackend:
        return FsspecConfig(url=f"file://{tmp_path}/kv").build


class TestMoto(StorageBackendTests):
    @pytest.fixture
    def open_backend(self, moto: str) -> OpenBackend:
        options = {"key": "a", "secret": "b", "endpoint_url": moto, "client_kwargs": {"region_name": "us-east-1"}}
        return FsspecConfig(url=f"s3://bucket/{secrets.token_hex(8)}", storage_options=options).build


class TestSeaweed(StorageBackendTests):
    @pytest.fixture
    def open_backend(self, seaweed: Medium) -> OpenBackend:
        return seaweed.config.model_copy(update={"url": f"s3://lmcache/{secrets.token_hex(8)}"}).build


class TestSeaweedByS3fs(StorageBackendTests):
    capacity = 3 << 20  # a request takes s3fs ten times the processor time that it takes obstore
    deadline = 20.0

    @pytest.fixture
    def open_backend(self, seaweed: Medium) -> OpenBackend:
        where = {"url": f"s3://lmcache/{secrets.token_hex(8)}", "client": "fsspec"}
        return seaweed.config.model_copy(update=where).build
