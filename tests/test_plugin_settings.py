"""Plugins in `plugins:` with settings of their own: read, checked, activated in order; their bytes are counted."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Literal

import pytest
from dists import Distributions

from lmcache_core.build import build
from lmcache_core.cli.schema import schema
from lmcache_core.config import PipelineConfig, load, named_plugins
from lmcache_core.errors import ConfigError, PluginError
from lmcache_core.hookspecs import hookimpl
from lmcache_core.layout import KVLayout
from lmcache_core.plugins import PLUGINS, Plugins
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, PluginConfig, StorageBackend
from lmcache_core.testing.memory import DictBackend, DictConfig

CONTEXT = BuildContext(tier="cold", object_bytes=8192, capacity=1 << 20, threads=1)
LAYOUT = KVLayout("lknhd", "bfloat16", 1, 2, 2, 16, chunk_tokens=256, block_tokens=16)
TIERS = [
    {"name": "dram", "capacity": "1MiB", "backend": {"type": "cpu"}},
    {"name": "cold", "backend": {"type": "s9", "url": "s9://x"}},
]
MARKER = """
from typing import Literal
from pydantic import SecretStr
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import PluginConfig

built = []

class Config(PluginConfig):
    type: Literal["marker"] = "marker"
    colour: str = "red"
    password: SecretStr | None = None
    def build(self):
        built.append(self)
        return object()

@hookimpl
def lmcache_plugins(): return [Config]
"""


@pytest.fixture
def dists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distributions]:
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    found = Distributions(path)
    found.backend("s9")
    found.add("acme-marker", {PLUGINS: {"marker": "plug_marker"}}, {"plug_marker": MARKER})
    plain = "from lmcache_core.hookspecs import hookimpl\n"
    found.add("acme-plain", {PLUGINS: {"plain": "plug_plain"}}, {"plug_plain": plain})
    yield found
    for module in ("plug_s9", "plug_marker", "plug_plain"):
        sys.modules.pop(module, None)


class WrapperConfig(PluginConfig):
    """Adds bytes to each object, and notes what it sees."""

    type: Literal["wrapper"] = "wrapper"
    name: str = ""
    adds: int = 0

    def build(self) -> Wrapper:
        return Wrapper(self)


class Wrapper:
    seen: list[tuple[str, int]] = []  # noqa: RUF012

    def __init__(self, config: WrapperConfig) -> None:
        self.config = config

    @hookimpl
    def lmcache_object_overhead(self, config: BackendConfig, context: BuildContext) -> int:
        return self.config.adds if self.config.applies_to(context.tier) else 0

    @hookimpl(wrapper=True)
    def lmcache_build_backend(
        self, config: BackendConfig, context: BuildContext
    ) -> Generator[None, StorageBackend | MemoryBackend, StorageBackend | MemoryBackend]:
        inner = yield
        self.seen.append((self.config.name, context.object_bytes))
        return inner


class SizedConfig(DictConfig):
    def build(self, context: BuildContext) -> DictBackend:
        Wrapper.seen.append(("backend", context.object_bytes))
        return super().build(context)


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    Wrapper.seen.clear()


def test_the_backend_is_built_for_what_the_wrappers_add() -> None:
    plugins = Plugins()
    config = SizedConfig()
    plugins.activate([WrapperConfig(name="a", adds=80), WrapperConfig(name="b", adds=16)])
    plugins.build_backend(config, CONTEXT)
    assert Wrapper.seen == [("backend", 8288), ("a", 8288), ("b", 8288)], "the one named last is the outermost"


def test_only_the_latest_configuration_is_active() -> None:
    plugins = Plugins()
    plugins.activate([WrapperConfig(name="a", adds=80)])
    plugins.activate([WrapperConfig(name="b", adds=1, tiers=("warm",))])
    plugins.build_backend(SizedConfig(), CONTEXT)
    assert Wrapper.seen == [("backend", 8192), ("b", 8192)]
    plugins.activate([])
    plugins.build_backend(SizedConfig(), CONTEXT)
    assert Wrapper.seen[2:] == [("backend", 8192)]


def test_a_wrong_hook_is_a_plugin_error() -> None:
    class Wrong:
        @hookimpl
        def lmcache_build_backend(self, kind: str) -> None:
            raise AssertionError

    class WrongConfig(PluginConfig):
        type: Literal["wrong"] = "wrong"

        def build(self) -> Wrong:
            return Wrong()

    with pytest.raises(PluginError, match="plugin `wrong` has a wrong hook"):
        Plugins().activate([WrongConfig()])


def test_settings_stand_beside_the_type(dists: Distributions) -> None:
    items = [{"type": "marker", "colour": "blue", "tiers": ["cold"], "password": "hunter2"}, "marker", "plain"]
    loaded = load({"plugins": items, "tiers": TIERS}, env={})
    blue, red, plain = loaded.config.plugins
    assert isinstance(blue, PluginConfig) and isinstance(red, PluginConfig)
    assert (blue.colour, blue.tiers) == ("blue", ("cold",))  # type: ignore[attr-defined]
    assert (red.colour, red.tiers, plain) == ("red", None, "plain")  # type: ignore[attr-defined]
    assert "hunter2" not in repr(loaded) + str(loaded.config.model_dump(mode="json"))
    assert loaded.config.model_dump(mode="json")["plugins"][0]["colour"] == "blue"
    assert loaded.provenance["plugins[0].colour"] == "python"
    build(loaded.config, LAYOUT, plugins=loaded.plugins).close()
    assert [config.colour for config in sys.modules["plug_marker"].built] == ["blue", "red"]
    assert named_plugins({"plugins": items, "tiers": TIERS}, env={})[0] >= {(PLUGINS, "marker"), (PLUGINS, "plain")}


def problems(item: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load({"plugins": [item], "tiers": TIERS}, env={})
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_wrong_settings_are_told_as_any_other(dists: Distributions) -> None:
    assert "plugins[0].color" in (text := problems({"type": "marker", "color": "x"}))
    assert "did you mean `colour`?" in text
    assert "no plugin `markr` is installed; did you mean `marker`?" in problems({"type": "markr"})
    assert "plugin `plain` takes no settings" in problems({"type": "plain", "colour": "x"})
    assert "no plugin `markr` is installed; did you mean `marker`?" in problems("markr")
    assert "a plugin's name, or its settings as `{type: name, ...}`" in problems(5)
    assert "is required and missing" in problems({"colour": "x"})
    text = problems({"type": "marker", "tiers": ["clod"]})
    assert "plugins[0].tiers[0]: clod" in text
    assert "no tier has this name; did you mean `cold`?" in text


def test_all_problems_are_told_at_once(dists: Distributions) -> None:
    """A tier that is not there, beside settings that keep the models from being made."""
    items = [{"type": "marker", "color": "x", "tiers": ["clod"]}, {"type": "marker", "tiers": [5]}, "markr"]
    with pytest.raises(ConfigError) as caught:
        load({"plugins": items, "tiers": TIERS}, env={})
    paths = [problem.path for problem in caught.value.problems]
    assert sorted(paths) == ["plugins[0].color", "plugins[0].tiers[0]", "plugins[1].tiers[0]", "plugins[2]"]


def test_python_takes_the_models_themselves(dists: Distributions) -> None:
    tiers = [{"name": "dram", "capacity": "1MiB", "backend": {"type": "cpu"}}]
    config = PipelineConfig.model_validate({"plugins": [WrapperConfig(name="a")], "tiers": tiers})
    assert config.plugins == (WrapperConfig(name="a"),)


def test_editors_may_write_settings(dists: Distributions) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    for items, good in (
        (["marker"], True),
        ([{"type": "marker", "colour": "blue"}], True),
        ([{"colour": "blue"}], False),
        ([5], False),
    ):
        tiers = [{"name": "dram", "capacity": "1GiB", "backend": {"type": "cpu"}}]
        assert validator.is_valid({"plugins": items, "tiers": tiers}) is good
