"""Settings of the Redis backend, its layout in the server, the protocol, and the list of stored keys."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from redis_servers import build, client, configure, poll, tracked, untracked

from lmcache_backends.redis_store import RedisConfig
from lmcache_backends.redis_store.format import HEAD_BYTES, MOST_PIECES, Head, Names
from lmcache_backends.redis_store.rig import RedisRig, Server
from lmcache_backends.redis_store.transfer import OPEN, Writer
from lmcache_backends.redis_store.wire import Late, Link, Lost, Push, ServerError, command
from lmcache_core.errors import BackendUnavailable, Closed, CorruptChunk
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import key_of

pytestmark = pytest.mark.timeout(60)


# -- settings ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings, says",
    [
        ({"url": "http://localhost"}, "must begin with redis://"),
        ({"url": "redis://"}, "redis://host:port/db"),
        ({"url": "redis://host:port"}, "redis://host:port/db"),
        ({"url": "redis://host/zero"}, "must be a number"),
        ({"url": "redis://host/?decode_responses=true"}, "unknown options decode_responses"),
        ({"url": "unix://"}, "needs a path"),
        ({"url": "unix:///run/redis.sock", "mode": "cluster"}, "mode `single`"),
        ({"mode": "sentinel"}, "needs service"),
        ({"service": "kv"}, "no meaning in mode `single`"),
        ({"hosts": ["other:6379"]}, "no meaning in mode `single`"),
        ({"mode": "cluster", "hosts": ["not a host"]}, "host:port"),
        ({"mode": "cluster", "url": "redis://host/1"}, "database 0 only"),
        ({"tls": {"check_hostname": False}}, "write rediss://"),
        ({"url": "redis://:canary-secret@host", "password": "canary-secret-2"}, "given twice"),
        ({"prefix": "a*"}, "letters, digits"),
        ({"prefix": "{a}"}, "letters, digits"),
        ({"prefix": ""}, "at least 1"),
        ({"part_bytes": "1KiB"}, "4096"),
        ({"ttl": 0}, "greater than 0"),
        ({"conections": 4}, "conections"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RedisConfig(**settings)
    assert says in str(caught.value)
    assert "canary" not in str(caught.value)


def test_where_settings_lead() -> None:
    plain = RedisConfig(url="redis://kv:p%40ss@[::1]:7000/2").target()
    assert plain.seeds == (("::1", 7000),) and plain.tls is None
    assert plain.login == {"username": "kv", "password": "p@ss", "db": 2}
    unix = RedisConfig(url="unix:///run/redis.sock?db=3", password=SecretStr("x")).target()
    assert unix.seeds == (("/run/redis.sock", 0),) and unix.login == {"password": "x", "db": 3}
    watched = RedisConfig(
        url="rediss://a", mode="sentinel", hosts=("b:1", "c", "a:26379"), service="kv", sentinel_password=SecretStr("y")
    ).target()
    assert watched.seeds == (("a", 26379), ("b", 1), ("c", 26379))
    assert watched.sentinel_login == {"password": "y"} and watched.tls is not None
    assert watched.tls["ssl_cert_reqs"] == "required" and watched.tls["ssl_check_hostname"] is True


def test_passwords_are_never_shown() -> None:
    for config in (
        RedisConfig(url="redis://user:canary-secret@localhost:1/0"),
        RedisConfig(url="redis://localhost:1", username="user", password=SecretStr("canary-secret")),
    ):
        with pytest.raises(BackendUnavailable) as caught:
            build(config, deadline=1.0)
        target = config.target()
        assert target.login["password"] == "canary-secret"
        for text in (repr(config), str(config), str(caught.value), repr(caught.value), repr(target)):
            assert "canary" not in text
        assert "localhost:1" in str(caught.value), "it tells where"


def test_a_wrong_password_is_told_at_start_up(tmp_path: Path) -> None:
    with Server(tmp_path, "--requirepass", "right") as server:
        for password in ("canary-secret", None):
            config = RedisConfig(url=f"redis://127.0.0.1:{server.port}", password=password)
            with pytest.raises(BackendUnavailable, match="password") as caught:
                build(config)
            assert "canary" not in str(caught.value)


# -- layout in the server ----------------------------------------------------------------------------------------
@given(st.integers(0, 1 << 40), st.integers(1, 1 << 28))
def test_pieces_cover_an_object_once(nbytes: int, part_bytes: int) -> None:
    part_bytes = max(part_bytes, nbytes // 1000 + 200)
    head = Head.plan(b"generatn", nbytes, part_bytes)
    assert Head.unpack(head.pack()) == head
    end = 0
    for number in range(head.count + 1):
        span = head.span(number)
        # What the server allocates must not be rounded up to the next size.
        assert span.start == end and span.stop - span.start + (0 if number else HEAD_BYTES) <= part_bytes - 32
        end = span.stop
    assert end == nbytes


def test_no_damage_to_a_head_goes_unseen() -> None:
    packed = Head.plan(b"generatn", 8 << 20, 1 << 20).pack()
    assert len(packed) == HEAD_BYTES
    for at in range(HEAD_BYTES):
        for bit in range(8):
            with pytest.raises(CorruptChunk):
                Head.unpack(packed[:at] + bytes([packed[at] ^ (1 << bit)]) + packed[at + 1 :])
    for size in range(HEAD_BYTES):
        with pytest.raises(CorruptChunk):
            Head.unpack(packed[:size])


def test_a_head_cannot_ask_for_a_list_that_fills_memory() -> None:
    assert Head.plan(bytes(8), 1 << 40, 1).count < MOST_PIECES
    assert Head.unpack(Head(bytes(8), MOST_PIECES + 1, 1, 1).pack()).count == MOST_PIECES
    with pytest.raises(CorruptChunk, match="sizes"):
        Head.unpack(Head(bytes(8), 1 << 62, 1, 1).pack())


def test_names() -> None:
    names = Names("lmcache:")
    key = key_of(1)
    head = Head.plan(bytes(8), 5 << 19, 1 << 20)
    name = names.head(key)
    tag = b"{" + key.hex().encode() + b"}"
    assert name == b"lmcache:o:" + tag and names.key(name) == key
    assert names.pieces(key, head) == [b"lmcache:p:" + tag + b":0000000000000000:%d" % n for n in (1, 2)]
    assert names.exists([key, key]) == 2 * command(b"EXISTS", name)
    for other in (b"", name[:-1], name + b"x", b"x" + name, names.heads + b"g" * 64 + b"}", names.pieces(key, head)[0]):
        assert names.key(other) is None


# -- how pieces are sent -----------------------------------------------------------------------------------------
class Recorded:
    """A connection that notes what is sent over it, and answers as a server would."""

    where = "nowhere"

    def __init__(self, number: int, sent: list[tuple[int, bytes]]) -> None:
        self.number = number
        self.sent = sent
        self.answers: deque[Any] = deque()

    def send(self, buffers: list[bytes | memoryview]) -> None:
        data = b"".join(map(bytes, buffers))
        self.sent.append((self.number, data))
        if data.startswith(b"*1\r\n$5\r\nMULTI"):
            pieces = data.count(b"PERSIST")
            self.answers += [b"OK", *[b"QUEUED"] * (pieces + 2), [None, *[1] * pieces, b"OK"]]
        elif data.startswith(b"*"):
            self.answers.append(None if b"GETRANGE" in data else b"OK")

    def reply(self) -> Any:
        return self.answers.popleft()


def test_a_command_goes_ahead_of_its_value_while_another_value_is_on_its_way() -> None:
    """A server that reads a command by itself reads the value in place, and makes no copy of it."""
    sent: list[tuple[int, bytes]] = []
    links: Any = [Recorded(number, sent) for number in range(3)]
    some = list(range(4))
    chunks = [memoryview(bytes([n]) * 20_000) for n in some]
    results: list[Any] = [OPEN] * 4
    Writer(links, Names("p:"), 4096, None, b"1000", [key_of(n) for n in some], chunks, results).run(some)
    assert results == [None] * 4 and not any(link.answers for link in links)
    values = [at for at, (_, data) in enumerate(sent) if len(data) > 2000]
    assert len(values) == 4 * 5
    for at in values[:-2]:  # nothing goes ahead of the last piece and the last head
        (before, start), (number, _) = sent[at - 1], sent[at]
        assert before != number and len(start) < 2000, "another connection's command, and no value with it"
        assert [data for lane, data in sent[:at] if lane == number][-1].endswith(b"\r\n")


# -- the protocol ------------------------------------------------------------------------------------------------
@pytest.fixture
def ends() -> Iterator[tuple[Link, socket.socket]]:
    """A connection, and the server's end of it."""
    ours, theirs = socket.socketpair()
    link = Link(SimpleNamespace(_sock=ours, disconnect=ours.close), ("test", 1))
    link.begin(monotonic() + 5)
    yield link, theirs
    link.close()
    theirs.close()


def test_replies(ends: tuple[Link, socket.socket]) -> None:
    link, server = ends
    server.sendall(
        b"+OK\r\n:-7\r\n$3\r\na\r\n\r\n$-1\r\n*-1\r\n_\r\n*2\r\n:1\r\n*1\r\n$0\r\n\r\n%1\r\n+a\r\n:1\r\n-ERR no\r\n"
    )
    assert [link.reply() for _ in range(8)] == [b"OK", -7, b"a\r\n", None, None, None, [1, [b""]], [b"a", 1]]
    error = link.reply()
    assert isinstance(error, ServerError) and error.code == "ERR" and link.codes == {"ERR"}
    assert link.quiet
    server.sendall(b">2\r\n+invalidate\r\n*1\r\n$1\r\nk\r\n")
    message = link.reply()
    assert isinstance(message, Push) and list(message) == [b"invalidate", [b"k"]]
    server.sendall(b":1\r\n:0\r\n-LOADING x\r\n")
    assert [answer if isinstance(answer, int) else answer.code for answer in link.integers(3)] == [1, 0, "LOADING"]


def test_a_value_lands_in_the_buffer(ends: tuple[Link, socket.socket]) -> None:
    link, server = ends
    server.sendall(b"$5\r\nhello\r\n$9\r\nforgotten\r\n$-1\r\n")
    buffer = bytearray(b"........")
    assert link.bulk() == 5
    link.body(memoryview(buffer)[1:6])
    link.end()
    assert buffer == b".hello.."
    assert link.bulk() == 9
    link.skip(9)
    link.end()
    assert link.bulk() is None and link.quiet


@settings(max_examples=300)
@given(st.binary(max_size=60), st.sampled_from(["reply", "bulk", "integers", "end"]))
def test_whatever_a_server_says(said: bytes, method: str) -> None:
    """Is an answer, or an error of ours; nothing else, and no waiting."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Link(SimpleNamespace(_sock=ours, disconnect=ours.close), ("test", 1))
        link.begin(monotonic() + 5)
        theirs.sendall(said + b"\r\n")
        theirs.shutdown(socket.SHUT_WR)
        with suppress(Lost):
            getattr(link, method)(*([2] if method == "integers" else []))


def test_time_is_over(ends: tuple[Link, socket.socket]) -> None:
    link, server = ends
    server.sendall(b"$100\r\nhalf of it")
    assert link.bulk() == 100
    for wait in (
        lambda: link.body(memoryview(bytearray(100))),
        link.reply,
        lambda: link.send([bytes(8 << 20)]),
    ):
        start = monotonic()
        link.begin(start + 0.05)
        with pytest.raises(Late):
            wait()
        assert 0.04 <= monotonic() - start < 0.2


def test_a_large_send_arrives_whole(ends: tuple[Link, socket.socket]) -> None:
    """More buffers than one system call takes, and more bytes than a socket holds."""
    link, server = ends
    buffers = [bytes([n % 251]) * (n % 700 + 1) for n in range(3000)]
    expected = b"".join(buffers)
    received = bytearray()
    server.setblocking(False)

    def drain() -> bool:
        with suppress(BlockingIOError):
            received.extend(server.recv(1 << 20))
        return len(received) == len(expected)

    sender = threading.Thread(target=link.send, args=(buffers,))
    sender.start()
    poll(drain)
    sender.join()
    assert received == expected


# -- the list of stored keys -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def config(server: Server) -> RedisConfig:
    with client(server) as ask:
        ask.flushall()
    return RedisConfig(url=f"redis://127.0.0.1:{server.port}", part_bytes=4096)


def test_two_engines_see_each_other(config: RedisConfig, server: Server) -> None:
    """Stores, deletions, expiry and eviction by others arrive; nobody asks the server about keys."""
    first, second = tracked(build(config)), tracked(build(config))
    obj = aligned(10_000)
    some = [key_of(n) for n in range(50)]
    try:
        assert first.put_from(some, [obj] * 50) == [None] * 50
        assert first.contains(some) == [True] * 50, "its own stores at once"
        poll(lambda: second.contains(some) == [True] * 50)
        second.delete(some[:10])
        assert second.contains(some) == [False] * 10 + [True] * 40
        poll(lambda: first.contains(some) == [False] * 10 + [True] * 40)
        with client(server) as ask:
            names = Names("lmcache:")
            ask.pexpire(names.head(some[10]), 1)
            ask.delete(names.head(some[11]))
            poll(lambda: ask.exists(names.head(some[10])) == 0)
            poll(lambda: first.contains(some) == second.contains(some) == [False] * 12 + [True] * 38)
            before = ask.info("commandstats")["cmdstat_exists"]["calls"]
            for _ in range(100):
                first.contains(some)
            assert ask.info("commandstats")["cmdstat_exists"]["calls"] == before
            assert first.contains_is_local
        second.clear()
        poll(lambda: not any(first.contains(some)))
        assert first.presence is not None and first.presence.why == ""
    finally:
        first.close()
        second.close()


def test_a_list_that_would_grow_too_long_is_given_up(config: RedisConfig) -> None:
    backend = tracked(build(configure(config, track_keys=20)))
    some = [key_of(n) for n in range(30)]
    backend.put_from(some, [aligned(5000)] * 30)
    poll(lambda: not backend.contains_is_local)
    assert backend.presence is not None
    poll(lambda: backend.presence is not None and "track_keys" in backend.presence.why)
    assert untracked(backend).contains(some) == [True] * 30
    backend.close()


def test_a_list_is_filled_with_what_is_there(config: RedisConfig) -> None:
    writer = build(configure(config, track=False, timeout="20s"), deadline=30.0)
    some = [key_of(n) for n in range(3000)]
    assert writer.put_from(some, [memoryview(bytes(100))] * 3000) == [None] * 3000
    reader = tracked(build(config))
    assert reader.contains([*some, key_of(5000)]) == [True] * 3000 + [False]
    start = monotonic()
    reader.contains(some[:1000])
    assert monotonic() - start < 0.05, "it asks nobody"
    reader.close()
    writer.close()


def test_a_closed_backend_says_so(config: RedisConfig) -> None:
    backend = tracked(build(config))
    backend.close()
    backend.close()
    for call in (
        lambda: backend.contains([key_of(0)]),
        lambda: backend.get_into([key_of(0)], [aligned(4096)]),
        lambda: backend.put_from([key_of(0)], [aligned(4096)]),
        lambda: backend.delete([key_of(0)]),
        backend.clear,
    ):
        with pytest.raises(Closed):
            call()


def test_clearing_leaves_what_others_keep(config: RedisConfig, server: Server) -> None:
    first = build(config)
    second = build(configure(config, prefix="lmcache2:"))
    with client(server) as ask:
        ask.set("lmcach", "x")
        for backend in (first, second):
            assert backend.put_from([key_of(0)], [aligned(50_000)]) == [None]
        first.clear()
        assert first.contains([key_of(0)]) == [False] and second.contains([key_of(0)]) == [True]
        assert ask.exists("lmcach") == 1
    first.close()
    second.close()


# -- the rig -----------------------------------------------------------------------------------------------------
def test_the_rig_measures_its_baseline(tmp_path: Path) -> None:
    with RedisRig().start(tmp_path) as medium:
        assert medium.baseline is not None and "redis-benchmark" in medium.baseline.name
        assert medium.baseline.put(8 << 20, 0.3) > 1e7 and medium.baseline.get(8 << 20, 0.3) > 1e7


def test_commands() -> None:
    assert command(b"GET", b"a\r\n") == b"*2\r\n$3\r\nGET\r\n$3\r\na\r\n\r\n"
