"""The contract of `EvictionPolicy` as tests. A plugin's author subclasses it and gives it one fixture:

class TestMyPolicy(EvictionTests):
    @pytest.fixture
    def open_policy(self):
        return MyConfig().build
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice, pairwise
from random import Random
from time import perf_counter

from lmcache_core.protocols import EvictionPolicy
from lmcache_core.testing.contracts import ContractBroken, demand
from lmcache_core.types import ChunkKey

OpenPolicy = Callable[[], EvictionPolicy]


class EvictionTests:
    """Run by pytest in subclasses that give `open_policy`. Attributes are limits that a subclass may change."""

    many = 64_000
    """Keys of a large tier."""

    def prefix(self, number: int, depth: int = 8) -> list[ChunkKey]:
        """The keys of one request, shallowest first."""
        return [ChunkKey(b"conformance-kit:" + Random(1000 * number + i).randbytes(16)) for i in range(depth)]

    def order(self, policy: EvictionPolicy) -> list[ChunkKey]:
        """All keys, coldest first."""
        with _raising("every key", "coldest"):
            return list(policy.coldest())

    def demand_keys(self, policy: EvictionPolicy, wanted: set[ChunkKey]) -> None:
        """`coldest` yields these, once each."""
        found = self.order(policy)
        twice = len(found) - len(set(found))
        demand(not twice, "every key", f"`coldest` yields {twice} keys twice")
        forgotten = len(wanted - set(found))
        demand(not forgotten, "every key", f"`coldest` does not yield {forgotten} of {len(wanted)} keys")
        gone = len(set(found) - wanted)
        demand(not gone, "removed keys", f"`coldest` yields {gone} keys that were removed or never added")

    def test_every_key_is_yielded_once(self, open_policy: OpenPolicy) -> None:
        policy = open_policy()
        self.demand_keys(policy, set())
        wanted: set[ChunkKey] = set()
        for number in range(10):
            keys = self.prefix(number)
            policy.add(keys)
            wanted |= set(keys)
            self.demand_keys(policy, wanted)
        for number in (3, 3, 9, 0):
            policy.touch(self.prefix(number))
            self.demand_keys(policy, wanted)
        policy.add(self.prefix(4))  # stored again: a tier may do that
        self.demand_keys(policy, wanted)

    def test_removed_keys_are_gone(self, open_policy: OpenPolicy) -> None:
        policy = open_policy()
        keys = [key for number in range(6) for key in self.prefix(number)]
        for number in range(6):
            policy.add(self.prefix(number))
        policy.touch(self.prefix(2))
        left = set(keys)
        for key in (keys[0], keys[17], keys[-1]):
            policy.remove(key)
            left.discard(key)
            self.demand_keys(policy, left)
        victims = list(islice(policy.coldest(), 10))
        policy.remove_all(victims)
        left -= set(victims)
        self.demand_keys(policy, left)
        back = victims[:3]
        policy.add(back)
        self.demand_keys(policy, left | set(back))
        policy.remove_all(keys)
        self.demand_keys(policy, set())

    def test_removed_keys_stay_gone(self, open_policy: OpenPolicy) -> None:
        """A use or a removal that comes late, when a key was evicted meanwhile, does not bring it back."""
        policy = open_policy()
        keys, others = self.prefix(1), self.prefix(2)
        policy.add(keys)
        policy.add(others)
        policy.touch(keys)
        policy.remove_all(keys[4:])
        left = {*keys[:4], *others}
        with _raising("unknown keys", "touch or remove of a removed key"):
            policy.touch(keys)
            self.demand_keys(policy, left)
            policy.remove(keys[5])
            policy.remove_all(keys[4:])
        self.demand_keys(policy, left)

    def test_unknown_keys_are_ignored(self, open_policy: OpenPolicy) -> None:
        policy = open_policy()
        known, unknown = self.prefix(1), self.prefix(2)
        policy.add(known)
        with _raising("unknown keys", "touch or remove of an unknown key"):
            policy.touch(unknown)
            policy.touch([unknown[0], known[0], unknown[1]])
            policy.remove(unknown[0])
            policy.remove_all([unknown[1], known[-1], unknown[2]])
            policy.touch([])
            policy.add([])
            policy.remove_all([])
        found = set(self.order(policy))
        demand(not found & set(unknown), "unknown keys", "a key that was only touched is yielded")
        demand(found == set(known[:-1]), "every key", "known keys beside unknown ones were not handled")

    def test_deeper_is_never_warmer(self, open_policy: OpenPolicy) -> None:
        """A chunk without its prefix can never be used: the end of a sequence goes before its beginning."""
        policy = open_policy()
        for number in range(8):
            policy.add(self.prefix(number))
            self.demand_depth(policy, range(number + 1))
        for number in (2, 5, 2, 7, 0, 0, 0, 3):
            policy.touch(self.prefix(number))
            self.demand_depth(policy, range(8))
        policy.touch(self.prefix(6)[:4])  # a request that shares only the beginning
        self.demand_depth(policy, range(8))

    def demand_depth(self, policy: EvictionPolicy, numbers: Sequence[int]) -> None:
        """Each prefix comes deepest first."""
        place = {key: at for at, key in enumerate(self.order(policy))}
        for number in numbers:
            places = [place[key] for key in self.prefix(number) if key in place]
            falling = all(shallow > deep for shallow, deep in pairwise(places))
            demand(falling, "prefix order", "a deeper chunk is kept longer than a shallower one of the same request")

    def test_looking_changes_nothing(self, open_policy: OpenPolicy) -> None:
        policy = open_policy()
        for number in range(5):
            policy.add(self.prefix(number))
        policy.touch(self.prefix(1))
        first = self.order(policy)
        for stop in (1, 0, 7):
            started = list(islice(policy.coldest(), stop))
            demand(started == first[:stop], "iteration", "`coldest` stopped early begins with other keys")
        demand(self.order(policy) == first, "iteration", "`coldest` called again yields another order")

    def test_first_keys_come_at_once(self, open_policy: OpenPolicy) -> None:
        """A full tier asks for its coldest keys at every store, with its lock held."""

        def first_keys(policy: EvictionPolicy, count: int) -> None:
            for _ in islice(policy.coldest(), 10):
                pass

        self.demand_quick(open_policy, first_keys, "the first of `coldest` take", 20e-6)

    def test_keys_come_and_go_at_once(self, open_policy: OpenPolicy) -> None:
        """Every store, use and eviction is told with the tier's lock held."""

        def come_and_go(policy: EvictionPolicy, count: int) -> None:
            keys = [_numbered(i) for i in range(count // 2, count // 2 + 32)]
            policy.touch(keys)
            policy.remove_all(keys)
            policy.add(keys)

        self.demand_quick(open_policy, come_and_go, "a use, a removal and a store of some take", 100e-6)

    def demand_quick(
        self, open_policy: OpenPolicy, work: Callable[[EvictionPolicy, int], None], what: str, least_s: float
    ) -> None:
        """`work`, given a policy and how many keys it has, takes about as long with few keys as with many.

        What takes less than `least_s` seconds takes as long as that: so short a time says nothing.
        """
        counts = (self.many // 512, self.many)
        policies = [self.filled(open_policy, count) for count in counts]
        for _ in range(3):  # a busy machine slows one down now and then
            few_s, many_s = (_best_s(partial(work, *each)) for each in zip(policies, counts, strict=True))
            ratio = many_s / max(few_s, least_s)
            if ratio < 16:
                return
        raise ContractBroken("quick", f"with 512 times as many keys {what} {ratio:.0f} times as long")

    def filled(self, open_policy: OpenPolicy, count: int) -> EvictionPolicy:
        """A policy with `count` keys, some of them used since."""
        policy = open_policy()
        keys = [_numbered(i) for i in range(count)]
        for at in range(0, count, 100):
            policy.add(keys[at : at + 100])
        policy.touch(keys[: min(count, 1000)])
        return policy


def _numbered(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(32, "big"))


def _best_s(work: Callable[[], None]) -> float:
    """Seconds of `work`, the best of several tries."""
    best = float("inf")
    for _ in range(5):
        began = perf_counter()
        work()
        best = min(best, perf_counter() - began)
    return best


@contextmanager
def _raising(contract: str, what: str) -> Iterator[None]:
    """Whatever is raised inside broke `contract`."""
    try:
        yield
    except ContractBroken:
        raise
    except Exception as error:
        raise ContractBroken(contract, f"{what} raised {type(error).__name__}: {error}") from error
