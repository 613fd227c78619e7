"""The contract of `Serde` as tests. A plugin's author subclasses it and gives it one fixture:

    class TestMySerde(SerdeTests):
        @pytest.fixture
        def open_serde(self):
            return MyConfig().build

`open_serde(context)` builds a serde for chunks of a layout; it may raise `Unsupported` for some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lmcache_core.errors import CorruptChunk, Unsupported
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import Serde, SerdeContext
from lmcache_core.testing.concurrency import together
from lmcache_core.testing.contracts import ContractBroken, demand

OpenSerde = Callable[[SerdeContext], Serde]

_STARTS = (-1, 0, 256, 1 << 20)
"""Tokens before a chunk: not known, none, some, many."""
_GUARD = 64
_HEAD, _TAIL = 64, 16
"""Bytes of a blob that most likely hold lengths, flags and checksums."""
_FLOATS = {"float32": np.float32, "float16": np.float16}


class SerdeTests:
    """Run by pytest in subclasses that give `open_serde`. Attributes are limits that a subclass may change."""

    tolerance = 0.05
    """Lossy serdes: the largest root-mean-square error of a chunk, relative to the root mean square of its values."""
    layouts: Sequence[KVLayout] = (
        KVLayout("lknhd", "bfloat16", 2, 2, 2, 16, chunk_tokens=32, block_tokens=16),
        KVLayout("lknhd", "float16", 1, 2, 1, 64, chunk_tokens=16, block_tokens=16),
        KVLayout("lknhd", "float32", 3, 1, 1, 24, chunk_tokens=16, block_tokens=8),
        KVLayout("lknhd", "uint8", 1, 2, 1, 8, chunk_tokens=16, block_tokens=16),
    )
    """Layouts to try; at least one must be supported."""

    # -- tools -----------------------------------------------------------------------------------------------
    def serdes(self, open_serde: OpenSerde) -> list[tuple[SerdeContext, Serde]]:
        """A serde for each layout that it supports."""
        found: list[tuple[SerdeContext, Serde]] = []
        refusals: list[str] = []
        for layout in self.layouts:
            context = SerdeContext(layout=layout, chunk_bytes=layout.chunk_bytes)
            try:
                found.append((context, open_serde(context)))
            except Unsupported as error:
                refusals.append(str(error))
        demand(bool(found), "round trip", f"the serde supports none of the layouts of the tests: {refusals}")
        return found

    def encode(self, serde: Serde, chunks: Sequence[bytes], contract: str = "round trip") -> list[bytes]:
        """The blobs of chunks, encoded as one batch."""
        bound = serde.bound()
        rooms = [bytearray(b"\xdb" * (bound + _GUARD)) for _ in chunks]
        sources = [bytearray(chunk) for chunk in chunks]
        try:
            outs = [memoryview(room)[:bound] for room in rooms]
            sizes = serde.encode(
                [memoryview(s) for s in sources], outs, [_STARTS[i % len(_STARTS)] for i in range(len(chunks))]
            )
        except Exception as error:
            raise ContractBroken(contract, f"encode raised {type(error).__name__}: {error}") from error
        demand(len(sizes) == len(chunks), "encoded sizes", f"{len(sizes)} sizes for {len(chunks)} chunks")
        demand([bytes(s) for s in sources] == list(chunks), "inputs", "encode changed a chunk")
        for room, size in zip(rooms, sizes, strict=True):
            demand(0 < size <= bound, "bound", f"encode used {size} bytes, bound() is {bound}")
            demand(set(room[bound:]) == {0xDB}, "bound", f"encode wrote beyond the {bound} bytes of its buffer")
        return [bytes(room[:size]) for room, size in zip(rooms, sizes, strict=True)]

    def decode(self, serde: Serde, blobs: Sequence[bytes], nbytes: int, contract: str = "round trip") -> list[bytes]:
        """The chunks of blobs, decoded as one batch. Whatever but `CorruptChunk` is raised broke `contract`."""
        outcomes: list[list[bytes]] = []
        for poison in (b"\xdb", b"\x24"):
            rooms = [bytearray(poison * (nbytes + _GUARD)) for _ in blobs]
            sources = [bytearray(blob) for blob in blobs]
            try:
                serde.decode([memoryview(s) for s in sources], [memoryview(room)[:nbytes] for room in rooms])
            except CorruptChunk:
                raise
            except Exception as error:
                raise ContractBroken(contract, f"decode raised {type(error).__name__}: {error}") from error
            finally:
                inside = all(set(room[nbytes:]) == set(poison) for room in rooms)
                demand(inside, "filled buffers", "decode wrote beyond its buffer")
            demand([bytes(s) for s in sources] == list(blobs), "inputs", "decode changed a blob")
            outcomes.append([bytes(room[:nbytes]) for room in rooms])
        demand(outcomes[0] == outcomes[1], "filled buffers", "decode left bytes of its buffer as they were")
        return outcomes[0]

    def restored(self, serde: Serde, blobs: Sequence[bytes], nbytes: int) -> list[bytes]:
        """The chunks of blobs that encode made: none of them is corrupt."""
        try:
            return self.decode(serde, blobs, nbytes)
        except CorruptChunk as error:
            raise ContractBroken("encoded sizes", f"the bytes that encode speaks of do not decode: {error}") from error

    def demand_same(self, context: SerdeContext, serde: Serde, chunk: bytes, found: bytes, contract: str) -> None:
        """`found` is what `chunk` may decode to."""
        if serde.lossless:
            demand(found == chunk, contract, f"a lossless {context.layout.dtype} chunk came back with other bytes")
            return
        want, got = values(chunk, context.layout.dtype), values(found, context.layout.dtype)
        if want is None or got is None or not np.isfinite(want).all():
            return
        error = float(np.sqrt(np.mean((got - want) ** 2)))
        scale = float(np.sqrt(np.mean(want**2)))
        within = bool(np.isfinite(error)) and error <= self.tolerance * scale
        demand(
            within, contract, f"{context.layout.dtype}: error {error:.4g} of {scale:.4g}, more than {self.tolerance}"
        )

    # -- the contract ----------------------------------------------------------------------------------------
    def test_codec_has_a_name(self, open_serde: OpenSerde) -> None:
        for context, serde in self.serdes(open_serde):
            codec = serde.codec
            fits = codec.isascii() and 0 < len(codec) <= 32
            demand(fits, "codec name", f"{codec!r} is not 1 to 32 ASCII characters")
            again = open_serde(context).codec
            demand(again == codec, "codec name", f"the same settings give {codec!r} and {again!r}")

    def test_round_trip(self, open_serde: OpenSerde) -> None:
        """Values like a KV cache's, zeros, and for lossless serdes bytes that mean nothing."""
        for context, serde in self.serdes(open_serde):
            chunks = [*(kv_like(context, seed) for seed in range(3)), bytes(context.chunk_bytes)]
            if serde.lossless:
                chunks += [noise(context.chunk_bytes), b"\xff" * context.chunk_bytes]
            for chunk in chunks:
                (blob,) = self.encode(serde, [chunk])
                (found,) = self.restored(serde, [blob], context.chunk_bytes)
                self.demand_same(context, serde, chunk, found, "round trip")

    def test_values_of_every_scale(self, open_serde: OpenSerde) -> None:
        """Lossy serdes: how large K and V are differs by model, layer and channel."""
        for context, serde in self.serdes(open_serde):
            if serde.lossless or values(kv_like(context), context.layout.dtype) is None:
                continue
            for scale in (1 / 64, 64.0):
                chunk = kv_like(context, scale=scale)
                (blob,) = self.encode(serde, [chunk])
                (found,) = self.restored(serde, [blob], context.chunk_bytes)
                self.demand_same(context, serde, chunk, found, "round trip")

    def test_nothing_is_longer_than_the_bound(self, open_serde: OpenSerde) -> None:
        """Not even bytes that do not compress."""
        for context, serde in self.serdes(open_serde):
            bound = serde.bound()
            demand(bound > 0, "bound", f"bound() is {bound}")
            if serde.lossless:
                self.encode(serde, [noise(context.chunk_bytes, seed) for seed in range(8)], "bound")
            self.encode(serde, [bytes(context.chunk_bytes), kv_like(context)], "bound")
            demand(serde.bound() == bound, "bound", f"bound() was {bound} and is {serde.bound()}")

    def test_batches_keep_their_order(self, open_serde: OpenSerde) -> None:
        for context, serde in self.serdes(open_serde):
            chunks = [kv_like(context, seed) if seed % 2 else bytes(context.chunk_bytes) for seed in range(5)]
            blobs = self.encode(serde, chunks)
            for chunk, found in zip(chunks, self.restored(serde, blobs, context.chunk_bytes), strict=True):
                self.demand_same(context, serde, chunk, found, "order")
            demand(serde.encode([], [], []) == [], "encoded sizes", "encode([], [], []) is not []")
            serde.decode([], [])

    def test_a_blob_is_all_that_is_needed(self, open_serde: OpenSerde) -> None:
        """Decoded by another serde of the same settings, as after a restart, and after other chunks in any order."""
        for context, serde in self.serdes(open_serde):
            chunks = [kv_like(context, seed) for seed in range(4)]
            blobs = [self.encode(serde, [chunk])[0] for chunk in chunks]
            for other in (serde, open_serde(context)):
                for i in (2, 0, 3, 1):
                    (found,) = self.restored(other, [blobs[i]], context.chunk_bytes)
                    self.demand_same(context, serde, chunks[i], found, "encoded sizes")

    def test_garbage_is_refused(self, open_serde: OpenSerde) -> None:
        """A blob that is cut, extended or empty is a `CorruptChunk`. Noise may be one, or decode to something."""
        for context, serde in self.serdes(open_serde):
            (blob,) = self.encode(serde, [kv_like(context)])
            for garbage in (b"", blob[:-1], blob[: len(blob) // 2], blob[:1], blob + b"\0", blob + blob):
                try:
                    self.decode(serde, [garbage], context.chunk_bytes, "garbage")
                except CorruptChunk:
                    continue
                raise ContractBroken(
                    "garbage", f"{len(garbage)} bytes of a blob of {len(blob)} decoded without complaint"
                )
            for seed in range(8):
                try:
                    self.decode(serde, [noise(len(blob), seed)], context.chunk_bytes, "garbage")
                except CorruptChunk:
                    continue

    def test_nothing_in_a_blob_is_believed(self, open_serde: OpenSerde) -> None:
        """Each byte of its head and its tail is changed in turn: what else is noise may begin with the right words."""
        for context, serde in self.serdes(open_serde):
            (blob,) = self.encode(serde, [kv_like(context)])
            places = {*range(min(_HEAD, len(blob))), *range(max(len(blob) - _TAIL, 0), len(blob))}
            for at in sorted(places):
                for flip in (0x01, 0x80, 0xFF):
                    damaged = blob[:at] + bytes([blob[at] ^ flip]) + blob[at + 1 :]
                    try:
                        self.decode(serde, [damaged], context.chunk_bytes, "garbage")
                    except CorruptChunk:
                        continue

    def test_threads_do_not_disturb_each_other(self, open_serde: OpenSerde) -> None:
        """One serde serves all threads of a tier, both directions at once."""
        for context, serde in self.serdes(open_serde)[:2]:
            chunks = [kv_like(context, seed) for seed in range(4)]
            # In pairs, as below: of two equal chunks the second may come back otherwise, for it begins elsewhere.
            wanted = [self.restored(serde, self.encode(serde, [chunk] * 2), context.chunk_bytes) for chunk in chunks]

            def work(
                i: int,
                context: SerdeContext = context,
                serde: Serde = serde,
                chunks: list[bytes] = chunks,
                wanted: list[list[bytes]] = wanted,
            ) -> None:
                for _ in range(25):
                    try:
                        blobs = self.encode(serde, [chunks[i]] * 2)
                        found = self.decode(serde, blobs, context.chunk_bytes)
                    except (ContractBroken, CorruptChunk) as error:
                        raise ContractBroken("threads", f"beside other threads: {error}") from error
                    demand(found == wanted[i], "threads", "beside other threads a chunk comes back changed")

            together(work, len(chunks))


def kv_like(context: SerdeContext, seed: int = 0, scale: float = 1.0) -> bytes:
    """A chunk with values like those of a KV cache: around zero, in the layout's own type."""
    numbers = np.random.default_rng(seed).standard_normal(context.chunk_bytes).astype(np.float32) * np.float32(scale)
    dtype = context.layout.dtype
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()[: context.chunk_bytes]
    if dtype in _FLOATS:
        return numbers.astype(_FLOATS[dtype]).tobytes()[: context.chunk_bytes]
    return (numbers * 20).astype(np.int8).tobytes()[: context.chunk_bytes]


def noise(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that do not compress."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def values(chunk: bytes, dtype: str) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
    """The numbers of a chunk; None for types without a meaning here."""
    if dtype == "bfloat16":
        return (np.frombuffer(chunk, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in _FLOATS:
        return np.frombuffer(chunk, _FLOATS[dtype]).astype(np.float64)
    return None
