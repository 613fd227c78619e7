"""CacheEngine: what comes back is what went in, for every kind of tensor, by tokens and by name; or a miss."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, installed

from lmcache_backends.cpu import CpuConfig
from lmcache_core import CacheEngine
from lmcache_core.config import LaneConfig, PipelineConfig, TierConfig
from lmcache_core.errors import BackendError, Closed, ConfigError, LMCacheError
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_core.testing.refengine import RefModel

CHUNK, LAYERS, HEADS, DIM = 16, 2, 3, 8
SLOT = 8192
MODEL: dict[str, Any] = {
    "model": "org/model", "weights": "00ff", "layers": LAYERS, "kv_heads": HEADS, "head_dim": DIM, "dtype": "bfloat16",
}  # fmt: skip
MakeEngine = Callable[..., CacheEngine]


def dram(slots: int = 24) -> dict[str, Any]:
    return {"name": "dram", "capacity": slots * SLOT, "backend": {"type": "cpu"}}


def disk(path: Path, **options: Any) -> dict[str, Any]:
    return {
        "name": "disk",
        "capacity": "16MiB",
        "backend": {"type": "gds", "path": str(path), "free_floor": "0B"},
    } | options


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with installed() as fake:
        yield fake


@pytest.fixture
def engines() -> Iterator[MakeEngine]:
    """`engines(*storage tiers, slots=24, **fields)`; checked for leaks when the test ends."""
    opened: list[CacheEngine] = []

    def make(*tiers: Any, slots: int = 24, tenancy: Any = None, places: int = 0, **fields: Any) -> CacheEngine:
        hbm = {"name": "hbm", "capacity": places * SLOT, "backend": {"type": "gpu", "spare": 0}}
        config = {"chunk_tokens": CHUNK, "tiers": [*([hbm] if places else []), dram(slots), *tiers]}
        engine = CacheEngine(config if tenancy is None else {**config, "tenancy": tenancy}, **{**MODEL, **fields})
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        if not engine.pipeline._closed:
            settle(engine.pipeline)
            engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    random = Random(seed)
    return [random.randrange(32000) for _ in range(length)]


def truth(engine: CacheEngine, tokens: Sequence[int]) -> np.ndarray:
    """The KV of these tokens for this identity, `[layers, planes, tokens, heads, dim]`."""
    model = RefModel(engine.identity)
    words = model.kv(model.states(tokens))
    return np.ascontiguousarray(words.view(np.uint16).swapaxes(0, 1))


class Tensors:
    """Room for tokens in one of the shapes that engines have; `seen` reads it as `[layers, planes, tokens, ...]`."""

    def __init__(self, shape: str, tokens: int, seed: int = 5) -> None:
        base, _, kind = shape.partition("-")
        random = np.random.default_rng(seed)
        self.options: dict[str, Any] = {}
        block = {"pages": 4, "odd": 5, "slots": 4}.get(kind, 0)
        blocks = -(-tokens // block) + 3 if block else 0
        inner = (block, HEADS) if base == "nhd" else (HEADS, block)
        if kind in ("pages", "odd", "slots"):
            self.memory = np.full((LAYERS, 2, blocks, *inner, DIM), 0xDBDB, np.uint16)
            table = random.permutation(blocks)[: -(-tokens // block)]
            places = (table[:, None] * block + np.arange(block)).reshape(-1)[:tokens]
            if kind == "slots":
                places = random.permutation(blocks * block)[:tokens]
                self.options = {"slots": places}
            else:
                self.options = {"blocks": table.tolist()}
            self.index: Any = (places // block, places % block)
        elif kind == "pool":
            places = random.permutation(tokens + 7)[:tokens]
            self.memory = np.full(
                (LAYERS, 2, *((tokens + 7, HEADS) if base == "nhd" else (HEADS, tokens + 7)), DIM), 0xDBDB, np.uint16
            )
            self.options = {"slots": places}
            self.index = (places,)
        else:
            self.memory = np.full(
                (LAYERS, 2, *((tokens, HEADS) if base == "nhd" else (HEADS, tokens)), DIM), 0xDBDB, np.uint16
            )
            self.index = (np.arange(tokens),)
        if kind == "strided":  # K and V side by side: the last dimension has gaps after it
            whole = np.full((*self.memory.shape[:-1], 2 * DIM), 0xDBDB, np.uint16)
            self.memory = whole[..., :DIM]
        self.hnd = base == "hnd"

    def _tokens_first(self, layer: int, plane: int) -> np.ndarray:
        tensor = self.memory[layer, plane]
        return tensor.swapaxes(-3, -2) if self.hnd else tensor

    @property
    def seen(self) -> np.ndarray:
        return np.stack([[self._tokens_first(i, p)[self.index] for p in range(2)] for i in range(LAYERS)])

    def fill(self, kv: np.ndarray) -> Tensors:
        for i, p in np.ndindex(LAYERS, 2):
            self._tokens_first(i, p)[self.index] = kv[i, p]
        return self


SHAPES = [f"{base}-{kind}" for base in ("nhd", "hnd") for kind in ("whole", "strided", "pages", "odd", "slots", "pool")]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_back_the_bytes(shape: str, engines: MakeEngine) -> None:
    """Stored from this shape and read into every other kind of the same order, and never a byte beside its tokens."""
    engine = engines(order=shape[:3])
    tokens = prompt(5 * CHUNK + 6)
    kv = truth(engine, tokens)
    source = Tensors(shape, len(tokens)).fill(kv)
    assert engine.store(tokens, source.memory, **source.options) == 5 * CHUNK
    assert engine.store(tokens, source.memory, **source.options) == 0
    assert engine.put("doc", tokens, source.memory, **source.options)
    for other in [s for s in SHAPES if s[:3] == shape[:3]]:
        target = Tensors(other, len(tokens), seed=9)
        assert engine.retrieve(tokens, target.memory, **target.options).tokens == 5 * CHUNK
        assert np.array_equal(target.seen[:, :, : 5 * CHUNK], kv[:, :, : 5 * CHUNK])
        assert (target.seen[:, :, 5 * CHUNK :] == 0xDBDB).all()
        named = engine.get("doc", target.memory, **target.options)
        assert named is not None and named.tokens.tolist() == tokens and named.kv is target.memory
        assert np.array_equal(target.seen, kv)
        touched = Tensors(other, len(tokens), seed=9).fill(kv)
        assert np.array_equal(target.memory, touched.memory), "something beside the tokens was written"


def test_a_wrong_byte_would_be_seen(engines: MakeEngine) -> None:
    engine, tokens = engines(), prompt(2 * CHUNK)
    engine.store(tokens, truth(engine, tokens))
    with engine.pipeline.retrieve(list(engine.pipeline.slots.index)[:1]) as lease:
        lease.view(0)[5] ^= 1
    into = np.zeros((LAYERS, 2, 2 * CHUNK, HEADS, DIM), np.uint16)
    engine.retrieve(tokens, into)
    assert not np.array_equal(into, truth(engine, tokens))


def test_prefixes_are_found_by_their_tokens_alone(engines: MakeEngine) -> None:
    engine = engines()
    tokens = prompt(3 * CHUNK)
    assert not engine.lookup(tokens) and engine.lookup(tokens).reason == "not_stored"
    engine.store(tokens, truth(engine, tokens))
    found = engine.lookup(tokens)
    assert found and (found.tokens, found.sources, found.reason) == (3 * CHUNK, ("dram",) * 3, None)
    other = [*tokens[: 2 * CHUNK], *prompt(2 * CHUNK, seed=1)]
    assert engine.lookup(other).tokens == 2 * CHUNK
    assert engine.lookup(other).reason == "not_stored"
    assert engine.lookup([1, *tokens]).tokens == 0
    assert engine.lookup(tokens[: CHUNK - 1]).tokens == 0
    into = np.zeros((LAYERS, 2, 4 * CHUNK, HEADS, DIM), np.uint16)
    assert engine.retrieve(other, into).tokens == 2 * CHUNK
    assert np.array_equal(into[:, :, : 2 * CHUNK], truth(engine, tokens)[:, :, : 2 * CHUNK])


def test_restart_serves_tokens_and_names_from_disk(engines: MakeEngine, tmp_path: Path) -> None:
    tokens = prompt(3 * CHUNK + 5)
    first = engines(disk(tmp_path))
    kv = truth(first, tokens)
    assert first.put("doc", tokens, kv)
    first.close()
    again = engines(disk(tmp_path))
    assert again.lookup(tokens).sources == ("disk",) * 3
    again.prefetch(tokens)
    settle(again.pipeline)
    assert again.lookup(tokens).sources == ("dram",) * 3
    named = again.get("doc")
    assert named is not None and named.tokens.tolist() == tokens
    assert np.array_equal(named.kv, kv)
    assert again.get("other") is None and again.has("doc") and not again.has("other")


def test_a_name_that_a_lossy_tier_has_spoilt_can_be_put_again(tmp_path: Path) -> None:
    lossy = disk(tmp_path, lossy=True, serde={"type": "cachegen", "level": "small"})
    config = {"chunk_tokens": 64, "tiers": [dram(256), lossy]}
    model = {**MODEL, "kv_heads": 2, "head_dim": 32}
    tokens = list(range(100))  # small enough for the codec to take them for values
    kv = np.random.default_rng(0).integers(0x3F80, 0x3FFF, (2, 2, 100, 2, 32)).astype(np.uint16)
    with CacheEngine(config, **model) as first:
        assert first.put("doc", tokens, kv) and first.pipeline.flush(10.0)
    with CacheEngine(config, **model) as again:
        assert again.get("doc") is None
        assert again.put("doc", tokens, kv) and again.get("doc") is not None


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_names_keep_every_token(tokens: int, engines: MakeEngine) -> None:
    engine, ids = engines(), prompt(tokens)
    kv = truth(engine, ids)
    assert not engine.has("doc") and engine.get("doc") is None
    assert engine.put("doc", ids, kv) and engine.has("doc")
    named = engine.get("doc")
    assert named is not None and np.array_equal(named.kv, kv) and named.tokens.dtype == np.int32
    assert engine.lookup(ids).tokens == tokens // CHUNK * CHUNK
    assert engine.evict("doc") and not engine.has("doc") and engine.get("doc") is None
    assert not engine.evict("doc")
    assert engine.lookup(ids).tokens == tokens // CHUNK * CHUNK, "whole chunks stay for other prompts"
    engine.put("doc", ids, kv)
    assert engine.evict("doc", shared=True)
    assert engine.lookup(ids).tokens == 0


def test_a_name_is_what_was_last_put(engines: MakeEngine, tmp_path: Path) -> None:
    engine = engines(disk(tmp_path))
    for seed in (1, 2, 1, 3):
        tokens = prompt(2 * CHUNK + 3, seed)
        assert engine.put("doc", tokens, truth(engine, tokens))
        assert engine.pipeline.flush(10.0)
        named = engine.get("doc")
        assert named is not None and named.tokens.tolist() == tokens
        assert np.array_equal(named.kv, truth(engine, tokens))
    engine.close()
    again = engines(disk(tmp_path))
    named = again.get("doc")
    assert named is not None and named.tokens.tolist() == prompt(2 * CHUNK + 3, 3)
    assert again.evict("doc")
    again.close()
    assert not engines(disk(tmp_path)).has("doc"), "evicted means in every tier, for good"


def test_a_name_with_a_part_missing_is_a_miss(engines: MakeEngine) -> None:
    engine = engines(slots=5)
    tokens = prompt(2 * CHUNK + 3)
    assert engine.put("doc", tokens, truth(engine, tokens))
    others = prompt(3 * CHUNK, seed=4)
    engine.store(others, truth(engine, others))
    into = np.zeros((LAYERS, 2, len(tokens), HEADS, DIM), np.uint16)
    assert engine.get("doc", into) is None and not engine.has("doc")
    assert not into.any()
    too_long = prompt(6 * CHUNK, seed=5)
    assert not engine.put("long", too_long, truth(engine, too_long))


def test_salts_tenants_adapters_and_models_never_share(engines: MakeEngine, tmp_path: Path) -> None:
    tokens = prompt(2 * CHUNK)
    engine = engines(disk(tmp_path))
    scopes = [engine, *(engine.scope(salt=salt) for salt in ("", "a")), engine.scope(lora="adapter")]
    for scope in scopes:
        assert not scope.lookup(tokens) and not scope.has("doc")
        scope.put("doc", tokens, truth(scope, tokens))
    for scope in scopes:
        named = scope.get("doc")
        assert named is not None and np.array_equal(named.kv, truth(scope, tokens))
    engine.close()
    for change in ({"model": "other"}, {"weights": "01"}, {"revision": "2"}, {"engine": "mine"}, {"tp_rank": 1}):
        other = engines(disk(tmp_path), **change)
        assert not other.lookup(tokens) and not other.has("doc")
        other.close()


def test_tenants_have_scopes_of_their_own(engines: MakeEngine) -> None:
    engine = engines(tenancy={"secret": "sixteen letters!", "quota": "50%"}, tenant="acme")
    tokens = prompt(2 * CHUNK)
    engine.store(tokens, truth(engine, tokens))
    other = engine.scope(tenant="other")
    assert engine.lookup(tokens) and not other.lookup(tokens)
    assert engine.scope(salt="x").identity.salt != other.scope(salt="x").identity.salt
    with pytest.raises(ConfigError, match="tenant="):
        engines(tenancy={"secret": "sixteen letters!"})


# -- torch ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("order", ["nhd", "hnd"])
@pytest.mark.parametrize("device", ["host", "elsewhere", "gpu tier", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_tensors(
    device: str, order: Any, dtype: str, cuda: FakeCuda, engines: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In host memory; the way of other devices, with tensors of this one; with a GPU tier; and on a GPU."""
    torch = pytest.importorskip("torch")
    if device in ("elsewhere", "gpu tier"):
        monkeypatch.setattr("lmcache_core.engine._in_host_memory", lambda tensor: False)
    elif device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    where = device if device == "cuda" else "cpu"
    if device == "gpu tier":
        monkeypatch.setattr("lmcache_core.engine._stream", lambda device, gpu: 0)
        engine = engines(dtype=getattr(torch, dtype), order=order, places=2)
    else:
        engine = engines(dtype=getattr(torch, dtype), order=order)
    tokens = torch.randint(0, 100, (2 * CHUNK + 3,), generator=torch.Generator().manual_seed(1)).to(where)
    middle = (len(tokens), HEADS) if order == "nhd" else (HEADS, len(tokens))
    kv = torch.randn(LAYERS, 2, *middle, DIM).to(where, getattr(torch, dtype))
    assert engine.store(tokens, [tuple(layer) for layer in kv]) == 2 * CHUNK
    assert engine.put("doc", tokens, kv)
    named = engine.get("doc")
    assert named is not None and named.kv.dtype == kv.dtype and named.tokens.tolist() == tokens.tolist()
    assert torch.equal(named.kv.view(torch.uint8), kv.cpu().view(torch.uint8))
    into = torch.zeros_like(kv)
    assert engine.retrieve(tokens, into).tokens == 2 * CHUNK
    part = (slice(None),) * (2 if order == "nhd" else 3) + (slice(2 * CHUNK),)
    assert torch.equal(into[part].view(torch.uint8), kv[part].view(torch.uint8))
    inner = (4, HEADS) if order == "nhd" else (HEADS, 4)
    pages = torch.zeros(LAYERS, 2, 12, *inner, DIM, dtype=kv.dtype, device=where)
    table = torch.tensor([3, 1, 9, 0, 4, 11, 2, 7], device=where)
    assert engine.retrieve(tokens, pages, blocks=table).tokens == 2 * CHUNK
    again = torch.zeros_like(kv)
    assert engine.put("paged", tokens[: 2 * CHUNK], pages, blocks=table)
    assert engine.get("paged", again) is not None
    assert torch.equal(again[part].view(torch.uint8), kv[part].view(torch.uint8))
    if device == "gpu tier":
        assert engine.pipeline.flush(10) and engine.retrieve(tokens, into).sources == ("hbm", "hbm")
        assert cuda.calls.count("copy_pages") >= 5


def test_a_latent_has_one_plane(engines: MakeEngine) -> None:
    engine = engines(planes=1, kv_heads=1, dtype="float32")
    kv = np.random.default_rng(1).random((LAYERS, 1, CHUNK, 1, DIM), np.float32)
    engine.put("doc", range(CHUNK), [[memoryview(kv[i, 0])] for i in range(LAYERS)])
    named = engine.get("doc")
    assert named is not None and np.array_equal(named.kv, kv)


def test_works_without_torch() -> None:
    program = """
import sys
sys.modules["torch"] = None
import numpy as np
from lmcache_core import CacheEngine
kv = np.random.default_rng(1).random((2, 2, 300, 4, 8), np.float32)
with CacheEngine(model="m", weights="1", layers=2, kv_heads=4, head_dim=8, dtype=np.float32) as cache:
    cache.put("doc", range(300), kv)
    assert np.array_equal(cache.get("doc").kv, kv)
    assert cache.retrieve(range(300), np.zeros_like(kv)).tokens == 256
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- errors --------------------------------------------------------------------------------------------------------
GOOD = (LAYERS, 2, CHUNK, HEADS, DIM)
PAGED = (LAYERS, 2, 6, 4, HEADS, DIM)
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "layers": (np.zeros((3, *GOOD[1:]), np.uint16), {}, "3 layers, the engine 2"),
    "planes": (np.zeros((LAYERS, CHUNK, HEADS, DIM), np.uint16), {}, "16 planes, the engine 2"),
    "heads": (np.zeros((LAYERS, 2, CHUNK, 2, DIM), np.uint16), {}, r"kv\[0\]\[0\] is of shape.*tokens, 3, 8"),
    "order": (np.zeros((LAYERS, 2, HEADS, CHUNK, DIM), np.uint16), {}, "order 'nhd'"),
    "flat": (np.zeros((LAYERS, 2, CHUNK, HEADS * DIM), np.uint16), {}, "of shape"),
    "type": (np.zeros(GOOD, np.float32), {}, "holds float32, the engine bfloat16"),
    "short": (np.zeros((LAYERS, 2, 9, HEADS, DIM), np.uint16), {}, "room for 9 tokens, 16"),
    "no table": (np.zeros(PAGED, np.uint16), {}, "paged tensors need `blocks`"),
    "both": (np.zeros(PAGED, np.uint16), {"blocks": [0], "slots": [0]}, "not both"),
    "short table": (np.zeros(PAGED, np.uint16), {"blocks": [0, 1, 2]}, "3 blocks for 16 tokens; 4 are needed"),
    "short slots": (np.zeros(PAGED, np.uint16), {"slots": [0, 1, 2]}, "3 slots for 16 tokens; 16 are needed"),
    "block": (np.zeros(PAGED, np.uint16), {"blocks": [0, 1, 2, 6]}, r"has 6, outside \[0, 6\)"),
    "negative": (np.zeros(PAGED, np.uint16), {"blocks": [0, 1, -1, 3]}, "has -1, outside"),
    "slot": (np.zeros(PAGED, np.uint16), {"slots": [*range(15), 24]}, r"has 24, outside \[0, 24\)"),
    "floats": (np.zeros(PAGED, np.uint16), {"blocks": [0.0, 1, 2, 3]}, "integers, not float64"),
    "contiguous": (np.zeros(GOOD, np.uint16), {"blocks": [0]}, "for paged tensors"),
    "lists": ([[[1.0], [1.0]]] * LAYERS, {}, "is a list"),
    "mixed": ([[np.zeros(GOOD[2:], np.uint16), np.zeros(PAGED[2:], np.uint16)]] * 2, {"slots": range(16)}, "unlike"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named_and_nothing_is_stored(case: str, engines: MakeEngine) -> None:
    kv, options, message = WRONG[case]
    engine = engines()
    for call in (engine.store, engine.retrieve):
        with pytest.raises((ValueError, TypeError), match=message):
            call(prompt(CHUNK), kv, **options)
    with pytest.raises((ValueError, TypeError), match=message):
        engine.put("doc", prompt(CHUNK), kv, **options)
    assert not engine.lookup(prompt(CHUNK)) and not engine.has("doc")


def test_read_only_tensors_are_not_read_into(engines: MakeEngine) -> None:
    engine = engines()
    kv = truth(engine, prompt(CHUNK))
    kv.flags.writeable = False
    engine.store(prompt(CHUNK), kv)
    with pytest.raises(ValueError, match=r"kv\[0\]\[0\] is read-only"):
        engine.retrieve(prompt(CHUNK), kv)


def test_wrong_words_are_named(engines: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights must say"):
        engines(weights="")
    with pytest.raises(FileNotFoundError, match="no weight files"):
        engines(weights=tmp_path)
    with pytest.raises(ValueError, match="order is"):
        engines(order="dnh")
    with pytest.raises(ValueError, match="'int7' is not supported"):
        engines(dtype="int7")
    with pytest.raises(TypeError, match="'lorra'"):
        engines(lorra="x")
    with pytest.raises(ConfigError):
        CacheEngine({"tiers": [dram(1)]}, **MODEL)
    engine = engines()
    for tokens in ([-1] * CHUNK, [0.5] * CHUNK, np.zeros((2, CHUNK), int)):
        with pytest.raises(ValueError, match="token ids"):
            engine.lookup(tokens)
    with pytest.raises(ValueError, match="no tokens"):
        engine.put("doc", [], np.zeros((LAYERS, 2, 0, HEADS, DIM), np.uint16))
    with pytest.raises(ValueError, match="at most"):
        engine.put("doc", prompt(800), truth(engine, prompt(800)))
    engine.close()
    engine.close()
    with pytest.raises(Closed):
        engine.lookup(prompt(CHUNK))


# -- faults and threads --------------------------------------------------------------------------------------------
def faulty(injector: FaultInjector, **options: Any) -> CacheEngine:
    tiers = (
        TierConfig(name="dram", capacity=14 * SLOT, backend=CpuConfig(pin=False)),
        TierConfig(
            name="store", capacity=60 * SLOT, backend=DictConfig(), lane=LaneConfig(threads=2, deadline=10.0), **options
        ),
    )
    return CacheEngine(PipelineConfig(chunk_tokens=CHUNK, tiers=tiers), plugins=injector.plugins(), **MODEL)


@pytest.mark.usefixtures("quick_breaker")
@pytest.mark.parametrize("write", ["through", "back"])
def test_threads_on_a_faulty_tier_never_get_a_wrong_byte(write: str) -> None:
    rates = Rates(
        error=0.02, refuse=0.02, no_space=0.02, lost_put=0.02, torn_put=0.03, flip=0.05, truncate=0.03, misdirect=0.03
    )
    injector = FaultInjector({"store": rates}, seed=3)
    counts = dict.fromkeys(("hits", "named", "requests"), 0)
    wrong: list[str] = []
    with faulty(injector, write=write) as engine:
        scopes = [engine, engine.scope(salt="other")]

        def work(seed: int) -> None:
            random = Random(seed)
            for _ in range(150):
                scope = random.choice(scopes)
                tokens = prompt(random.choice((20, 40, 70)), seed=random.randrange(6))
                kv, name = truth(scope, tokens), f"{len(tokens)}/{random.randrange(3)}"
                counts["requests"] += 1
                into = np.full_like(kv, 0xDBDB)
                got = scope.retrieve(tokens, into).tokens
                counts["hits"] += bool(got)
                if not (np.array_equal(into[:, :, :got], kv[:, :, :got]) and (into[:, :, got:] == 0xDBDB).all()):
                    wrong.append(f"seed {seed}: retrieve {got}")
                scope.store(tokens, kv)
                choice = random.random()
                if choice < 0.25:
                    with suppress(BackendError):  # a planted fault of a deletion
                        scope.put(name, tokens, kv)
                elif choice < 0.3:
                    with suppress(BackendError):
                        scope.evict(name)
                named = scope.get(name)
                if named is not None:
                    counts["named"] += 1
                    if not np.array_equal(named.kv, truth(scope, named.tokens.tolist())):
                        wrong.append(f"seed {seed}: get {name}")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        settle(engine.pipeline)
        assert not wrong
        assert counts["requests"] == 450 and counts["hits"] > 100 and counts["named"] > 30, counts
        assert engine.pipeline.stats()["quarantined"] > 0


def test_a_tier_that_cannot_delete_says_so() -> None:
    injector = FaultInjector({"store": Rates()})
    with faulty(injector) as engine:
        tokens = prompt(CHUNK + 2)
        engine.put("doc", tokens, truth(engine, tokens))
        engine.pipeline.flush(10.0)
        injector["store"].hold("delete")
        with pytest.raises(BackendError, match="store"):
            engine.pipeline.discard([engine._head_key("doc")], timeout=0.05)
        assert not engine.has("doc"), "not served, though the medium has not let go of it"
        injector.release()
        for thread in threading.enumerate():
            if thread.name == "lmcache-discard":
                thread.join(30.0)
        settle(engine.pipeline)
        engine.pipeline.discard([engine._head_key("doc")])


def test_a_read_under_way_does_not_bring_back_what_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty(FaultInjector({})) as engine:
        tokens = prompt(CHUNK)
        engine.put("doc", tokens, truth(engine, tokens))
        engine.pipeline.flush(10.0)
        head, store = engine._head_key("doc"), engine.pipeline.tiers[0]
        for key in list(engine.pipeline.slots.index):
            engine.pipeline.slots.hide(key)
        read, forget = store.read, store.forget
        was_read, deleted = threading.Event(), threading.Event()

        def slow_read(*args: Any) -> Any:
            outcomes = read(*args)
            was_read.set()
            assert deleted.wait(30.0)
            return outcomes

        def announced(keys: Any) -> int:
            count = forget(keys)
            deleted.set()
            return count

        monkeypatch.setattr(store, "read", slow_read)
        monkeypatch.setattr(store, "forget", announced)
        transfer = engine.pipeline.fetch([head])
        assert was_read.wait(30.0)
        engine.pipeline.discard([head])
        with transfer.result() as lease:
            assert not lease
        assert not engine.has("doc")
        settle(engine.pipeline)


def test_a_scope_of_a_tenant_with_too_many_identities_is_refused(
    engines: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_core.tenancy.MAX_IDENTITIES", 2)
    engine = engines(tenancy={"secret": "sixteen letters!"}, tenant="acme")
    engine.scope(salt="a")
    with pytest.raises(LMCacheError, match="too many identities"):
        engine.scope(salt="b")
