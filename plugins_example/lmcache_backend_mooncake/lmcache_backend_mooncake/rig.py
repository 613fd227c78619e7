"""A Mooncake cluster on loopback: one master, storage nodes in processes of their own, all gone in the end."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import IO, Any

import numpy as np

from lmcache_backend_mooncake import MooncakeConfig
from lmcache_backend_mooncake.client import code_name
from lmcache_core.errors import BackendError, BackendUnavailable
from lmcache_core.testing.rig import Baseline, Medium, Rig
from lmcache_core.types import round_up

NODE_BYTES = 3 << 30
"""Memory the rig's node offers; only what is stored is ever touched."""

CLIENT_TTL_S = 2
"""Seconds after which the master gives up on a node. Mooncake's own default is 10."""

START_S = 20.0
_ATTEMPTS = 3
_SLOTS = 16
_ROUND_BYTES = 256 << 20
_PR_SET_PDEATHSIG = 1
_LOOPBACK = "127.0.0.1"
_LIBRARIES = {"libibverbs.so.1": "libibverbs1", "libnuma.so.1": "libnuma1", "libcurl.so.4": "libcurl4"}


def missing() -> str:
    """What of Mooncake this machine lacks and how to get it; empty where nothing is missing."""
    if importlib.util.find_spec("mooncake") is None:
        return "the package `mooncake` is missing: `pip install mooncake-transfer-engine-non-cuda`"
    for library, package in _LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            return f"Mooncake needs {library}: `apt-get install {package}`"
    return ""


class Cluster:
    """A master and nodes, each of which can be started, stopped and killed. Leaving the context kills them all."""

    def __init__(self, directory: Path) -> None:
        """`directory` gets the logs."""
        self._directory = directory
        self._prctl = ctypes.CDLL(None).prctl
        self._logs: list[IO[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port = 0
        self.master: subprocess.Popen[bytes]
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"{_LOOPBACK}:{self.port}"

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        for log in self._logs:
            log.close()

    def start_master(self) -> None:
        """Start the master; again on the same port once it had one. Raise `BackendUnavailable`."""
        lacking = missing()
        if lacking:
            raise BackendUnavailable(lacking)
        found = importlib.util.find_spec("mooncake")
        assert found is not None and found.submodule_search_locations
        program = Path(found.submodule_search_locations[0]) / "mooncake_master"
        attempts = 1 if self.port else _ATTEMPTS
        for _ in range(attempts):
            port = self.port or _free_port()
            process = self._start(
                "master",
                str(program),
                f"--rpc_address={_LOOPBACK}",
                f"--rpc_port={port}",
                f"--metrics_host={_LOOPBACK}",
                f"--metrics_port={_free_port()}",
                f"--client_ttl={CLIENT_TTL_S}",
                "--logtostderr",
            )
            if _listens(process, port):
                self.port, self.master = port, process
                return
        raise BackendUnavailable(f"mooncake_master did not start; it said: {self._said('master')}")

    def start_nodes(self, count: int = 1, nbytes: int = NODE_BYTES) -> None:
        """Start more nodes, at the end of `nodes`, and wait until they have joined. Raise `BackendUnavailable`."""
        command = (sys.executable, "-m", "lmcache_backend_mooncake.node", self.address, str(nbytes))
        started = [self._start("node", *command) for _ in range(count)]
        for process in started:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], START_S)
            if not ready or process.stdout.readline() != b"ready\n":
                raise BackendUnavailable(f"a Mooncake node did not start; it said: {self._said('node')}")
        self.nodes += started

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        log = (self._directory / f"{name}.log").open("ab")
        self._logs.append(log)
        prctl = self._prctl

        def die_with_parent() -> None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if name == "node" else log,
            stderr=log,
            env={**os.environ, "MC_TCP_BIND_ADDRESS": _LOOPBACK, "MC_LOG_LEVEL": "WARNING"},
            preexec_fn=die_with_parent,
        )
        self._processes.append(process)
        return process

    def _said(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text(errors="replace")[-500:]


class MooncakeRig(Rig):
    """One master and one node, reached over TCP."""

    @contextmanager
    def start(self, directory: Path) -> Iterator[Medium]:
        with Cluster(directory) as cluster:
            cluster.start_master()
            cluster.start_nodes()
            config = MooncakeConfig(master=cluster.address)
            with OwnClient(config) as client:
                yield Medium(config, Baseline(client.name, client.put, client.get))


class OwnClient:
    """Mooncake's own client on registered memory: what there is to reach."""

    name = "MooncakeDistributedStore put_from / get_into on registered memory, 1 thread"

    def __init__(self, config: MooncakeConfig) -> None:
        self._config = config
        self._store: Any = None

    def __enter__(self) -> OwnClient:
        return self

    def __exit__(self, *error: object) -> None:
        if self._store is not None:
            self._store.close()

    def put(self, object_bytes: int, seconds: int) -> float:
        """Bytes per second of putting new objects."""
        return self._rate(object_bytes, seconds, putting=True)

    def get(self, object_bytes: int, seconds: int) -> float:
        """Bytes per second of getting them."""
        return self._rate(object_bytes, seconds, putting=False)

    def _rate(self, object_bytes: int, seconds: int, *, putting: bool) -> float:
        store = self._joined()
        step = round_up(object_bytes)
        memory = np.frombuffer(mmap.mmap(-1, _SLOTS * step), np.uint8)
        memory[:] = 0xA5
        base = int(memory.ctypes.data)
        _checked(store.register_buffer(base, memory.nbytes))
        run = secrets.token_hex(4)
        names = [f"baseline/{run}/{at}" for at in range(max(_SLOTS, _ROUND_BYTES // step))]

        def round_trip(call: Callable[[str, int, int], int]) -> float:
            begun = perf_counter()
            for at, name in enumerate(names):
                _checked(call(name, base + at % _SLOTS * step, object_bytes))
            return perf_counter() - begun

        try:
            taken = moved = 0.0
            if not putting:
                round_trip(store.put_from)
            while taken < seconds:
                taken += round_trip(store.put_from if putting else store.get_into)
                moved += len(names) * object_bytes
                if putting:
                    store.batch_remove(names, True)
            return moved / taken
        finally:
            store.batch_remove(names, True)
            store.unregister_buffer(base)

    def _joined(self) -> Any:
        if self._store is None:
            from mooncake.store import MooncakeDistributedStore

            store = MooncakeDistributedStore()
            _checked(store.setup(_LOOPBACK, "P2PHANDSHAKE", 0, 0, "tcp", "", self._config.master))
            self._store = store
        return self._store


def _checked(code: int) -> None:
    if code < 0:
        raise BackendError(f"Mooncake's own client: {code_name(code)}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((_LOOPBACK, 0))
        port: int = sock.getsockname()[1]
        return port


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    end = monotonic() + START_S
    while monotonic() < end and process.poll() is None:
        try:
            socket.create_connection((_LOOPBACK, port), 1.0).close()
        except OSError:
            sleep(0.02)
        else:
            return True
    return False
