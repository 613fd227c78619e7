"""The fsspec backend on a real S3 server, beside obstore's own calls on the same server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Any

from lmcache_backends.fsspec_store import FsspecConfig
from lmcache_backends.fsspec_store.seaweed import S3Server, seaweed
from lmcache_core.errors import BackendUnavailable
from lmcache_core.testing.rig import Baseline, Medium, Rig

BUCKET = "lmcache"
_THREADS = 4
_OBJECTS = 16
_READY_S = 30.0


class FsspecRig(Rig):
    """`s3://` on SeaweedFS."""

    @contextmanager
    def start(self, directory: Path) -> Iterator[Medium]:
        with seaweed(directory) as server:
            make_ready(server)
            options = {
                "key": server.access_key_id,
                "secret": server.secret_access_key,
                "endpoint_url": server.endpoint,
                "client_kwargs": {"region_name": server.region},
            }
            config = FsspecConfig(url=f"s3://{BUCKET}/fsspec", storage_options=options)
            yield Medium(config, obstore_baseline(server))


def make_ready(server: S3Server) -> None:
    """Make the bucket and the server's first volume, which takes a new server a few seconds."""
    store, obstore = _store(server)
    end = monotonic() + _READY_S
    while True:
        try:
            obstore.put(store, "ready", b"ready")
        except obstore.exceptions.BaseError as error:
            if monotonic() > end:
                raise BackendUnavailable(f"SeaweedFS takes no object within {_READY_S:g} s") from error
            sleep(0.1)
        else:
            obstore.delete(store, "ready")
            return


def obstore_baseline(server: S3Server) -> Baseline:
    """obstore's own blocking calls on the server, from as many threads as a tier has: whole bodies, nothing checked.

    A put makes room first, as `measure` has backends do: on this server that costs a tenth of the rate.
    """
    store, obstore = _store(server)

    def put(object_bytes: int, seconds: float) -> float:
        body = Random(0).randbytes(object_bytes)

        def replace(i: int) -> None:
            name = f"baseline/{i % _OBJECTS}"
            obstore.delete(store, name)
            obstore.put(store, name, body)

        return _rate(replace, object_bytes, seconds)

    def get(object_bytes: int, seconds: float) -> float:
        body = Random(0).randbytes(object_bytes)
        for i in range(_OBJECTS):
            obstore.put(store, f"baseline/{i}", body)
        return _rate(lambda i: obstore.get(store, f"baseline/{i % _OBJECTS}").bytes(), object_bytes, seconds)

    return Baseline(f"obstore delete and put, get().bytes(), {_THREADS} threads", put, get)


def _rate(call: Callable[[int], Any], object_bytes: int, seconds: float) -> float:
    """Bytes per second of `call`, from several threads at once."""
    numbers = count()
    began = monotonic()

    def work() -> int:
        calls = 0
        while monotonic() - began < seconds:
            call(next(numbers))
            calls += 1
        return calls

    with ThreadPoolExecutor(_THREADS) as pool:
        done = sum(pool.map(lambda _: work(), range(_THREADS)))
    return done * object_bytes / (monotonic() - began)


def _store(server: S3Server) -> tuple[Any, Any]:
    if find_spec("obstore") is None:
        raise BackendUnavailable("obstore is not installed: `pip install lmcache-core[fsspec]`")
    import obstore
    import obstore.store

    store = obstore.store.S3Store(
        BUCKET,
        endpoint=server.endpoint,
        region=server.region,
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
        unsigned_payload=True,
        client_options={"allow_http": True},
    )
    return store, obstore
