"""Serde `cachegen`: the kit at every level, pages of an engine, refusals, and the commands that measure it."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lmcache_core import _native
from lmcache_core.cli import bench_codec, codec_cmd, codec_kv, codec_quality
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.errors import CorruptChunk, Unsupported
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import Ladder, SerdeContext
from lmcache_core.testing.serde import OpenSerde, SerdeTests, kv_like, values
from lmcache_serde.cachegen import LEVELS, CacheGen, CacheGenConfig, Level, transform
from lmcache_serde.cachegen.profile import Profile, calibrate

pytestmark = pytest.mark.timeout(60)

LAYOUT = KVLayout("lknhd", "bfloat16", 2, 2, 2, 16, chunk_tokens=32, block_tokens=16)


class TestLossless(SerdeTests):
    @pytest.fixture
    def open_serde(self) -> OpenSerde:
        return CacheGenConfig(level="lossless").build


class TestBalanced(SerdeTests):
    tolerance = 0.2

    @pytest.fixture
    def open_serde(self) -> OpenSerde:
        return CacheGenConfig().build


class TestNear(SerdeTests):
    tolerance = 0.03

    @pytest.fixture
    def open_serde(self) -> OpenSerde:
        return CacheGenConfig(level="near").build


def serde(layout: KVLayout = LAYOUT, level: Level = "balanced") -> CacheGen:
    return CacheGen(layout, level)


def encode(serde: CacheGen, chunk: bytes, start: int = -1) -> bytes:
    room = bytearray(serde.bound())
    (size,) = serde.encode([memoryview(chunk)], [memoryview(room)], [start])
    return bytes(room[:size])


def decode(serde: CacheGen, blob: bytes) -> bytes:
    room = bytearray(serde.shape.nbytes)
    serde.decode([memoryview(blob)], [memoryview(room)])
    return bytes(room)


def context(layout: KVLayout) -> SerdeContext:
    return SerdeContext(layout, layout.chunk_bytes)


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_as_good_as_its_name(level: Level) -> None:
    """Better levels take more and lose less; each is named in its objects."""
    chunk = kv_like(context(LAYOUT))
    want = values(chunk, "bfloat16")
    assert want is not None
    sizes, errors = [], []
    for name in LEVELS:
        one = serde(level=name)
        blob = encode(one, chunk)
        got = values(decode(one, blob), "bfloat16")
        assert got is not None
        sizes.append(len(blob))
        errors.append(float(np.sqrt(np.mean((got - want) ** 2))))
    at = list(LEVELS).index(level)
    assert serde(level=level).codec == f"cachegen/1/{level}"
    assert serde(level=level).lossless == (level == "lossless") == (errors[at] == 0)
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)


def test_the_first_tokens_of_a_sequence_are_kept_exactly() -> None:
    chunk = kv_like(context(LAYOUT))
    want = np.frombuffer(chunk, "<u2").reshape(2, 2, 32, 32)
    for start, exact in ((0, 2), (256, 0)):
        got = np.frombuffer(decode(serde(), encode(serde(), chunk, start)), "<u2").reshape(want.shape)
        same = (got == want).all(axis=(0, 1, 3))
        assert same[:exact].all() and not same[exact:].any()


def test_rows_that_a_level_cannot_hold_are_kept_and_counted() -> None:
    numbers = np.frombuffer(kv_like(context(LAYOUT)), "<u2").copy().reshape(2, 2, 32, 32)
    numbers[1, 0, 5, 7] = 0x7F80  # infinity, in the K of layer 1
    one = serde()
    back = np.frombuffer(decode(one, encode(one, numbers.tobytes(), 256)), "<u2").reshape(numbers.shape)
    assert (back[1, 0] == numbers[1, 0]).all() and (back[0] != numbers[0]).any()
    assert one.refused_rows == 1


def test_what_it_cannot_code_is_refused_when_it_is_built() -> None:
    wrong = [
        (replace(LAYOUT, dtype="int8"), "int8"),
        (replace(LAYOUT, chunk_tokens=2048), "tokens"),
        (replace(LAYOUT, order="pages", packing="vllm-cuda/1/NHD/x/0"), "only the pages of vLLM on CPU"),
        (replace(LAYOUT, order="pages", packing="vllm-cpu/1/LAYOUT/neon/01234567"), "no known packing 'neon'"),
        (replace(LAYOUT, order="pages", packing="vllm-cpu/1/LAYOUT/vec/01234567"), "packs its pages in another way"),
        (replace(LAYOUT, order="pages", packing="vllm-cpu/1/LAYOUT/vec/0", page_bytes=8192), "padded"),
    ]
    for layout, reason in wrong:
        with pytest.raises(Unsupported, match=reason):
            CacheGenConfig().build(context(layout))


def test_adaptive_is_a_ladder_of_levels() -> None:
    ladder = CacheGenConfig(level="adaptive", levels=("near", "small"), target=0.5).build(context(LAYOUT))
    assert isinstance(ladder, Ladder)
    assert [rung.codec for rung in ladder.rungs] == ["cachegen/1/near", "cachegen/1/small"]
    assert ladder.parts == (1 / 2.8, 1 / 7.2) and ladder.target == 0.5 and not ladder.lossless
    with pytest.raises(Unsupported, match="order"):
        CacheGenConfig(level="adaptive", levels=("small", "near")).build(context(LAYOUT))


@pytest.mark.parametrize(
    "isa,dtype,mark",
    [
        ("amx", "bfloat16", "ec025d68"),
        ("vec", "bfloat16", "00af6ea9"),
        ("vec", "float32", "043d84ff"),
        ("vec16", "float16", "1775d655"),
    ],
)
def test_pages_of_vllm_become_the_blobs_of_canonical_chunks(isa: str, dtype: str, mark: str) -> None:
    """The marks are what vLLM 0.32's own kernel gave; that its packing is the geometry's is tested in test_copies."""
    plain = KVLayout("lknhd", dtype, 2, 2, 3, 64, chunk_tokens=64, block_tokens=32)
    paged = replace(plain, order="pages", packing=f"vllm-cpu/1/LAYOUT/{isa}/{mark}")
    chunk = np.frombuffer(kv_like(context(plain)), np.uint8)
    pages = np.zeros_like(chunk)
    bases = np.arange(2) * plain.blocks * plain.block_bytes + pages.ctypes.data
    PagedKV(bases, PageGeometry.vllm_cpu(plain, isa), 2, owner=pages).scatter([0, 1], [chunk.ctypes.data])
    assert not np.array_equal(pages, chunk)
    blob = encode(serde(paged, "lossless"), pages.tobytes())
    assert blob == encode(serde(plain, "lossless"), chunk.tobytes())
    assert decode(serde(paged, "lossless"), blob) == pages.tobytes()


# -- profiles --------------------------------------------------------------------------------------------------
@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile of correlated values in the geometry of `LAYOUT`."""
    path = tmp_path / "model.profile"
    calibrate([correlated(seed, 260) for seed in range(2)], 2, 1 / 2.0 ** np.arange(3, 11)).save(path)
    return path


def correlated(seed: int, tokens: int) -> NDArray[np.float32]:
    """`[2, 2, tokens, 32]`: eight directions hold nearly everything."""
    mix = np.random.default_rng(99).standard_normal((2, 2, 8, 32), np.float32)
    random = np.random.default_rng(seed)
    return random.standard_normal((2, 2, tokens, 8), np.float32) @ mix + random.standard_normal(
        (2, 2, tokens, 32), np.float32
    ) / np.float32(8)


class TestCalibrated(SerdeTests):
    tolerance = 0.2
    layouts = (LAYOUT, replace(LAYOUT, dtype="float16"), replace(LAYOUT, dtype="float32"))

    @pytest.fixture
    def open_serde(self, profile: Path) -> OpenSerde:
        return CacheGenConfig(profile=profile).build


def test_a_profile_saves_bytes_for_the_same_error(profile: Path) -> None:
    chunk = codec_kv.bfloat16(correlated(7, 32))
    found = []
    for one in (serde(), CacheGenConfig(profile=profile).build(context(LAYOUT))):
        assert isinstance(one, CacheGen)
        blob = encode(one, chunk.tobytes(), 512)
        back = np.frombuffer(decode(one, blob), "<u2").reshape(chunk.shape)
        found.append((len(blob), float(np.square(codec_kv.float32(back) - codec_kv.float32(chunk)).mean())))
    (plain, plain_error), (less, error) = found
    assert less < 0.9 * plain and error < 1.1 * plain_error


def test_a_profile_is_part_of_the_codec_and_of_no_other(profile: Path, tmp_path: Path) -> None:
    """Another profile is another codec: its objects are a miss, and its blobs are refused."""
    other = tmp_path / "other"
    calibrate([correlated(5, 100)], 2, np.zeros(0)).save(other)
    mine, theirs = (CacheGenConfig(profile=path).build(context(LAYOUT)) for path in (profile, other))
    assert isinstance(mine, CacheGen) and isinstance(theirs, CacheGen)
    assert len({mine.codec, theirs.codec, serde().codec}) == 3 and len(mine.codec) <= 32
    blob = encode(mine, kv_like(context(LAYOUT)), 0)
    for wrong in (theirs, serde()):
        with pytest.raises(CorruptChunk):
            decode(wrong, blob)


def test_a_profile_of_another_model_is_refused(profile: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(profile.read_bytes()[:-300])
    tries: list[tuple[CacheGenConfig, KVLayout, str]] = [
        (CacheGenConfig(profile=profile), replace(LAYOUT, num_layers=3), "calibrate this model"),
        (CacheGenConfig(profile=profile), replace(LAYOUT, kv_heads=1, head_dim=32), "calibrate this model"),
        (CacheGenConfig(profile=profile, level="lossless"), LAYOUT, "lossy levels"),
        (CacheGenConfig(profile=damaged), LAYOUT, "is not a profile"),
        (CacheGenConfig(profile=tmp_path / "absent"), LAYOUT, "is not a profile"),
    ]
    for config, layout, reason in tries:
        with pytest.raises(Unsupported, match=reason):
            config.build(context(layout))


def test_a_profile_file_that_lies_is_refused(profile: Path) -> None:
    """Sizes that promise gigabytes, a bomb, a flipped bit, numbers that are no basis."""
    magic, head, body = profile.read_bytes().split(b"\n", 2)
    bomb = zlib.compress(b"\0" * (1 << 22))
    for lie in (
        b"\n".join((b"cachegen profile 1", head, body)),
        b"\n".join((magic, head.replace(b"2 8 2", b"2 8 9999999"), body)),
        b"\n".join((magic, head, bomb)),
        b"\n".join((magic, head[:-1] + b"g", body)),
        b"\n".join((magic, head, zlib.compress(b"\1" + zlib.decompress(body)[1:]))),
        b"\n".join((magic, head, zlib.compress(zlib.decompress(body)[:-999] + b"\77" * 999))),
    ):
        profile.write_bytes(lie)
        with pytest.raises(ValueError, match="is not a profile"):
            Profile.load(profile)


@pytest.mark.parametrize("start", [0, 100_000, (1 << 48) - 1])
def test_the_transform_undoes_itself_at_any_position(profile: Path, start: int) -> None:
    values, found = correlated(3, 16), Profile.load(profile)
    for row in range(4):
        plane = values[row // 2, row % 2]
        components = transform.transform(found, row, plane, start, 60)
        assert components is not None
        steps = np.full((1, 1), 2.0**-6, np.float32)
        back = transform.untransform(found, row, np.rint(components / steps).astype(np.int64), steps, start)
        assert np.abs(back - plane).max() < 32 * 2.0**-7
        moved = transform.transform(found, row, plane, start - 5 if start else 5, 60)
        assert moved is not None
        assert (np.abs(components - moved).max() > 0.1) == (row % 2 == 0)


def test_rows_that_a_level_cannot_hold_are_counted() -> None:
    noise = np.random.default_rng(1).integers(0, 256, LAYOUT.chunk_bytes, np.uint8).tobytes()
    ladder = CacheGenConfig(level="adaptive").build(context(LAYOUT))
    assert isinstance(ladder, Ladder)
    blob = encode(serde(), noise)
    assert decode(serde(), blob) == noise
    last = ladder.rungs[-1]
    assert isinstance(last, CacheGen) and ladder.stats()[last.codec] == {"refused_rows": 0}
    encode(last, noise)
    assert ladder.stats()[last.codec] == {"refused_rows": 4}


def test_a_damaged_blob_is_corrupt() -> None:
    blob = bytearray(encode(serde(), kv_like(context(LAYOUT))))
    for at in range(0, len(blob), 61):
        blob[at] ^= 0x10
        with pytest.raises(CorruptChunk):
            decode(serde(), bytes(blob))
        blob[at] ^= 0x10


# -- measuring -------------------------------------------------------------------------------------------------
def test_bench_codec_measures_every_level() -> None:
    layout = KVLayout("lknhd", "bfloat16", 2, 2, 1, 64, 64, 64)
    chunk, simd = bench_codec.made_up(layout, 0), _native.simd()
    rows = bench_codec.measure(layout, [chunk], 1)
    best = simd.partition("+")[0]
    sets = {"avx512": ["portable", "avx2"], "avx2": ["portable"]}.get(best, [])
    smaller = [f"{level}@{name}" for name in sets for level in ("balanced", "lossless")]
    assert list(rows) == [*LEVELS, "zstd-1", *smaller]
    assert all(rows[name].ratio == rows[name.partition("@")[0]].ratio for name in smaller)  # the same bytes
    assert [rows[name].simd for name in smaller] == [name for name in sets for _ in range(2)]
    assert _native.simd() == simd
    both = bench_codec.two_cores(layout, [chunk], 1)
    assert both["encode"] > 0 and both["decode"] > 0
    assert rows["balanced"].ratio > rows["near"].ratio > rows["lossless"].ratio > rows["zstd-1"].ratio > 1
    assert all(row.encode_gb_s_core > 0 and row.decode_gb_s_core > 0 for row in rows.values())


def test_quality_of_exact_kv_is_perfect_and_of_less_is_less(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads)).eval()
    ids = np.random.default_rng(0).integers(0, 97, 96).tolist()
    reader, file = codec_kv.Reader(model), tmp_path / "tiny.profile"
    codec_cmd.profile_of(reader, [codec_kv.float32(reader.read(ids))]).save(file)
    rows = codec_quality.measure(reader, ids, 64, file, chunk_tokens=32)
    assert Profile.load(file).turns.size == 16
    kl = {level: judgement.kl for level, (_, judgement) in rows.items()}
    assert abs(kl["lossless"]) < 1e-6 and rows["lossless"][1].top1 == 100
    assert kl["near"] < kl["balanced"] < kl["tiny"] and kl["near"] < kl["balanced+profile"] < kl["tiny+profile"]
    figures = {level: codec_quality.record([row]) for level, row in rows.items()}
    assert figures["lossless"]["dppl_error"] < 1e-4 < figures["tiny"]["dppl_error"]
    four = codec_quality.record([rows["tiny"]] * 4)
    assert four["dppl_error"] == pytest.approx(figures["tiny"]["dppl_error"] / 2, rel=1e-3)
    assert {**four, "dppl_error": 0} == {**figures["tiny"], "dppl_error": 0}
    assert "balanced" in codec_quality.render(figures)
    assert codec_quality.plot(figures).count("<circle") == sum(row["kl"] > 0 for row in figures.values())
