"""The codec on a GPU: bytes and values equal to the reference's. `make gpu` runs these."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from codec_cases import any_turned, tampered
from cuda_cases import CASES, Case
from test_cuda_codec import resealed

from lmcache_serde.cachegen import cuda, reference
from lmcache_serde.cachegen.format import AUTO, AUX, LOSSLESS, CodecError, parse
from lmcache_serde.cachegen.profile import Profile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda.why_not()), reason=cuda.why_not())]


class Codec:
    """The codec on device memory of torch."""

    def __init__(self, case: Case) -> None:
        self.torch: Any = pytest.importorskip("torch")
        self.case, self.shape = case, case.shape

    def _room(self, nbytes: int) -> Any:
        return self.torch.full((max(nbytes, 1),), 0xEE, dtype=self.torch.uint8, device="cuda")

    def _rows(self, arrays: list[np.ndarray], room: int) -> tuple[Any, np.ndarray]:
        """The arrays on the device, `room` bytes apart (a multiple of 16), and their addresses."""
        memory = self._room(len(arrays) * room)
        for i, array in enumerate(arrays):
            memory[i * room : i * room + array.size] = self.torch.from_numpy(array.copy()).cuda()
        return memory, memory.data_ptr() + np.arange(len(arrays)) * room

    @property
    def stream(self) -> int:
        return int(self.torch.cuda.current_stream().cuda_stream)

    def _lend(self, profile: Profile | None) -> tuple[Profile, int] | None:
        if profile is None:
            return None
        self._image = self.torch.from_numpy(cuda.profile_image(profile)).cuda()
        return profile, self._image.data_ptr()

    def encode(
        self, chunks: list[np.ndarray], profile: Profile | None = None, starts: tuple[int, ...] = ()
    ) -> tuple[list[np.ndarray], list[int]]:
        count, room = len(chunks), (self.shape.bound + AUX + 15) // 16 * 16
        _source, sources = self._rows(chunks, (self.shape.nbytes + 15) // 16 * 16)
        out = self._room(count * room)
        sizes = self.torch.zeros(count, dtype=self.torch.int64).pin_memory()
        raw = self.torch.zeros(count, dtype=self.torch.int32).pin_memory()
        scratch = self._room(cuda.scratch_bytes(self.shape, count, self.case.coding, profile))
        outs = out.data_ptr() + np.arange(count) * room
        given = (scratch.data_ptr(), scratch.numel()), sizes.data_ptr(), raw.data_ptr(), self.stream
        lent = self._lend(profile)
        cuda.encode(self.shape, self.case.coding, sources, outs, *given, profile=lent, starts=starts)
        self.torch.cuda.synchronize()
        blobs = out.cpu().numpy().reshape(count, room)
        assert all((blob[size:] == 0xEE).all() for blob, size in zip(blobs, sizes.tolist(), strict=True))
        return [blob[:size].copy() for blob, size in zip(blobs, sizes.tolist(), strict=True)], raw.tolist()

    def decode(
        self, blobs: list[np.ndarray], profile: Profile | None = None, **options: int
    ) -> tuple[np.ndarray, list[int]]:
        """Chunks `[count, bytes]`, and what was wrong with each."""
        nbytes = options.get("layers", self.shape.layers) * self.shape.planes * self.shape.row_bytes
        room = (nbytes + 15) // 16 * 16
        _source, sources = self._rows(blobs, (max(blob.size for blob in blobs) + 31) // 16 * 16)
        out = self._room(len(blobs) * room)
        status = self.torch.full((len(blobs),), 77, dtype=self.torch.int32, device="cuda")
        scratch = self._room(cuda.scratch_bytes(self.shape, len(blobs), profile=profile))
        outs = out.data_ptr() + np.arange(len(blobs)) * room
        given = [blob.size for blob in blobs], outs, (scratch.data_ptr(), scratch.numel()), status.data_ptr()
        cuda.decode(self.shape, sources, *given, self.stream, profile=self._lend(profile), **options)
        self.torch.cuda.synchronize()
        return out.cpu().numpy().reshape(len(blobs), room)[:, :nbytes], status.tolist()


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_values_equal_the_reference(name: str) -> None:
    case = CASES[name]
    codec = Codec(case)
    chunks = [case.chunk(seed) for seed in range(3)]
    expected = [reference.encode(case.shape, case.coding, chunk) for chunk in chunks]
    blobs, raw = codec.encode(chunks)
    for i, (blob, right) in enumerate(zip(blobs, expected, strict=True)):
        assert np.array_equal(blob, right)
        modes = right[parse(right, case.shape).starts[:-1] + 10]
        assert raw[i] == ((modes == 0) & (case.coding.modes != 0)).sum()
    decoded, status = codec.decode(expected)
    assert status == [0, 0, 0]
    for chunk, blob in zip(decoded, expected, strict=True):
        assert np.array_equal(chunk, reference.decode(case.shape, blob))


@pytest.mark.parametrize("ctas", [0, 3])
def test_many_chunks_and_single_layers(ctas: int) -> None:
    case = CASES["usual"]
    codec = Codec(case)
    chunks = [case.chunk(seed) for seed in range(70)]  # more than one launch takes
    blobs, _ = codec.encode(chunks)
    assert all(np.array_equal(blobs[i], reference.encode(case.shape, case.coding, chunks[i])) for i in (0, 63, 64, 69))
    decoded, status = codec.decode(blobs, ctas=ctas)
    assert not any(status)
    for i in (0, 63, 64, 69):
        assert np.array_equal(decoded[i], reference.decode(case.shape, blobs[i]))
    for layer in range(case.shape.layers):
        single, status = codec.decode(blobs[:2], first_layer=layer, layers=1, ctas=ctas)
        assert not any(status)
        assert np.array_equal(single, decoded[:2].reshape(2, case.shape.layers, -1)[:, layer])


@pytest.mark.parametrize("name", ["usual", "bfloat16 mode 3", "random bits", "single tokens"])
def test_damage_is_refused_where_the_reference_refuses_it(name: str) -> None:
    case = CASES[name]
    codec = Codec(case)
    blob = reference.encode(case.shape, case.coding, case.chunk())
    rng = np.random.default_rng(0)
    heads = np.r_[0 : 64 + 4 * case.shape.rows, [s + i for s in parse(blob, case.shape).starts[:-1] for i in range(48)]]
    damaged = []
    for i, place in enumerate([*rng.choice(heads, 60), *rng.integers(0, blob.size, 60)]):
        one = blob.copy()
        one[place] ^= 1 << rng.integers(8)
        damaged.append(resealed(one, case.shape) if i % 2 else one)
    damaged += [blob[:length].copy() for length in (0, 63, 64, blob.size // 2 & ~15, blob.size - 16)]
    decoded, status = codec.decode(damaged)
    for one, chunk, wrong in zip(damaged, decoded, status, strict=True):
        try:
            right = reference.decode(case.shape, one)
        except CodecError:
            assert wrong < 0
        else:
            assert wrong == 0 and np.array_equal(chunk, right)


def test_transformed_chunks_are_coded_as_the_reference_does() -> None:
    rng = np.random.default_rng(2)
    for _ in range(12):
        shape, how, data, profile, start = any_turned(rng)
        codec = Codec(Case(shape, how))
        blob = reference.encode(shape, how, data, profile, start)
        if how.n_raw != AUTO and LOSSLESS not in how.modes:
            coded, _ = codec.encode([data, data], profile, (start, start))
            assert all(np.array_equal(one, blob) for one in coded)
        blobs = [blob, reference.encode(shape, how, data), *(tampered(rng, blob, shape, profile) for _ in range(6))]
        decoded, status = codec.decode(blobs, profile=profile)
        for one, chunk, wrong in zip(blobs, decoded, status, strict=True):
            try:
                right = reference.decode(shape, one, profile=profile)
            except CodecError:
                assert wrong < 0
            else:
                assert wrong == 0 and np.array_equal(chunk, right)
