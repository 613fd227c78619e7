"""Redis servers on loopback, for tests and benchmarks: started empty, persisting nothing, gone with their starter."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from lmcache_backends.redis_store import RedisConfig
from lmcache_core.errors import BackendUnavailable
from lmcache_core.testing.rig import Baseline, Medium, Rig

_START_S = 20.0
_VALUE_BYTES = 1 << 20
"""Values at which redis-benchmark moves most bytes."""
_CLIENTS = (1, 2, 4)
_KEYS = 256
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def find(program: str) -> str:
    """Path of a Redis program. Raise `BackendUnavailable`."""
    found = shutil.which(program)
    if found is None:
        raise BackendUnavailable(f"{program} is not installed: apt-get install redis-server redis-tools")
    return found


def free_port() -> int:
    """A port nobody listens on, on loopback, such that port + 10000 is one too (a cluster node's second)."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = int(one.getsockname()[1])
            if port < 55000:
                with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 10000)):
                    return port


class Server:
    """A server process. It dies with the thread that started it."""

    def __init__(self, directory: Path, *options: str, program: str = "", ready: bytes = b"+PONG") -> None:
        """`directory` for its files; `options` are added to the command line. Started by `start`."""
        self.port = free_port()
        self.directory = directory
        self.options = options
        self._program = program or find("redis-server")
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Start it and wait until it answers. Raise `BackendUnavailable` with its last words."""
        self.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory / "server.log"
        command = [self._program, *self.options, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.directory), "--daemonize", "no"]
        if "--sentinel" not in self.options:
            command += ["--save", "", "--appendonly", "no"]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0, preexec_fn=_die_with_parent
            )
        end = monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or monotonic() > end:
                self.stop()
                raise BackendUnavailable(f"{self._program} did not start: {log.read_text()[-500:]}")
            sleep(0.01)
        return self

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as sock:
                sock.sendall(b"PING\r\n")
                return sock.recv(64).startswith((self._ready, b"-NOAUTH"))
        except OSError:
            return False

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it with SIGKILL, and wait."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    stop = kill

    def freeze(self) -> None:
        """Stop it where it is (SIGSTOP)."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class RedisRig(Rig):
    """One `redis-server` on loopback TCP."""

    @contextmanager
    def start(self, directory: Path) -> Iterator[Medium]:
        # A bound, as users have: a long benchmark must not fill the machine.
        with Server(directory, "--maxmemory", "4gb", "--maxmemory-policy", "allkeys-lru") as server:
            config = RedisConfig(url=f"redis://127.0.0.1:{server.port}/0")
            yield Medium(config, baseline(["-h", "127.0.0.1", "-p", str(server.port)]))


def baseline(where: Sequence[str]) -> Baseline:
    """redis-benchmark's best over a few numbers of clients, at the value size where it is fastest.

    It sets different keys in turn (`-r`), as everybody does who keeps something; its default, one key set over and
    over, never leaves the processor's cache and runs at up to 1.5 times that rate. It gets one key. `where`: its
    options that name the server.
    """
    program = find("redis-benchmark")

    def best(test: str) -> Callable[[int, int], float]:
        def measure(_: int, seconds: float) -> float:
            return max(_benchmark(program, where, test, clients, seconds / len(_CLIENTS)) for clients in _CLIENTS)

        return measure

    clients = ", ".join(map(str, _CLIENTS))
    name = f"redis-benchmark -d {_VALUE_BYTES}, best of -c {clients}; SET with -r {_KEYS}"
    return Baseline(name, put=best("set"), get=best("get"))


def _benchmark(program: str, where: Sequence[str], test: str, clients: int, seconds: float) -> float:
    """Bytes per second of one run of about that long."""

    def rate(test: str, count: int) -> float:
        command = [program, *where, "-t", test, "-c", str(clients), "-d", str(_VALUE_BYTES), "-n", str(count), "--csv"]
        command += ["-r", str(_KEYS)] if test == "set" else []
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        rows = {row[0]: row for row in csv.reader(ran.stdout.splitlines()) if row}
        return float(rows[test.upper()][1])

    if test == "get":
        key = subprocess.Popen(
            [find("redis-cli"), *where, "-x", "set", "key:__rand_int__"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        key.communicate(bytes(_VALUE_BYTES), timeout=60)
    else:
        rate("set", 2 * _KEYS)  # the server has its memory then
    return rate(test, max(100, int(rate(test, 100) * seconds))) * _VALUE_BYTES
