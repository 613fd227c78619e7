"""Batches of objects over one connection, streamed from and into the caller's buffers.

Writing: the pieces go first, with a short lifetime; when the server has taken them all, one transaction gives them
their final lifetime and writes the head. So a write that stops anywhere leaves nothing that is visible, and nothing
that stays. Reading: the head comes with the first piece, and the others are asked for while that one is arriving.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from lmcache_backends.redis_store.format import GENERATION_BYTES, HEAD_BYTES, Head, Names
from lmcache_backends.redis_store.wire import Link, Lost, ServerError, ServerFull, command
from lmcache_core.errors import BackendError, CorruptChunk
from lmcache_core.types import ChunkKey, MissReason

_WINDOW = 2 << 20
"""Bytes asked for ahead of what is being read: enough to keep the server busy, little enough for its memory."""

_AHEAD = 16 << 20
"""Bytes of values sent over one connection and not answered for: enough for any network, little enough to stop soon at
a refusal."""

PUT_LANES = 4
"""Most connections that one call of puts uses."""

OPEN = BackendError("the call ended before this key's turn")
"""Result of a key whose turn has not come."""

Refused = ServerError | ServerFull
_Frames = list[bytes | memoryview]


def read_head(name: bytes) -> bytes:
    return command(b"GETRANGE", name, b"0", b"%d" % (HEAD_BYTES - 1))


def head_in(answer: object) -> Head | None:
    """The head in an answer to `read_head`; None where there is none that can be used."""
    try:
        return Head.unpack(answer) if isinstance(answer, bytes) and answer else None
    except CorruptChunk:
        return None


def transaction(link: Link, commands: int) -> tuple[Refused | None, list[Any]]:
    """The replies to MULTI, `commands` commands and EXEC: the first error, or the answers of the commands."""
    replies = [link.reply() for _ in range(commands + 2)]
    answers = replies[-1]
    inner = answers if isinstance(answers, list) else []
    refused = next((reply for reply in [*replies, *inner] if isinstance(reply, (ServerError, ServerFull))), None)
    if refused is None and len(inner) != commands:
        raise Lost(f"{link.where}: unexpected answer to EXEC")
    return refused, inner


def unlink(link: Link, names: Names, found: Sequence[tuple[ChunkKey, Head | None]]) -> list[Refused | None]:
    """Delete objects whose heads were read; why not, for each.

    A head goes together with its pieces, so that nothing is left whenever this ends, and is read once more: if the
    object was written anew meanwhile, the new pieces have to go as well.
    """
    for key, head in found:
        name = names.head(key)
        pieces = names.pieces(key, head) if head else []
        link.send([command(b"MULTI"), read_head(name), command(b"UNLINK", name, *pieces), command(b"EXEC")])
    doomed: list[bytes] = []
    results: list[Refused | None] = []
    for key, head in found:
        refused, answers = transaction(link, 2)
        results.append(refused)
        last = head_in(answers[0]) if answers else None
        if last is not None and last != head and last.count:
            doomed.append(command(b"UNLINK", *names.pieces(key, last)))
    link.send(doomed)
    for _ in doomed:
        link.reply()
    return results


class Reader:
    """Reads some objects over one connection."""

    def __init__(
        self,
        link: Link,
        names: Names,
        part_bytes: int,
        keys: Sequence[ChunkKey],
        buffers: Sequence[memoryview],
        results: list[Any],
        broken: dict[int, Head],
    ) -> None:
        """`broken` is told the objects that lost a piece."""
        self._link = link
        self._names = names
        self._part_bytes = part_bytes
        self._keys = keys
        self._buffers = buffers
        self._results = results
        self._broken = broken
        self._todo: deque[tuple[int, int, bytes, int]] = deque()
        """What to ask for next: position, number of the piece, its name, bytes expected."""
        self._asked: deque[tuple[int, int, int]] = deque()
        self._flying = 0
        """Bytes asked for and not read."""
        self._heads: dict[int, Head] = {}
        self._missing: dict[int, int] = {}
        """Pieces still to come, by position."""

    def run(self, some: Sequence[int]) -> None:
        """Read the objects at these positions."""
        for i in some:
            self._todo.append((i, 0, self._names.head(self._keys[i]), min(self._part_bytes, len(self._buffers[i]))))
        while self._todo or self._asked:
            self._ask()
            i, number, expected = self._asked.popleft()
            self._flying -= expected
            length = self._link.bulk()
            if isinstance(length, int):
                (self._take if number else self._begin)(i, number, length)
            elif number:
                # Evicted, expired or deleted: without one piece there is no object.
                self._results[i] = length
                if length is None:
                    self._broken[i] = self._heads[i]
            else:
                self._results[i] = length

    def _ask(self) -> None:
        """Send requests until enough is under way."""
        out: list[bytes] = []
        while self._todo and (not self._asked or self._flying < _WINDOW):
            i, number, name, expected = self._todo.popleft()
            out.append(command(b"GET", name))
            self._asked.append((i, number, expected))
            self._flying += expected
        if out:
            self._link.send([b"".join(out)])

    def _begin(self, i: int, _: int, length: int) -> None:
        """The first value of an object: its head, then its first piece."""
        link, buffer = self._link, self._buffers[i]
        start = bytearray(min(length, HEAD_BYTES))
        link.body(memoryview(start))
        try:
            head = Head.unpack(bytes(start))
            if head.nbytes > len(buffer):
                raise CorruptChunk(MissReason.CORRUPT, f"{head.nbytes} bytes in Redis, room for {len(buffer)}")
            if head.first != length - HEAD_BYTES:
                raise CorruptChunk(MissReason.CORRUPT, f"a first value of {length} bytes in Redis")
        except CorruptChunk as error:
            self._results[i] = error
            link.skip(length - len(start))
            link.end()
            return
        pieces = self._names.pieces(self._keys[i], head)
        spans = (head.span(number) for number in range(1, head.count + 1))
        self._heads[i] = head
        self._missing[i] = len(pieces)
        self._todo.extendleft(
            reversed([(i, n, name, s.stop - s.start) for n, (name, s) in enumerate(zip(pieces, spans, strict=True), 1)])
        )
        self._ask()
        link.body(buffer[: head.first])
        link.end()
        self._finish(i)

    def _take(self, i: int, number: int, length: int) -> None:
        span = self._heads[i].span(number)
        if length == span.stop - span.start:
            self._link.body(self._buffers[i][span])
            self._missing[i] -= 1
        else:
            self._results[i] = CorruptChunk(MissReason.CORRUPT, f"a piece of {length} bytes in Redis")
            self._link.skip(length)
        self._link.end()
        self._finish(i)

    def _finish(self, i: int) -> None:
        if not self._missing[i] and self._results[i] is OPEN:
            self._results[i] = self._heads[i].nbytes


@dataclass(slots=True)
class _Write:
    """One object on its way."""

    i: int
    head: Head
    pieces: list[bytes]
    """Names of the pieces after the first."""
    old: Head | None = None
    """Head of what is overwritten."""
    refused: Refused | None = None
    unanswered: int = 0
    """Replies not read."""


class _Lane:
    """One of the connections that the pieces of a batch take in turn."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.flying = 0
        """Bytes of values sent and not answered for."""
        self.body: _Frames = []
        """What is to follow the command that was sent last."""
        self._unread: deque[tuple[_Write, int, Callable[[Link, _Write], None]]] = deque()
        """Replies to read, in order: whose, bytes of the value they answer for, and what reads them."""

    def send(
        self, write: _Write, start: bytes, body: _Frames, nbytes: int, read: Callable[[Link, _Write], None]
    ) -> None:
        """Send the start of a command; `body` follows with `flush`."""
        self.link.send([start])
        self.body = body
        self.flying += nbytes
        self._unread.append((write, nbytes, read))
        write.unanswered += 1

    def flush(self) -> None:
        if self.body:
            self.link.send(self.body)
            self.body = []

    def read(self, flying: int) -> None:
        """Read replies until at most so many bytes are under way."""
        while self._unread and (not flying or self.flying > flying):
            write, nbytes, read = self._unread.popleft()
            self.flying -= nbytes
            write.unanswered -= 1
            read(self.link, write)


class Writer:
    """Writes some objects to one server.

    Redis reads a value in place, without a copy of its own, when it has read the command in front of it by itself. So
    each piece's command is sent while the piece before it is on its way over another connection. With one connection
    everything goes over that, as much at a time as the network holds. Measured on loopback: half the server's time.
    """

    def __init__(
        self,
        links: Sequence[Link],
        names: Names,
        part_bytes: int,
        ttl: bytes | None,
        adopt: bytes,
        keys: Sequence[ChunkKey],
        buffers: Sequence[memoryview],
        results: list[Any],
    ) -> None:
        """`ttl`: milliseconds objects live, None for ever. `adopt`: milliseconds pieces live without a head."""
        self._lanes = [_Lane(link) for link in links]
        self._turn = cycle(self._lanes)
        self._last = self._lanes[0]
        """Where something was sent last."""
        self._names = names
        self._part_bytes = part_bytes
        self._ttl = ttl
        self._adopt = adopt
        self._keys = keys
        self._buffers = buffers
        self._results = results
        self._doomed: list[bytes] = []
        self._broken: list[tuple[ChunkKey, Head | None]] = []
        """Objects whose head was written after a piece had gone."""

    def run(self, some: Sequence[int]) -> None:
        """Write the objects at these positions: pieces of the next one are on their way while one is completed."""
        previous = None
        for i in some:
            write = self._begin(i)
            if previous is not None:
                self._complete(previous)
            previous = write
        if previous is not None:
            self._complete(previous)
        self._settle()
        # Pieces nobody will read: of what was refused, and of what somebody else wrote meanwhile.
        link = self._lanes[0].link
        link.send(self._doomed)
        for _ in self._doomed:
            link.reply()
        unlink(link, self._names, self._broken)

    def _send(
        self, write: _Write, start: bytes, body: _Frames, nbytes: int, read: Callable[[Link, _Write], None]
    ) -> None:
        lane = next(self._turn)
        if len(self._lanes) == 1:
            lane.flush()
            lane.read(_AHEAD)
        else:
            lane.read(0)
        lane.send(write, start, body, nbytes, read)
        if self._last is not lane:
            self._last.flush()
        self._last = lane

    def _settle(self) -> None:
        """Send what is left, and read all replies."""
        self._last.flush()
        for lane in self._lanes:
            lane.read(0)

    def _begin(self, i: int) -> _Write:
        """Send the pieces after the first."""
        buffer, key = self._buffers[i], self._keys[i]
        head = Head.plan(os.urandom(GENERATION_BYTES), len(buffer), self._part_bytes)
        write = _Write(i, head, self._names.pieces(key, head))
        self._send(write, read_head(self._names.head(key)), [], 0, self._read_old)
        for number, name in enumerate(write.pieces, 1):
            piece = buffer[head.span(number)]
            self._send(write, _set(name, len(piece), self._adopt), [piece, b"\r\n"], len(piece), self._read_piece)
            if write.refused is not None:
                break
        return write

    def _complete(self, write: _Write) -> None:
        """Once its pieces are there, write the head."""
        for lane in self._lanes:
            if not write.unanswered:
                break
            lane.flush()
            lane.read(0)
        if write.refused is not None:
            self._refuse(write)
            return
        key, pieces = self._keys[write.i], write.pieces
        name = self._names.head(key)
        keep = [
            command(b"PERSIST", piece) if self._ttl is None else command(b"PEXPIRE", piece, self._ttl)
            for piece in pieces
        ]
        first = self._buffers[write.i][write.head.span(0)]
        set_head = _set(name, HEAD_BYTES + len(first), self._ttl)
        before = b"".join([command(b"MULTI"), read_head(name), *keep, set_head])
        # What is overwritten goes in the same step, so that nothing is left of it whenever this ends.
        old = self._names.pieces(key, write.old) if write.old else []
        after = command(b"UNLINK", *old) if old else b""
        frames: _Frames = [write.head.pack(), first, b"\r\n" + after + command(b"EXEC")]
        self._send(write, before, frames, len(first), self._read_end)

    def _read_old(self, link: Link, write: _Write) -> None:
        reply = link.reply()
        write.old = head_in(reply)
        write.refused = reply if isinstance(reply, (ServerError, ServerFull)) else None

    def _read_piece(self, link: Link, write: _Write) -> None:
        reply = link.reply()
        if write.refused is None and isinstance(reply, (ServerError, ServerFull)):
            write.refused = reply

    def _read_end(self, link: Link, write: _Write) -> None:
        old, count = write.old, len(write.pieces)
        write.refused, answers = transaction(link, count + 2 + bool(old and old.count))
        key = self._keys[write.i]
        last = head_in(answers[0]) if write.refused is None else None
        if last is not None and last != old and last.count:
            # Somebody else wrote the object in between.
            self._doomed.append(command(b"UNLINK", *self._names.pieces(key, last)))
        if write.refused is None and 0 in answers[1 : 1 + count]:
            # The server is evicting what we are writing: a head without its pieces is of no use to anybody.
            write.refused = ServerFull(f"{link.where}: it evicted a piece before the object was complete")
            self._broken.append((key, write.head))
        if write.refused is not None:
            self._refuse(write)
            return
        self._results[write.i] = None

    def _refuse(self, write: _Write) -> None:
        self._results[write.i] = write.refused
        if write.pieces:
            self._doomed.append(command(b"UNLINK", *write.pieces))


def _set(name: bytes, nbytes: int, ttl: bytes | None) -> bytes:
    """The start of the command that stores a value of `nbytes` under a name; the value comes next."""
    words = (b"SET", name) if ttl is None else (b"PSETEX", name, ttl)
    before = b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])
    return b"*%d\r\n%b$%d\r\n" % (len(words) + 1, before, nbytes)
