"""The adaptive policy: the contract, the order of prefixes under any traffic, and hit rates where LRU fails or fits."""

from __future__ import annotations

import gzip
import json
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmcache_eviction_adaptive import AdaptiveConfig
from lmcache_eviction_adaptive.policy import GUARDED, LRU, MODES, REUSED, SAMPLE, Adaptive, Queues
from lmcache_eviction_adaptive.simulate import main, read_trace, replay

from lmcache_core.config import load
from lmcache_core.eviction.lru import Lru
from lmcache_core.testing.eviction import EvictionTests, OpenPolicy
from lmcache_core.types import KEY_BYTES, ChunkKey


class TestAdaptive(EvictionTests):
    @pytest.fixture
    def open_policy(self) -> OpenPolicy:
        return AdaptiveConfig().build


@pytest.mark.parametrize("mode", MODES)
class TestEachMode(EvictionTests):
    @pytest.fixture
    def open_policy(self, mode: object, monkeypatch: pytest.MonkeyPatch) -> OpenPolicy:
        def build() -> Adaptive:
            policy = Adaptive()
            policy._queues.mode = mode  # type: ignore[assignment]
            monkeypatch.setattr(policy, "_decide", lambda: None)
            return policy

        return build


def key(*path: int) -> ChunkKey:
    return ChunkKey(blake2b(repr(path).encode(), digest_size=KEY_BYTES).digest())


def chain(path: tuple[int, ...]) -> list[ChunkKey]:
    """Keys of a request: each stands for all before it."""
    return [key(*path[: depth + 1]) for depth in range(len(path))]


def test_modes_rank_prefixes_before_what_follows_them() -> None:
    for mode in MODES:
        assert list(mode.credits) == sorted(mode.credits)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=60), st.integers(8, 40), st.data())
def test_nothing_outlives_its_prefix(requests: list[list[int]], capacity: int, data: st.DataObject) -> None:
    """Over a tree of requests, under eviction, whatever mode is in force and however often it changes."""
    policy, stored = Adaptive(), set[ChunkKey]()
    parents: dict[ChunkKey, ChunkKey] = {}
    for number, request in enumerate(requests):
        if number % 5 == 0:
            policy._queues.mode = data.draw(st.sampled_from(MODES))
        keys = chain(tuple(request))
        parents.update(zip(keys[1:], keys, strict=False))
        hit = next((i for i, k in enumerate(keys) if k not in stored), len(keys))
        policy.touch(keys[:hit])
        new = [k for k in keys if k not in stored]
        over = max(0, len(stored) + len(new) - capacity)
        own = set(keys)
        victims = list(islice((k for k in policy.coldest() if k not in own), over))
        policy.remove_all(victims)
        stored.difference_update(victims)
        policy.add(new)
        stored.update(new)
        policy.touch(keys)
        place = {k: i for i, k in enumerate(policy.coldest())}
        assert place.keys() == stored
        for deep, shallow in parents.items():
            assert deep not in place or shallow not in place or place[deep] < place[shallow]
            assert deep not in stored or shallow in stored, "a chunk outlived its prefix"


def test_a_lookup_and_its_store_are_one_use() -> None:
    queues = Queues(REUSED)
    keys = [key(i) for i in range(64)]
    queues.add(keys)
    assert sum(queues.touch(keys[:3]) for _ in range(5)) == 0
    queues.clock += 16
    queues.add([key(i) for i in range(64, 80)])
    assert queues.touch(keys[:3]) == 3
    assert queues.touch(keys[:3]) == 0
    assert list(queues.coldest())[-3:] == keys[2::-1]


def test_guarded_lets_a_quarter_in() -> None:
    queues = Queues(GUARDED)
    for number in range(400):
        queues.clock += 1
        queues.add([key(number)])
    first = list(islice(queues.coldest(), 250))
    order = [key(number) for number in range(400)]
    assert first == [k for k in order if k in set(first)], "the rejected ones, oldest first"
    assert 30 < len(set(order[:200]) - set(first)) < 70, "a quarter of the oldest stays"


def loop(length: int, rounds: int) -> list[list[ChunkKey]]:
    """The same sessions again and again, more than fit: LRU evicts each just before it returns."""
    return [chain((session, *range(10))) for _ in range(rounds) for session in range(length)]


def recent(count: int) -> list[list[ChunkKey]]:
    """Sessions that grow and come back soon, then never: made for LRU."""
    random = Random(5)
    requests, sessions = [], list(range(40))
    lengths = dict.fromkeys(sessions, 2)
    for number in range(count):
        session = random.choice(sessions)
        requests.append(chain((session, *range(lengths[session]))))
        lengths[session] += 2
        if lengths[session] > 16:
            sessions.remove(session)
            sessions.append(40 + number)
            lengths[40 + number] = 2
    return requests


def test_better_where_lru_thrashes() -> None:
    requests = loop(200, 12)
    assert replay(requests, Lru(), 1100) == 0
    policy = Adaptive()
    assert replay(requests, policy, 1100) > 0.2
    assert policy.mode == GUARDED


def test_as_good_where_lru_is_right() -> None:
    requests = recent(2000)
    for capacity in (200, 800, 1200):
        lru, adaptive = replay(requests, Lru(), capacity), replay(requests, Adaptive(), capacity)
        assert adaptive > lru - 0.01


def test_it_changes_its_mind() -> None:
    """From thrashing to recency, in one life."""
    policy = Adaptive()
    replay(loop(200, 12), policy, 1100)
    assert policy.mode == GUARDED
    policy.remove_all(list(policy.coldest()))
    replay(recent(2500), policy, 800)
    assert policy.mode != GUARDED


def test_shadows_stay_small() -> None:
    policy = Adaptive()
    replay(loop(300, 3), policy, 1600)
    for shadow in policy._shadows:
        assert 0 < len(shadow.queues) <= 1600 // SAMPLE


def test_the_same_traffic_gives_the_same_order() -> None:
    orders = []
    for _ in range(2):
        policy = Adaptive()
        replay(recent(500), policy, 300)
        orders.append(list(policy.coldest()))
    assert orders[0] == orders[1]
    assert policy.mode in (LRU, REUSED, GUARDED)


def test_a_configuration_names_it() -> None:
    tier = {"name": "dram", "capacity": "4MiB", "backend": {"type": "cpu"}, "eviction": {"type": "adaptive"}}
    assert isinstance(load({"tiers": [tier]}, env={}).config.tiers[0].eviction.build(), Adaptive)


def test_the_simulator_reads_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl.gz"
    with gzip.open(trace, "wt") as file:
        for ids in ([1, 2, 3], [1, 2, 4], [1, 2, 3, 5]) * 20:
            file.write(json.dumps({"timestamp": 0, "hash_ids": ids}) + "\n")
    requests = read_trace(trace)
    assert [len(request) for request in requests[:3]] == [3, 3, 4]
    assert requests[0][:2] == requests[1][:2]
    assert replay(requests, Lru(), 5) == (200 - 5) / 200
    main([str(trace), "--policies", "lru"])
    assert "60 requests, 200 blocks, 5 different" in capsys.readouterr().out
