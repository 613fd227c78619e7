"""Redis servers for tests: alone, behind Sentinels, as a cluster; and what tests do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import redis

from lmcache_backends.redis_store import RedisConfig
from lmcache_backends.redis_store.backend import RedisBackend
from lmcache_backends.redis_store.rig import Server
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.storage import OpenBackend

SERVICE = "kv"


def poll(condition: Callable[[], object], timeout: float = 20.0) -> None:
    """Wait until it holds."""
    end = monotonic() + timeout
    while not condition():
        assert monotonic() < end, "it never came true"
        sleep(0.005)


def client(server: Server, **options: Any) -> redis.Redis:
    """redis-py's own client, to look behind the backend's back."""
    return redis.Redis(port=server.port, **options)


def configure(config: RedisConfig, **changes: Any) -> RedisConfig:
    """A changed copy, validated."""
    return RedisConfig(**{**{name: getattr(config, name) for name in config.model_fields_set}, **changes})


def open_with(config: RedisConfig, **changes: Any) -> OpenBackend:
    """What the kit opens backends with."""
    changed = configure(config, **changes)
    return lambda context: changed.build(context)


def build(
    config: RedisConfig, *, object_bytes: int = 64 << 10, deadline: float = 5.0, threads: int = 4
) -> RedisBackend:
    """The backend of a tier."""
    return config.build(BuildContext("redis", object_bytes, None, threads, deadline=deadline))


def tracked(backend: RedisBackend) -> RedisBackend:
    """The same, once its list of keys is complete."""
    backend.contains([])
    poll(lambda: backend.contains_is_local)
    return backend


def untracked(backend: RedisBackend) -> RedisBackend:
    """The same, once it noticed that its list of keys is not kept up to date."""
    presence = backend.presence
    poll(lambda: presence is None or presence.known([]) is None)
    return backend


@contextmanager
def sentinels(directory: Path, count: int = 1) -> Iterator[tuple[RedisConfig, list[Server]]]:
    """A master, a replica, and Sentinels that agree about them: the configuration, and [master, replica]."""
    with ExitStack() as stack:
        master = stack.enter_context(Server(directory / "master"))
        replica = stack.enter_context(Server(directory / "replica", "--replicaof", "127.0.0.1", str(master.port)))
        with client(replica) as ask:
            poll(lambda: ask.info("replication")["master_link_status"] == "up")
        ports = []
        for number in range(count):
            home = directory / f"sentinel-{number}"
            home.mkdir()
            settings = home / "sentinel.conf"
            settings.write_text(
                f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} {count // 2 + 1}\n"
                f"sentinel down-after-milliseconds {SERVICE} 500\n"
                f"sentinel failover-timeout {SERVICE} 2000\n"
            )
            ports.append(stack.enter_context(Server(home, str(settings), "--sentinel")).port)
        with redis.Redis(port=ports[0]) as ask:
            poll(lambda: ask.sentinel_slaves(SERVICE))
            poll(lambda: len(ask.sentinel_sentinels(SERVICE)) == count - 1)
        config = RedisConfig(
            url=f"redis://127.0.0.1:{ports[0]}",
            hosts=tuple(f"127.0.0.1:{port}" for port in ports[1:]),
            mode="sentinel",
            service=SERVICE,
        )
        yield config, [master, replica]


@contextmanager
def cluster(directory: Path, count: int = 3) -> Iterator[tuple[RedisConfig, list[Server]]]:
    """A cluster of masters: the configuration and the servers, which share the slots evenly."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    with ExitStack() as stack:
        nodes = [stack.enter_context(Server(directory / f"node-{i}", *options)) for i in range(count)]
        bounds = [16384 * i // count for i in range(count + 1)]
        for i, node in enumerate(nodes):
            with client(node) as ask:
                ask.execute_command("CLUSTER ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
                ask.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)
        for node in nodes:
            with client(node) as ask:
                poll(lambda ask=ask: ask.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
                poll(lambda ask=ask: len(ask.execute_command("CLUSTER SLOTS")) == count)
        yield RedisConfig(url=f"redis://127.0.0.1:{nodes[0].port}", mode="cluster"), nodes
