"""The conformance kit, run over the backends here; and proof that it finds what it should find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmcache_backends.gds import GdsConfig
from lmcache_core.protocols import BuildContext, StorageBackend
from lmcache_core.testing.memory import DictBackend, DictConfig
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests
from lmcache_core.types import ChunkKey, Got, Put


class TestDict(StorageBackendTests):
    @pytest.fixture(params=[True, False], ids=["scannable", "unscannable"])
    def open_backend(self, request: pytest.FixtureRequest) -> OpenBackend:
        return DictConfig(scannable=request.param, limit=self.capacity).build


class TestUnlimitedDict(StorageBackendTests):
    @pytest.fixture
    def open_backend(self) -> OpenBackend:
        return DictConfig(local=False).build


class TestGds(StorageBackendTests):
    @pytest.fixture(params=["segments-auto", "segments-buffered", "files-auto", "files-buffered"])
    def open_backend(self, request: pytest.FixtureRequest, tmp_path: Path) -> OpenBackend:
        mode, io = request.param.split("-")
        return GdsConfig(path=tmp_path / "tier", mode=mode, io=io, free_floor="0B").build


class Broken(DictBackend):
    """A dict that breaks one rule."""

    def __init__(self, objects: dict[ChunkKey, bytes], rule: str) -> None:
        super().__init__(objects, capacity=StorageBackendTests.capacity)
        self.rule = rule
        self.kept: list[tuple[ChunkKey, memoryview]] = []

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return super().contains(keys[::-1] if self.rule == "order" else keys)

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        for key, view in self.kept:
            self.objects[key] = bytes(view)
        if self.rule == "absent raises" and not all(super().contains(keys)):
            return [KeyError("absent")] * len(keys)
        results = super().get_into(keys, buffers)
        if self.rule == "overrun":
            for buffer in buffers:
                buffer[-1] = 0
        if self.rule == "short":
            results = [got and got - 1 for got in results]
        return results[:1] if self.rule == "few results" else results

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        if self.rule == "keeps buffers":
            self.kept += zip(keys, buffers, strict=True)
        if self.rule == "never again":
            keys, buffers = keys[:], [b for k, b in zip(keys, buffers, strict=True) if k not in self.objects]
            if len(buffers) < len(keys):
                return [FileExistsError()] * len(keys)
        results = super().put_from(keys, buffers)
        if self.rule == "full raises" and any(results):
            return [OSError(28, "No space left on device")] * len(keys)
        if self.rule == "no limit of the books" and any(results):
            self.objects.update((k, bytes(b)) for k, b in zip(keys, buffers, strict=True))
        return results

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        if self.rule == "delete needs presence":
            for key in keys:
                del self.objects[key]
        super().delete(keys if self.rule != "delete forgets" else [])

    def clear(self) -> None:
        if self.rule != "clear keeps":
            super().clear()

    def scan(self) -> Any:
        found = list(super().scan() or ())
        return iter([(key, 4096) for key, _ in found] if self.rule == "scan sizes" else found)

    def footprint(self, nbytes: int) -> int:
        return 1 if self.rule == "footprint" else nbytes


RULES = {
    "order": "test_absent_keys",
    "absent raises": "test_absent_keys",
    "overrun": "test_what_was_put_is_got",
    "short": "test_what_was_put_is_got",
    "few results": "test_what_was_put_is_got",
    "keeps buffers": "test_buffers_are_lent_for_the_call_only",
    "never again": "test_putting_again_is_allowed",
    "full raises": "test_capacity_is_hard",
    "no limit of the books": "test_capacity_is_hard",
    "delete needs presence": "test_absent_keys",
    "delete forgets": "test_deleted_keys_are_gone_and_can_return",
    "clear keeps": "test_clear_forgets_everything",
    "scan sizes": "test_scan_tells_what_is_there",
    "footprint": "test_usage_and_footprint",
}


@pytest.mark.parametrize("rule", ["", *RULES])
def test_the_kit_finds_a_broken_rule(rule: str) -> None:
    objects: dict[ChunkKey, bytes] = {}

    def open_backend(context: BuildContext) -> StorageBackend:
        return Broken(objects, rule)

    kit = StorageBackendTests()
    tests: dict[str, Callable[[OpenBackend], None]] = {
        name: getattr(kit, name) for name in dir(kit) if name.startswith("test_")
    }
    if not rule:
        for test in tests.values():
            objects.clear()
            test(open_backend)
        return
    with pytest.raises((AssertionError, OSError, KeyError)):
        tests[RULES[rule]](open_backend)
