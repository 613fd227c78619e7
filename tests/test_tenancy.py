"""Tenants never share, keep to their quotas, and cannot evict each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from chunks import OBJECT, fill, tier, verify
from conftest import BuildPipeline

from lmcache_core.config import LaneConfig, TenancyConfig, load
from lmcache_core.errors import ConfigError
from lmcache_core.eviction.lru import Lru
from lmcache_core.identity import Identity, tenant_salt
from lmcache_core.keys import chunk_keys
from lmcache_core.pipeline import Pipeline
from lmcache_core.tenancy import Shares, Tenancy
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import ChunkKey
from lmcache_core.units import Percent

pytestmark = pytest.mark.timeout(60)

SECRET = "sixteen letters!"
LANE = LaneConfig(threads=1, deadline=30.0)


def strict(**options: Any) -> TenancyConfig:
    return TenancyConfig(secret=SECRET, **options)


def keys_of(pipeline: Pipeline, identity: Identity, tenant: str, prompt: int, chunks: int = 4) -> list[ChunkKey]:
    """What an adapter makes of a tenant's prompt."""
    mine = pipeline.tenant_identity(identity, tenant)
    assert mine is not None
    return chunk_keys(mine, [1 + prompt] * 16 * chunks)


def store(pipeline: Pipeline, names: Sequence[ChunkKey]) -> int:
    return pipeline.store(names, fill(names))


def hits(pipeline: Pipeline, names: Sequence[ChunkKey]) -> int:
    with pipeline.retrieve(names) as lease:
        return verify(pipeline, lease)


# -- who is who --------------------------------------------------------------------------------------------------
def test_tenants_have_salts_of_their_own_made_on_the_server(pipelines: BuildPipeline, identity: Identity) -> None:
    pipeline = pipelines(tenancy=strict())
    acme, other = (pipeline.tenant_identity(identity, name) for name in ("acme", "other"))
    assert acme is not None and other is not None
    assert acme.salt == tenant_salt(SECRET.encode(), "acme") and acme.prefix != other.prefix != identity.prefix
    assert pipeline.tenant_identity(identity, "acme") == acme
    elsewhere = pipelines(tenancy=TenancyConfig(secret="another secret than that"))
    assert elsewhere.tenant_identity(identity, "acme") != acme, "a name is not enough to find a tenant's prompts"


@pytest.mark.parametrize("tenant", [None, ""])
def test_a_request_without_a_tenant_takes_no_part(pipelines: BuildPipeline, identity: Identity, tenant: Any) -> None:
    assert pipelines(tenancy=strict()).tenant_identity(identity, tenant) is None
    assert pipelines().tenant_identity(identity, tenant) is identity, "but where tenants are not told apart, it does"


def test_a_salt_that_came_with_the_request_separates_within_the_tenant_only(
    pipelines: BuildPipeline, identity: Identity
) -> None:
    """Nobody becomes somebody else by naming their salt."""
    pipeline = pipelines(tenancy=strict())
    stolen = tenant_salt(SECRET.encode(), "acme")
    asked = [replace(identity, salt=salt) for salt in (None, "", "x", stolen, f"{stolen}/x")]
    found = {pipeline.tenant_identity(one, tenant) for one in asked for tenant in ("acme", "mallory")}
    assert len({one.digest for one in found if one is not None}) == 10


def test_a_tenant_cannot_fill_memory_with_salts(
    pipelines: BuildPipeline, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_core.tenancy.MAX_IDENTITIES", 3)
    pipeline = pipelines(tenancy=strict(quota="50%"))
    asked = [replace(identity, salt=str(i)) for i in range(5)]
    assert [pipeline.tenant_identity(one, "mallory") is None for one in asked] == [False] * 3 + [True] * 2
    assert pipeline.tenant_identity(asked[0], "mallory") is not None, "those it has stay"
    assert pipeline.tenant_identity(asked[4], "acme") is not None, "and others have their own"
    assert pipeline.tenancy is not None and len(pipeline.tenancy.names) == 4


def test_tenants_never_share(pipelines: BuildPipeline, identity: Identity) -> None:
    pipeline = pipelines(tier(lane=LANE), tenancy=strict())
    names = keys_of(pipeline, identity, "acme", 0)
    store(pipeline, names)
    assert hits(pipeline, keys_of(pipeline, identity, "acme", 0)) == 4
    assert hits(pipeline, keys_of(pipeline, identity, "other", 0)) == 0
    assert hits(pipeline, chunk_keys(identity, [1] * 64)) == 0


# -- configuration -----------------------------------------------------------------------------------------------
def loaded(tenancy: Mapping[str, Any]) -> Any:
    return load({"tenancy": tenancy, "tiers": [{"name": "dram", "capacity": "1MiB", "backend": {"type": "cpu"}}]})


@pytest.mark.parametrize(
    "tenancy, place",
    [
        ({}, "tenancy.secret"),
        ({"secret": "short"}, "tenancy.secret"),
        ({"secret": SECRET, "secret_file": "/x"}, "tenancy.secret"),
        ({"secret": SECRET, "quota": "120%"}, "tenancy.quota"),
        ({"secret": SECRET, "quotas": {"acme": "much"}}, "tenancy.quotas.acme"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tenancy: Mapping[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(tenancy)
    assert [problem.path for problem in raised.value.problems] == [place]
    assert SECRET not in str(raised.value) and "short\n" not in str(raised.value)


def test_the_secret_is_never_shown() -> None:
    config = loaded({"secret": SECRET, "quota": "20%", "quotas": {"acme": "1GiB"}}).config
    assert SECRET not in repr(config) and SECRET not in config.model_dump_json()
    assert config.tenancy.quota == Percent(20) and config.tenancy.quotas == {"acme": 1 << 30}


def test_the_secret_may_lie_in_a_file(pipelines: BuildPipeline, identity: Identity, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for content, problem in ((None, "cannot be read"), ("short\n", "fewer than 16 bytes")):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=problem):
            pipelines(tenancy=TenancyConfig(secret_file=path))
    path.write_text(f"{SECRET}\n")
    mine, same = (pipelines(tenancy=t).tenant_identity(identity, "acme") for t in (strict(), strict()))
    assert pipelines(tenancy=TenancyConfig(secret_file=path)).tenant_identity(identity, "acme") == mine == same


def test_a_quota_below_one_chunk_is_refused(pipelines: BuildPipeline) -> None:
    with pytest.raises(ConfigError) as raised:
        pipelines(tier(capacity=100 * OBJECT), slots=8, tenancy=strict(quota="5%", quotas={"acme": 8191, "big": "50%"}))
    assert [problem.path for problem in raised.value.problems] == ["tenancy.quota", *["tenancy.quotas.acme"] * 2]


def test_quotas_in_bytes_and_shares() -> None:
    tenancy = Tenancy(b"", Percent(25), {"acme": 1000, "big": Percent(60)})
    assert [tenancy.quota(name, 4000) for name in ("any", "acme", "big")] == [1000, 1000, 2400]
    assert tenancy.limits("any") and not Tenancy(b"").limits("any") and Tenancy(b"").quota("any", 4000) is None


# -- shares: an eviction policy ----------------------------------------------------------------------------------
def of(tenant: str, count: int, start: int = 0) -> list[ChunkKey]:
    return [ChunkKey(tenant.encode().ljust(16, b"-") + i.to_bytes(16, "big")) for i in range(start, start + count)]


def names_of(prefix: bytes) -> str | None:
    return prefix.rstrip(b"-").decode()


def test_the_tenant_that_uses_most_of_its_quota_gives_first() -> None:
    shares = Shares(Lru, 100, {"a": 10, "b": 40}.get, names_of)
    shares.add([*of("a", 5), *of("b", 10)])
    shares.of(of("a", 1)[0]).used, shares.of(of("b", 1)[0]).used = 5, 10
    order = list(shares.coldest())
    assert sorted(order) == sorted([*of("a", 5), *of("b", 10)])
    assert order[:2] == of("a", 5)[:2:-1], "half of a's quota, a quarter of b's: two of a's bring them level"
    assert [key[:1] for key in order].index(b"b") < 4, "then both give"
    shares.touch([of("a", 5)[4], *of("nobody", 1)])
    shares.remove_all([of("a", 5)[3], *of("b", 10), *of("nobody", 1)])
    shares.remove(of("nobody", 1)[0])
    assert list(shares.coldest()) == [of("a", 5)[i] for i in (2, 1, 0, 4)]
    assert shares.stats()["a"]["quota"] == 10 and "nobody" not in shares.stats()


def test_what_a_restart_found_is_claimed_in_order() -> None:
    known: dict[bytes, str] = {}
    shares = Shares(Lru, 100, lambda _: 10, known.get)
    shares.add(of("x", 3))
    shares.add(of("y", 2))
    shares.of(of("x", 1)[0]).used, shares.of(of("y", 1)[0]).used = 3, 2
    assert shares.stats() == {"": {"used": 5, "quota": None, "evicted": 0}}
    for prefix in (b"x", b"y"):
        known[prefix.ljust(16, b"-")] = "acme"
        moved = shares.claim(prefix.ljust(16, b"-"), "acme")
        assert moved is not None and moved[1] is shares.of(of(prefix.decode(), 1)[0])
        assert shares.claim(prefix.ljust(16, b"-"), "acme") is None
    assert shares.stats() == {"acme": {"used": 5, "quota": 10, "evicted": 0}}
    assert list(shares.coldest()) == [*of("x", 3)[::-1], *of("y", 2)[::-1]]


# -- pipelines ---------------------------------------------------------------------------------------------------
def test_a_flood_by_one_tenant_costs_the_others_nothing(pipelines: BuildPipeline, identity: Identity) -> None:
    """Memory and disk, quotas that fit: every chunk of every other tenant is still there."""
    tenants = ["a", "b", "c"]
    pipeline = pipelines(
        tier(capacity=64 * OBJECT, lane=LANE), slots=32, tenancy=strict(quota="25%")
    )  # fmt: skip
    for tenant in tenants:
        for prompt in range(4):
            store(pipeline, keys_of(pipeline, identity, tenant, prompt))
            settle(pipeline)
    for flood in range(60):
        names = keys_of(pipeline, identity, "attacker", flood)
        assert store(pipeline, names) == 4, "the attacker may go on storing, into its own share"
        settle(pipeline)
        for name in (pipeline.memory_name, "store"):
            used = pipeline.stats()["tiers"][name]["tenants"]["attacker"]
            assert used["used"] <= used["quota"]
    for tenant in tenants:
        for prompt in (2, 3):
            names = keys_of(pipeline, identity, tenant, prompt)
            hit = pipeline.lookup(names)
            assert hit.sources == ["dram"] * 4
        assert all(hits(pipeline, keys_of(pipeline, identity, tenant, prompt)) == 4 for prompt in range(4))
    tiers = pipeline.stats()["tiers"]
    assert tiers["store"]["tenants"]["attacker"] == {
        "used": 16 * OBJECT, "quota": 16 * OBJECT, "evicted": 60 * 4 - 16,
    }  # fmt: skip
    assert all(tiers["store"]["tenants"][tenant]["evicted"] == 0 for tenant in tenants)
    assert tiers["dram"]["tenants"]["attacker"]["quota"] == 8


@pytest.mark.parametrize("write", ["through", "back"])
def test_with_quotas_that_do_not_fit_the_largest_user_gives(
    pipelines: BuildPipeline, identity: Identity, write: Any
) -> None:
    pipeline = pipelines(
        tier(capacity=24 * OBJECT, write=write, lane=LANE), slots=12, tenancy=strict(quota="50%")
    )  # fmt: skip
    small = [keys_of(pipeline, identity, "small", prompt, 2) for prompt in range(2)]
    for names in small:
        store(pipeline, names)
        settle(pipeline)
    rng = Random(7)
    for step in range(60):
        store(pipeline, keys_of(pipeline, identity, f"big{rng.randrange(3)}", step, 2))
        settle(pipeline)
        used = pipeline.stats()["tiers"]["store"]["tenants"]
        assert all(one["used"] <= one["quota"] for one in used.values())
    assert all(hits(pipeline, names) == 2 for names in small)
    assert pipeline.tiers[0].used <= 24 * OBJECT


def test_a_tenant_of_several_models_has_one_quota(pipelines: BuildPipeline, identity: Identity) -> None:
    pipeline = pipelines(tier(capacity=32 * OBJECT, lane=LANE), slots=32, tenancy=strict(quota="25%"))
    other = replace(identity, model="other/model")
    for prompt in range(3):
        for model in (identity, other):
            store(pipeline, keys_of(pipeline, model, "acme", prompt))
            settle(pipeline)
    stats = pipeline.stats()["tiers"]
    assert stats["store"]["tenants"] == {"acme": {"used": 8 * OBJECT, "quota": 8 * OBJECT, "evicted": 16}}
    assert stats["dram"]["tenants"] == {"acme": {"used": 8, "quota": 8, "evicted": 16}}
    assert hits(pipeline, keys_of(pipeline, identity, "acme", 2)) == 4
    assert hits(pipeline, keys_of(pipeline, other, "acme", 2)) == 4


def test_a_prefix_longer_than_the_quota_keeps_its_beginning(pipelines: BuildPipeline, identity: Identity) -> None:
    pipeline = pipelines(
        tier(capacity=32 * OBJECT, lane=LANE), slots=64, tenancy=strict(quotas={"acme": 6 * OBJECT + 8192})
    )  # fmt: skip
    names = keys_of(pipeline, identity, "acme", 0, 12)
    assert store(pipeline, names) == 4 and pipeline.lookup(names).count == 4
    assert pipeline.stats()["dropped"] == {"no_room": 8}


def test_a_prefix_that_grows_over_the_quota_keeps_its_beginning(pipelines: BuildPipeline, identity: Identity) -> None:
    """Though there are free slots: it must not make room among its own chunks."""
    pipeline = pipelines(slots=64, tenancy=strict(quotas={"acme": 4 * 8192}))
    names = keys_of(pipeline, identity, "acme", 0, 6)
    assert [store(pipeline, names[:end]) for end in (3, 6)] == [3, 1]
    assert pipeline.lookup(names).count == 4


def test_quotas_hold_across_a_restart(pipelines: BuildPipeline, identity: Identity) -> None:
    medium = DictConfig()
    options = {"slots": 32, "tenancy": strict(quota="25%")}
    first = pipelines(tier(backend=medium, capacity=32 * OBJECT, lane=LANE), **options)
    for tenant in ("acme", "other"):
        for prompt in range(2):
            store(first, keys_of(first, identity, tenant, prompt))
            settle(first)
    again = pipelines(tier(backend=medium, capacity=32 * OBJECT, lane=LANE), **options)
    assert again.stats()["tiers"]["store"]["tenants"] == {"": {"used": 16 * OBJECT, "quota": None, "evicted": 0}}
    for prompt in range(2, 12):
        store(again, keys_of(again, identity, "acme", prompt))
        settle(again)
    stats = again.stats()["tiers"]["store"]["tenants"]
    assert stats["acme"]["used"] == 8 * OBJECT and stats[""]["used"] == 8 * OBJECT
    assert all(hits(again, keys_of(again, identity, "other", prompt)) == 4 for prompt in range(2))
    settle(again)
    assert "" not in again.stats()["tiers"]["store"]["tenants"], "every prefix has its tenant"
    again.clear()
    assert all(one["used"] == 0 for one in again.stats()["tiers"]["store"]["tenants"].values())


def test_reads_count_for_their_tenant(pipelines: BuildPipeline, identity: Identity) -> None:
    """Memory: what is read takes a tenant's slots like what is stored."""
    pipeline = pipelines(tier(lane=LANE), slots=16, tenancy=strict(quota="25%", unmetered=("store",)))
    quiet = keys_of(pipeline, identity, "quiet", 0)
    store(pipeline, quiet)
    settle(pipeline)
    prompts = [keys_of(pipeline, identity, "busy", prompt) for prompt in range(8)]
    for names in prompts:
        store(pipeline, names)
        settle(pipeline)
    for names in prompts:
        assert hits(pipeline, names) == 4
    settle(pipeline)
    assert pipeline.lookup(quiet).sources == ["dram"] * 4
    assert pipeline.stats()["tiers"]["dram"]["tenants"]["busy"]["used"] == 4
    with pipeline.retrieve(prompts[0]), pipeline.retrieve(prompts[1]) as second:
        assert len(second) == 0, "its slots are all held"
    assert pipeline.lookup(quiet).sources == ["dram"] * 4


@pytest.mark.parametrize(
    "options, said",
    [
        ({"backend": DictConfig(scannable=False), "capacity": 8 * OBJECT}, "backend `dict` keeps its own books"),
        ({}, "it has no capacity"),
    ],
)
def test_a_tier_that_cannot_keep_quotas_is_refused_unless_it_is_named(
    pipelines: BuildPipeline, identity: Identity, options: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        pipelines(tier(lane=LANE, **options), tenancy=strict(quota="50%"))
    assert "unmetered: [store]" in str(raised.value), "the way out is said"
    assert raised.value.problems[0].path.startswith("tiers.store.")
    assert pipelines(tier(lane=LANE, **options), tenancy=strict()), "without quotas there is nothing to keep"
    pipeline = pipelines(tier(lane=LANE, **options), slots=32, tenancy=strict(quota="50%", unmetered=("store",)))
    for prompt in range(4):
        store(pipeline, keys_of(pipeline, identity, "acme", prompt))
        settle(pipeline)
    assert "tenants" not in pipeline.stats()["tiers"]["store"]
    assert pipeline.stats()["tiers"]["dram"]["tenants"]["acme"]["used"] == 16


def test_an_unmetered_tier_must_be_there(pipelines: BuildPipeline) -> None:
    with pytest.raises(ConfigError, match="no tier `stroe`") as raised:
        pipelines(tier(capacity=8 * OBJECT), tenancy=strict(quota="50%", unmetered=("stroe",)))
    assert [problem.path for problem in raised.value.problems] == ["tenancy.unmetered"]
    assert "store" in raised.value.problems[0].fix


def test_a_flood_does_not_keep_others_from_storing(pipelines: BuildPipeline, identity: Identity) -> None:
    """The medium is slow and one tenant stores more than its lane can hold: who comes later is stored all the same,
    and before most of the flood."""
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(
        tier(capacity=400 * OBJECT, lane=LaneConfig(threads=1, deadline=30.0, queue=16)),
        slots=256, tenancy=strict(quota="90%"), injector=injector,
    )  # fmt: skip
    injector["store"].hold("put_from")
    for prompt in range(40):
        store(pipeline, keys_of(pipeline, identity, "attacker", prompt, 1))
    assert pipeline.tiers[0].counts["dropped_busy"] > 20
    injector["store"].wait_held()
    polite = keys_of(pipeline, identity, "polite", 0, 4)
    store(pipeline, polite)
    order: list[ChunkKey] = []
    medium = pipeline.tiers[0].backend
    put = medium.put_from

    def noted(keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> Any:
        order.extend(keys)
        return put(keys, buffers)

    medium.put_from = noted  # type: ignore[method-assign]
    injector["store"].release()
    settle(pipeline)
    assert all(key in order[:8] for key in polite)
    assert pipeline.tiers[0].present(polite) == [True] * 4


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_books_add_up_under_threads(pipelines: BuildPipeline, identity: Identity, stop: threading.Event) -> None:
    """Tenants at once, over memory and two disks, with clears in between; `check` adds up every tenant's books."""
    lane = LaneConfig(threads=3, deadline=30.0)
    pipeline = pipelines(
        tier("near", capacity=24 * OBJECT, lane=lane),
        tier("far", capacity=40 * OBJECT, write="back", lane=lane),
        slots=24,
        tenancy=strict(quota="40%", quotas={"t0": "10%"}),
    )
    errors: list[BaseException] = []

    def work(number: int) -> None:
        rng = Random(number)
        try:
            for _ in range(120):
                names = keys_of(pipeline, identity, f"t{number}", rng.randrange(12), rng.randrange(1, 6))
                if rng.random() < 0.5:
                    store(pipeline, names)
                else:
                    hits(pipeline, names)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for name in ("near", "dram", None):
        stop.wait(0.05)
        pipeline.clear(name)
    for thread in threads:
        thread.join()
    assert not errors
    settle(pipeline)
    for one in ("near", "far", "dram"):
        for share in pipeline.stats()["tiers"][one]["tenants"].values():
            assert share["used"] <= share["quota"]
