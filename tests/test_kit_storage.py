"""The storage kit has teeth: backends with one bug each fail it, by the name of the contract; correct ones pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from time import monotonic, sleep

import pytest
from seeded_bugs.storage import (
    BUGS,
    Bug,
    Correct,
    HangingGet,
    LeavesFilesOpen,
    Objects,
    OtherMedium,
    PrefixIgnored,
)

from lmcache_core.protocols import BuildContext, StorageBackend
from lmcache_core.testing import watched
from lmcache_core.testing.conformance import Outcome, checks_of, run_check
from lmcache_core.testing.contracts import STORAGE
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests

SLOW = {"test_the_gil_is_released"}
HANG = {"test_what_was_put_is_got", "test_absent_keys", "test_the_gil_is_released"}
"""What a backend that hangs is asked: every test would take its deadline."""


class Kit(StorageBackendTests):
    """With a deadline that a hang may take in a test."""

    deadline = 0.3


@pytest.fixture(autouse=True)
def hangs_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hanging threads and open files end with their test."""
    monkeypatch.setattr(watched, "GRACE_S", 0.7)
    HangingGet.forever.clear()
    yield
    HangingGet.forever.set()
    while LeavesFilesOpen.left:
        LeavesFilesOpen.left.pop().close()
    until = monotonic() + 5
    while any(thread.name == "lmcache-kit" for thread in threading.enumerate()):
        assert monotonic() < until, "the kit left threads behind"
        sleep(0.001)


def run(build: Callable[[Objects, BuildContext], StorageBackend], only: set[str] | None = None) -> list[Outcome]:
    """Every test of the kit, each on a medium of its own, as with a pytest fixture."""
    outcomes: list[Outcome] = []
    for name in checks_of(kit := Kit()):
        if only is None or name in only:
            objects: Objects = {}
            outcomes.append(run_check(kit, name, lambda context, medium=objects: build(medium, context)))
    return outcomes


def test_a_correct_backend_passes() -> None:
    outcomes = run(Correct)
    assert [outcome for outcome in outcomes if not outcome.passed] == []
    assert len(outcomes) >= 20


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found_and_its_contract_named(name: str) -> None:
    bug: Bug = BUGS[name]
    if bug.contract == "deadline":
        only = HANG
    elif bug.contract == "GIL":
        only = SLOW
    else:
        only = set(checks_of(Kit())) - SLOW
    failures = [outcome for outcome in run(bug.build, only) if not outcome.passed]
    named = {failure.contract for failure in failures}
    assert bug.contract in named, f"not found, or not by its name: {[failure.message for failure in failures]}"
    for failure in failures:
        # Nothing that a bug leads to comes out as a bare error.
        assert failure.message.startswith(f"contract `{failure.contract}`: "), failure
        assert failure.contract in STORAGE


def test_every_contract_has_a_bug_that_breaks_it() -> None:
    assert {bug.contract for bug in BUGS.values()} | {"own medium"} == set(STORAGE)


def test_a_backend_that_ignores_its_prefix_is_found() -> None:
    class Two(Kit):
        def elsewhere(self) -> OpenBackend:
            return lambda context: build(objects, b"there/", context)

    for build, message in ((OtherMedium, ""), (PrefixIgnored, "contract `own medium`: ")):
        objects: Objects = {}

        def here(context: BuildContext, build: type[OtherMedium] = build, objects: Objects = objects) -> StorageBackend:
            return build(objects, b"here/", context)

        outcome = run_check(Two(), "test_another_medium_is_another_one", here)
        assert outcome.passed == (not message)
        assert outcome.message.startswith(message)


def test_the_kit_waits_for_a_hang_no_longer_than_the_deadline() -> None:
    began = monotonic()
    (outcome,) = run(HangingGet, {"test_what_was_put_is_got"})
    assert outcome.message == "contract `deadline`: get_into did not return within 0.3 s"
    assert monotonic() - began < 10
