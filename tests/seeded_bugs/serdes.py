"""Serdes with one bug each, over a correct one: a length, then the chunk's bytes, each exclusive-or'd with 0x5A."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import sleep

import numpy as np

from lmcache_core.errors import CorruptChunk
from lmcache_core.protocols import Serde, SerdeContext
from lmcache_core.types import MissReason

_HEAD = 4


class Correct(Serde):
    """The base."""

    def __init__(self, context: SerdeContext) -> None:
        self.nbytes = context.chunk_bytes

    @property
    def codec(self) -> str:
        return "seeded/1"

    def bound(self) -> int:
        return _HEAD + self.nbytes

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        return [self.encode_one(bytes(chunk), room) for chunk, room in zip(chunks, out, strict=True)]

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        for blob, room in zip(blobs, out, strict=True):
            self.decode_one(bytes(blob), room)

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        room[:_HEAD] = len(chunk).to_bytes(_HEAD, "little")
        room[_HEAD : _HEAD + len(chunk)] = self.mixed(chunk)
        return _HEAD + len(chunk)

    def decode_one(self, blob: bytes, room: memoryview) -> None:
        self.check(blob, len(room))
        room[:] = self.mixed(blob[_HEAD:])

    def check(self, blob: bytes, nbytes: int) -> None:
        if len(blob) != _HEAD + nbytes or int.from_bytes(blob[:_HEAD], "little") != nbytes:
            raise CorruptChunk(MissReason.CORRUPT, f"{len(blob)} bytes for a chunk of {nbytes}")

    @staticmethod
    def mixed(data: bytes) -> bytes:
        return (np.frombuffer(data, np.uint8) ^ 0x5A).tobytes()


class ExceedsBound(Correct):
    """Forgets its head in the bound; and the head is written behind it."""

    def bound(self) -> int:
        return self.nbytes

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        room[:] = self.mixed(chunk)
        return _HEAD + len(chunk)

    def check(self, blob: bytes, nbytes: int) -> None:
        pass


class BoundGrows(Correct):
    """Learns its bound from what it sees."""

    seen = 0

    def bound(self) -> int:
        return _HEAD + self.nbytes + self.seen

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        self.seen += 1
        return super().encode_one(chunk, room)


class SizeTooSmall(Correct):
    """Forgets the head in the sizes that it returns."""

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        return super().encode_one(chunk, room) - _HEAD


class LeavesTheTail(Correct):
    """Decodes whole blocks of 4 KiB."""

    def decode_one(self, blob: bytes, room: memoryview) -> None:
        self.check(blob, len(room))
        whole = len(room) // 4096 * 4096 if len(room) % 4096 else len(room) - 1
        room[:whole] = self.mixed(blob[_HEAD : _HEAD + whole])


class AcceptsGarbage(Correct):
    """Decodes what is there, and pads with zeros."""

    def check(self, blob: bytes, nbytes: int) -> None:
        pass

    def decode_one(self, blob: bytes, room: memoryview) -> None:
        room[:] = self.mixed(blob[_HEAD:])[: len(room)].ljust(len(room), b"\0")


class BareErrors(Correct):
    """Raises whatever comes of a wrong length."""

    def check(self, blob: bytes, nbytes: int) -> None:
        pass


class BelievesItsHead(Correct):
    """Fills as much of the buffer as the blob says."""

    def check(self, blob: bytes, nbytes: int) -> None:
        if len(blob) != _HEAD + nbytes:
            raise CorruptChunk(MissReason.CORRUPT, f"{len(blob)} bytes for a chunk of {nbytes}")

    def decode_one(self, blob: bytes, room: memoryview) -> None:
        self.check(blob, len(room))
        nbytes = int.from_bytes(blob[:_HEAD], "little")
        room[:nbytes] = self.mixed(blob[_HEAD : _HEAD + nbytes])


class FlagInRange(Correct):
    """Looks at the first words of the blob, and looks its flag up in a table."""

    words = b"SEEDED\x01"

    def bound(self) -> int:
        return len(self.words) + 1 + self.nbytes

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        blob = self.words + b"\0" + self.mixed(chunk)
        room[: len(blob)] = blob
        return len(blob)

    def decode_one(self, blob: bytes, room: memoryview) -> None:
        head = len(self.words)
        if len(blob) != head + 1 + len(room) or not blob.startswith(self.words):
            raise CorruptChunk(MissReason.CORRUPT, "not one of ours")
        body = blob[head + 1 :]
        room[:] = {0: self.mixed(body), 1: body}[blob[head]]


class KeepsState(Correct):
    """Uses one scratch buffer for all threads."""

    scratch = b""

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        self.scratch = self.mixed(chunk)
        sleep(0.0001)
        room[:_HEAD] = len(chunk).to_bytes(_HEAD, "little")
        room[_HEAD : _HEAD + len(chunk)] = self.scratch
        return _HEAD + len(chunk)


class NeedsItsOwnPast(Correct):
    """Keeps what it encoded in a table, and stores where in the table it is."""

    def __init__(self, context: SerdeContext) -> None:
        super().__init__(context)
        self.table: list[bytes] = []

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        self.table.append(chunk)
        room[:_HEAD] = len(self.table).to_bytes(_HEAD, "little")
        return _HEAD

    def decode_one(self, blob: bytes, room: memoryview) -> None:
        number = int.from_bytes(blob, "little")
        if len(blob) != _HEAD or not 0 < number <= len(self.table):
            raise CorruptChunk(MissReason.CORRUPT, "not in the table")
        room[:] = self.table[number - 1]


class Lossy(Correct):
    """Says that it is lossless, and drops the lowest bit."""

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        return super().encode_one((np.frombuffer(chunk, np.uint8) & 0xFE).tobytes(), room)


class TooLossy(Lossy):
    """Says that it is lossy, and drops exponents."""

    lossless = False

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        return Correct.encode_one(self, (np.frombuffer(chunk, np.uint8) & 0x0F).tobytes(), room)


class Clips(Correct):
    """Lossy: cuts float32 beyond 8 off, which is enough for values of scale 1."""

    lossless = False

    def __init__(self, context: SerdeContext) -> None:
        super().__init__(context)
        self.clips = context.layout.dtype == "float32"

    def encode_one(self, chunk: bytes, room: memoryview) -> int:
        return super().encode_one(np.frombuffer(chunk, "<f4").clip(-8, 8).tobytes() if self.clips else chunk, room)


class Backwards(Correct):
    """Decodes a batch last to first, into buffers first to last."""

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        super().decode(list(blobs)[::-1], out)


class ChangesChunks(Correct):
    """Mixes in place."""

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        sizes = super().encode(chunks, out, starts)
        for chunk in chunks:
            chunk[:] = self.mixed(bytes(chunk))
        return sizes


class LongName(Correct):
    @property
    def codec(self) -> str:
        return "seeded/" + "1" * 40


class NameOfTheObject(Correct):
    @property
    def codec(self) -> str:
        return f"seeded/{id(self)}"


@dataclass(frozen=True)
class Bug:
    """A serde with a bug."""

    build: Callable[[SerdeContext], Serde]
    contract: str
    """The contract it breaks."""


BUGS = {
    "exceeds bound": Bug(ExceedsBound, "bound"),
    "bound grows": Bug(BoundGrows, "bound"),
    "size too small": Bug(SizeTooSmall, "encoded sizes"),
    "needs its own past": Bug(NeedsItsOwnPast, "encoded sizes"),
    "leaves the tail": Bug(LeavesTheTail, "filled buffers"),
    "accepts garbage": Bug(AcceptsGarbage, "garbage"),
    "bare errors": Bug(BareErrors, "garbage"),
    "believes its head": Bug(BelievesItsHead, "filled buffers"),
    "flag in range": Bug(FlagInRange, "garbage"),
    "keeps state": Bug(KeepsState, "threads"),
    "lossy": Bug(Lossy, "round trip"),
    "too lossy": Bug(TooLossy, "round trip"),
    "clips": Bug(Clips, "round trip"),
    "backwards": Bug(Backwards, "order"),
    "changes chunks": Bug(ChangesChunks, "inputs"),
    "long name": Bug(LongName, "codec name"),
    "name of the object": Bug(NameOfTheObject, "codec name"),
}
