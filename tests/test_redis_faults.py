"""What goes wrong with Redis servers is a miss or a dropped store with a reason: never a wrong byte, never a wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import pytest
from chunks import keys, serve, store, tier
from conftest import BuildPipeline
from fake_redis import FakeRedis
from redis_servers import build, client, cluster, configure, poll, sentinels, tracked, untracked

from lmcache_backends.redis_store import RedisConfig, transfer
from lmcache_backends.redis_store import backend as redis_backend
from lmcache_backends.redis_store.backend import RedisBackend
from lmcache_backends.redis_store.rig import Server
from lmcache_core.config import LaneConfig
from lmcache_core.errors import BackendError, BackendUnavailable, CorruptChunk, NoSpace
from lmcache_core.layout import KVLayout
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import key_of, new_object
from lmcache_core.types import ChunkKey, Got

pytestmark = pytest.mark.timeout(120)

SIZE = 40_000
"""Bytes of an object: ten pieces of about 4 KiB."""
SLACK_S = 0.05
"""How much longer than its deadline a call may take on a busy machine."""
LAYOUT = KVLayout("lknhd", "bfloat16", 2, 2, 1, 64, chunk_tokens=16, block_tokens=4)
"""Chunks of 8 KiB: objects of three pieces."""
PATIENT = LaneConfig(threads=2, deadline=10.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis", "--enable-debug-command", "yes") as server:
        yield server


@pytest.fixture
def config(server: Server) -> RedisConfig:
    return RedisConfig(url=f"redis://127.0.0.1:{server.port}", part_bytes=4096)


@pytest.fixture
def backend(config: RedisConfig) -> Iterator[RedisBackend]:
    backend = build(config)
    yield backend
    backend.close()


def get(backend: RedisBackend, *numbers: int) -> list[bytes | Got]:
    """The bytes of objects, or what there is instead."""
    buffers = [aligned(SIZE) for _ in numbers]
    results = backend.get_into([key_of(n) for n in numbers], buffers)
    return [bytes(b[:r]) if isinstance(r, int) else r for b, r in zip(buffers, results, strict=True)]


def put(backend: RedisBackend, *numbers: int) -> list[Exception | None]:
    return backend.put_from([key_of(n) for n in numbers], [obj(n) for n in numbers])


def obj(number: int) -> memoryview:
    return new_object(key_of(number), SIZE)


def calls(backend: RedisBackend) -> list[tuple[str, Any]]:
    """One call of each kind."""
    return [
        ("contains", lambda: backend.contains([key_of(0), key_of(1)])),
        ("get", lambda: get(backend, 0, 1)),
        ("put", lambda: put(backend, 2)),
        ("delete", lambda: backend.delete([key_of(3)])),
    ]


def outcome(call: Any) -> list[Exception]:
    """The errors of a call, raised or as results."""
    try:
        results = call()
    except BackendError as error:
        return [error]
    return [result for result in results or () if isinstance(result, Exception)]


# -- what lies in the server is damaged --------------------------------------------------------------------------
def names(ask: Any, pattern: str) -> list[bytes]:
    return sorted(ask.scan_iter(match=pattern))


def test_damaged_bytes_are_caught_by_the_seal(pipelines: BuildPipeline, server: Server, config: RedisConfig) -> None:
    """Through the whole pipeline, in the first piece and in the others; then the chunk is stored anew."""
    pipeline = pipelines(tier("redis", backend=config, lane=PATIENT), layout=LAYOUT, slots=4)
    chunks, other = keys(4), keys(4, 100)
    with client(server) as ask:
        for pattern, offset in (("lmcache:o:*", 64 + 3900), ("lmcache:p:*", 17)):
            store(pipeline, chunks)
            assert pipeline.flush(10)
            assert store(pipeline, other) == 4, "memory holds the other chunks now"
            assert pipeline.flush(10)
            poll(lambda: pipeline.lookup(chunks).count == 4)
            for name in names(ask, pattern):
                if keys(3)[2].hex().encode() in name:
                    byte = ask.getrange(name, offset, offset)
                    ask.setrange(name, offset, bytes([byte[0] ^ 0x20]))
            before = pipeline.stats()["quarantined"]
            assert serve(pipeline, chunks) == ["redis"] * 2
            assert pipeline.stats()["quarantined"] == before + 1
            poll(lambda: not [name for name in names(ask, "*") if keys(3)[2].hex().encode() in name])
            pipeline.clear()


@pytest.mark.parametrize("damage", ["head", "short head", "longer piece", "shorter piece", "much longer piece"])
def test_a_value_of_another_shape_is_corrupt(config: RedisConfig, server: Server, damage: str) -> None:
    """And what else was asked for on the same connection comes right."""
    backend = build(config.model_copy(update={"connections": 1}))
    assert put(backend, 0, 1, 2) == [None] * 3
    with client(server) as ask:
        tag = key_of(1).hex()
        (head,) = names(ask, f"lmcache:o:*{tag}*")
        piece = names(ask, f"lmcache:p:*{tag}*")[3]
        match damage:
            case "head":
                ask.setrange(head, 20, b"\xff")
            case "short head":
                ask.set(head, b"LMCRED")
            case "longer piece":
                ask.append(piece, b"x")
            case "shorter piece":
                ask.set(piece, b"x")
            case _:
                ask.append(piece, bytes(300_000))
    first, second, third = get(backend, 0, 1, 2)
    assert (first, third) == (bytes(obj(0)), bytes(obj(2)))
    assert isinstance(second, CorruptChunk)
    with backend.servers.link(("127.0.0.1", server.port), monotonic() + 5) as link:
        assert link.quiet, "the connection stays in step"
    backend.close()


def test_an_object_larger_than_the_buffer_is_corrupt(backend: RedisBackend) -> None:
    put(backend, 0)
    buffer = aligned(SIZE - 1)
    (got,) = backend.get_into([key_of(0)], [buffer])
    assert isinstance(got, CorruptChunk) and bytes(buffer) == b"\xdb" * (SIZE - 1)


# -- N3: parts of objects ----------------------------------------------------------------------------------------
def test_any_missing_part_is_an_absent_object(backend: RedisBackend, server: Server) -> None:
    """And what is left of it goes."""
    with client(server) as ask:
        for part in range(10):
            assert put(backend, 0, 1, 2) == [None] * 3
            parts = names(ask, f"*{key_of(1).hex()}*")
            assert len(parts) == 10
            ask.delete(parts[part])
            assert get(backend, 0, 1, 2) == [bytes(obj(0)), None, bytes(obj(2))]
            left = names(ask, f"*{key_of(1).hex()}*")
            # Without the head nobody knows the pieces: that happens only to what is evicted anyway.
            assert left == [] or (parts[part] not in left and parts[part].startswith(b"lmcache:o"))
            ask.flushall()


def test_an_overwritten_object_leaves_nothing_behind(backend: RedisBackend, server: Server) -> None:
    with client(server) as ask:
        for _ in range(3):
            assert put(backend, 0) == [None]
            assert len(names(ask, "*")) == 10
        backend.delete([key_of(0)])
        assert names(ask, "*") == []


def test_parts_expire_together(config: RedisConfig, server: Server) -> None:
    backend = build(configure(config, ttl=30))
    forever = build(configure(config, prefix="forever:"))
    try:
        put(backend, 0)
        put(forever, 0)
        with client(server) as ask:
            left = [ask.pttl(name) for name in names(ask, "lmcache:*")]
            assert len(left) == 10 and 20_000 < min(left) <= max(left) <= 30_000
            assert max(left) - min(left) <= 50
            assert {ask.pttl(name) for name in names(ask, "forever:*")} == {-1}
            for name in names(ask, "lmcache:*"):
                ask.pexpire(name, 1)
        poll(lambda: get(backend, 0) == [None])
    finally:
        backend.close()
        forever.close()


def test_a_write_that_stops_leaves_nothing_for_ever(config: RedisConfig, server: Server) -> None:
    """Pieces without a head expire by themselves."""
    from_the_pieces = build(config)
    with client(server) as ask:
        ask.execute_command("ACL", "SETUSER", "default", "-set")  # pieces are PSETEX, the head is SET
        assert isinstance(put(from_the_pieces, 0)[0], BackendError)
        ask.execute_command("ACL", "SETUSER", "default", "+set")
        assert all(0 < ask.pttl(name) <= 20_000 for name in names(ask, "*"))
        assert get(from_the_pieces, 0) == [None]
    from_the_pieces.close()


# -- room --------------------------------------------------------------------------------------------------------
def test_a_full_server_is_no_space(backend: RedisBackend, server: Server) -> None:
    assert put(backend, 0) == [None]
    with client(server) as ask:
        ask.config_set("maxmemory", ask.info("memory")["used_memory"] + 100_000)
        results = put(backend, *range(1, 60))
        refused = [n for n, result in enumerate(results, 1) if result is not None]
        assert refused and all(isinstance(results[n - 1], NoSpace) for n in refused)
        assert [n for n in range(60) if n not in refused] == [
            n for n in range(60) if get(backend, n) == [bytes(obj(n))]
        ]
        assert not any(backend.contains([key_of(n) for n in refused]))
        ask.config_set("maxmemory", 0)
    assert put(backend, *refused) == [None] * len(refused)


def test_a_server_that_evicts_parts_serves_whole_objects_or_none(backend: RedisBackend, server: Server) -> None:
    with client(server) as ask:
        ask.config_set("maxmemory-policy", "allkeys-random")
        ask.config_set("maxmemory", ask.info("memory")["used_memory"] + 2_000_000)
        for n in range(200):
            (result,) = put(backend, n)
            assert result is None or isinstance(result, NoSpace)
        found = [get(backend, n)[0] for n in range(200)]
        whole = [n for n in range(200) if found[n] is not None]
        assert 0 < len(whole) < 200
        assert all(found[n] == bytes(obj(n)) for n in whole)


# -- N2: servers that answer with errors -------------------------------------------------------------------------
REFUSALS = {
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "misconf": b"-MISCONF Redis is configured to save RDB snapshots\r\n",
    "readonly": b"-READONLY You can't write against a read only replica.\r\n",
    "masterdown": b"-MASTERDOWN Link with MASTER is down\r\n",
    "noauth": b"-NOAUTH Authentication required.\r\n",
    "noperm": b"-NOPERM this user has no permissions\r\n",
    "busy": b"-BUSY Redis is busy running a script.\r\n",
    "clusterdown": b"-CLUSTERDOWN Hash slot not served\r\n",
    "moved": b"-MOVED 3999 127.0.0.1:6381\r\n",
    "no redis": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "garbage": b"\x00\xff\x17",
    "another type": b"+QUEUED\r\n",
    "endless line": b"$" + b"1" * 70_000,
    "huge": b"$99999999999\r\n",
    "nested": b"*1\r\n" * 5000,
    "more than asked": b":1\r\n" * 64,
}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeRedis]:
    with FakeRedis() as fake:
        yield fake


@pytest.mark.parametrize("refusal", REFUSALS)
def test_error_replies_are_errors_of_their_keys(fake: FakeRedis, refusal: str) -> None:
    """Told at once or at the deadline, and the next call finds the server well again."""
    fake.answer = b""
    backend = build(RedisConfig(url=f"redis://127.0.0.1:{fake.port}", track=False, part_bytes=4096), deadline=0.4)
    try:
        for name, call in calls(backend):
            fake.answer = REFUSALS[refusal]
            start = monotonic()
            errors = outcome(call)
            took = monotonic() - start
            assert took <= 0.4 + SLACK_S, name
            assert errors or (name == "contains" and refusal == "more than asked"), name
            fake.answer = b""
            assert backend.contains([key_of(0)]) == [False], "the connection is in step, or a new one"
        assert backend.servers.opened <= 4
    finally:
        backend.close()


def test_a_replica_refuses_and_a_master_again_takes(backend: RedisBackend, server: Server, tmp_path: Path) -> None:
    put(backend, 0)
    with client(server) as ask, Server(tmp_path / "other") as other:
        ask.config_set("repl-diskless-load", "disabled")
        ask.config_set("replica-serve-stale-data", "yes")
        ask.execute_command("REPLICAOF", "127.0.0.1", other.port)
        (refused,) = put(backend, 1)
        assert isinstance(refused, BackendError) and "READONLY" in str(refused)
        ask.execute_command("REPLICAOF", "NO", "ONE")
    assert put(backend, 1) == [None] and get(backend, 1) == [bytes(obj(1))]


def test_a_user_that_is_revoked_and_let_in_again(server: Server, config: RedisConfig) -> None:
    with client(server) as ask:
        allow = ["ACL", "SETUSER", "kv", "on", ">canary-secret", "~*", "+@all"]
        ask.execute_command(*allow)
        backend = tracked(build(configure(config, username="kv", password="canary-secret")))
        assert put(backend, 0) == [None]
        ask.execute_command("ACL", "DELUSER", "kv")
        untracked(backend)
        for name, call in calls(backend):
            errors = outcome(call)
            assert errors and all(isinstance(error, BackendUnavailable) for error in errors), name
            assert "canary" not in str(errors) and "canary" not in repr(errors)
        ask.execute_command(*allow)
        assert get(backend, 0) == [bytes(obj(0))]
        tracked(backend)
        backend.close()


def test_a_server_that_loads_for_long(pipelines: BuildPipeline, server: Server, config: RedisConfig) -> None:
    """A real one, busy in DEBUG SLEEP: it answers nobody. Lookups do not wait and loads give up."""
    lane = LaneConfig(threads=1, deadline=0.4)
    pipeline = pipelines(tier("redis", backend=config, lane=lane), layout=LAYOUT, slots=4)
    store(pipeline, keys(4))
    assert pipeline.flush(5)
    assert store(pipeline, keys(4, 100)) == 4
    assert pipeline.flush(5)
    with client(server) as ask:
        connection = ask.connection_pool.get_connection()
        connection.send_command("DEBUG", "SLEEP", "1.5")
        start = monotonic()
        assert serve(pipeline, keys(4)) == []
        assert monotonic() - start <= 0.4 + 2 * SLACK_S
        assert connection.read_response() == b"OK"
        ask.connection_pool.release(connection)
    poll(lambda: serve(pipeline, keys(4)) == ["redis"] * 4)


# -- N1: servers that die ----------------------------------------------------------------------------------------
@pytest.mark.usefixtures("quick_breaker")
def test_kills_in_the_middle(pipelines: BuildPipeline, server: Server, config: RedisConfig) -> None:
    """SIGKILL while chunks are written and read, and a restart with nothing in it: 0 wrong bytes, and it goes on."""
    pipeline = pipelines(tier("redis", backend=config, lane=PATIENT), layout=LAYOUT, slots=8)
    random = Random(1)
    served = 0
    for cycle in range(12):
        end = monotonic() + random.uniform(0.01, 0.05)
        start = 1000 * cycle
        while monotonic() < end:
            store(pipeline, keys(4, start))
            served += serve(pipeline, keys(4, random.randrange(1000 * cycle, start + 1))).count("redis")
            start += 4
        server.kill()
        serve(pipeline, keys(4, 1000 * cycle))
        server.start()
        again = keys(4, 1000 * cycle + 500)

        def back(again: list[ChunkKey] = again, other: int = cycle) -> bool:
            store(pipeline, again)
            pipeline.flush(1)
            store(pipeline, keys(8, 100_000 + 8 * other))
            return serve(pipeline, again) == ["redis"] * 4

        poll(back)


def test_restarts_cost_no_error_when_nothing_was_under_way(backend: RedisBackend, server: Server) -> None:
    for _ in range(3):
        assert put(backend, 0) == [None]
        server.kill()
        server.start()
        assert get(backend, 0) == [None]


def test_a_dead_server_is_told_at_once(backend: RedisBackend, server: Server) -> None:
    server.kill()
    untracked(backend)
    for name, call in calls(backend):
        start = monotonic()
        errors = outcome(call)
        assert errors and all("127.0.0.1" in str(error) for error in errors), name
        assert monotonic() - start <= SLACK_S + 0.5, name
    backend.close()


# -- failover ----------------------------------------------------------------------------------------------------
def test_a_failover_is_followed(tmp_path: Path) -> None:
    """The master is killed; the Sentinel names the replica; nobody restarts the backend."""
    with sentinels(tmp_path) as (config, (master, replica)):
        backend = tracked(build(configure(config, part_bytes=4096), deadline=2.0))
        try:
            assert put(backend, 0, 1) == [None, None]
            with client(replica) as ask:
                poll(lambda: ask.dbsize() == 20)
            master.kill()
            assert outcome(lambda: put(backend, 2))
            poll(lambda: put(backend, 2) == [None])
            assert get(backend, 0, 1, 2) == [bytes(obj(n)) for n in range(3)]
            tracked(backend)
            assert backend.contains([key_of(n) for n in range(4)]) == [True, True, True, False]
        finally:
            backend.close()


def test_slots_that_move_are_followed_within_the_call(tmp_path: Path) -> None:
    with cluster(tmp_path) as (config, nodes):
        backend = tracked(build(configure(config, part_bytes=4096)))
        try:
            assert put(backend, *range(12)) == [None] * 12
            counts = []
            for node in nodes:
                with client(node) as ask:
                    counts.append(ask.dbsize())
            assert sum(counts) == 120 and all(counts), "objects are spread over the nodes, each whole on one"
            move(nodes, [key_of(100 + n) for n in range(20)])
            assert put(backend, *range(100, 120)) == [None] * 20
            assert get(backend, *range(100, 120)) == [bytes(obj(n)) for n in range(100, 120)]
            tracked(backend)
            assert backend.contains([key_of(n) for n in range(100, 121)]) == [True] * 20 + [False]
            leaving(nodes, key_of(500))
            assert get(backend, 500, 0) == [None, bytes(obj(0))], "a key on its way to another node is absent"
        finally:
            backend.close()


def leaving(nodes: list[Server], key: ChunkKey) -> None:
    """Begin to move the key's slot to the next node, and do not end."""
    clients = [client(node) for node in nodes]
    ids = [ask.execute_command("CLUSTER MYID").decode() for ask in clients]
    slot = clients[0].execute_command("CLUSTER KEYSLOT", key.hex())
    ports = [node.port for node in nodes]
    rows = raw(clients[0].execute_command("CLUSTER SLOTS"))
    source = ports.index(next(row[2][1] for row in rows if row[0] <= slot <= row[1]))
    target = (source + 1) % len(nodes)
    clients[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
    clients[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
    for ask in clients:
        ask.close()


def move(nodes: list[Server], chosen: list[ChunkKey]) -> None:
    """Give the slots of these keys, which must be empty, to the next node."""
    clients = [client(node) for node in nodes]
    ids = [ask.execute_command("CLUSTER MYID").decode() for ask in clients]
    for key in chosen:
        slot = clients[0].execute_command("CLUSTER KEYSLOT", key.hex())
        for source, ask in enumerate(clients):
            if ask.execute_command("CLUSTER COUNTKEYSINSLOT", slot):
                break
            ranges = ask.execute_command("CLUSTER SLOTS")
            if any(row[0] <= slot <= row[1] and row[2][1] == nodes[source].port for row in raw(ranges)):
                target = (source + 1) % len(nodes)
                for each in (clients[target], *clients):
                    each.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])
                break
    for ask in clients:
        ask.close()


def raw(ranges: Any) -> list[Any]:
    """Rows of CLUSTER SLOTS, whether or not redis-py made them a dict."""
    if isinstance(ranges, dict):
        return [[first, last, node["primary"]] for (first, last), node in ranges.items()]
    return list(ranges)


def test_a_dead_node_takes_only_its_own_keys(tmp_path: Path) -> None:
    with cluster(tmp_path) as (config, nodes):
        backend = tracked(build(configure(config, part_bytes=4096), deadline=1.0))
        try:
            everything = list(range(30))
            assert put(backend, *everything) == [None] * 30
            nodes[1].kill()
            untracked(backend)
            found = get(backend, *everything)
            lost = [n for n in everything if isinstance(found[n], Exception)]
            assert 0 < len(lost) < 30
            assert all(found[n] == bytes(obj(n)) for n in everything if n not in lost)
            assert backend.contains([key_of(n) for n in everything]) == [n not in lost for n in everything]
        finally:
            backend.close()


# -- two engines at one key ---------------------------------------------------------------------------------------
def once(monkeypatch: pytest.MonkeyPatch, where: Any, work: Any) -> None:
    """`work()` when a head was read, once."""
    real, todo = where.head_in, [work]

    def head_in(answer: object) -> Any:
        if todo:
            todo.pop()()
        return real(answer)

    monkeypatch.setattr(where, "head_in", head_in)


def test_what_is_written_while_remains_are_swept_leaves_no_pieces(
    server: Server, config: RedisConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = build(config), build(config)
    try:
        assert put(mine, 0) == [None]
        with client(server) as ask:
            ask.delete(next(name for name in names(ask, "lmcache:p:*")))
            assert len(names(ask, "*")) == 9
            once(monkeypatch, redis_backend, lambda: put(theirs, 0))
            assert get(mine, 0) == [None]
            whole = get(mine, 0) == [bytes(obj(0))]
            assert whole or names(ask, "*") == [], "pieces that live for ever and that no head names"
    finally:
        mine.close()
        theirs.close()


def test_a_put_that_found_its_pieces_evicted_takes_no_other_head_away(
    server: Server, config: RedisConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = build(config), build(config)
    try:
        with client(server) as ask:
            real, done = transfer.Writer._refuse, []

            def evict(write: Any) -> None:
                ask.delete(write.pieces[0])

            complete = transfer.Writer._complete

            def _complete(self: Any, write: Any) -> None:
                if not done:
                    done.append(1)
                    for lane in self._lanes:
                        lane.flush()
                        lane.read(0)
                    evict(write)
                complete(self, write)

            def _refuse(self: Any, write: Any) -> None:
                real(self, write)
                if len(done) == 1:
                    done.append(2)
                    assert put(theirs, 0) == [None]

            monkeypatch.setattr(transfer.Writer, "_complete", _complete)
            monkeypatch.setattr(transfer.Writer, "_refuse", _refuse)
            assert put(mine, 0) != [None]
            whole = get(theirs, 0) == [bytes(obj(0))]
            assert done == [1, 2] and (whole or names(ask, "*") == []), names(ask, "*")
    finally:
        mine.close()
        theirs.close()
