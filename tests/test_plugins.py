"""Plugins from real distributions on `sys.path`: found, refused with reasons, imported only when named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dists import BACKEND, Distributions

from lmcache_backends.cpu import CpuConfig, CpuMemory
from lmcache_core.cli import main
from lmcache_core.cli.rigs import GdsRig
from lmcache_core.config import PipelineConfig, TierConfig, load
from lmcache_core.errors import ConfigError, PluginConflict, PluginError, UnknownPlugin
from lmcache_core.eviction.lru import LruConfig
from lmcache_core.plugins import BACKENDS, GROUPS, PLUGINS, RIGS, SERDES, Plugins, installed
from lmcache_core.protocols import API_VERSION, BuildContext, MemoryBackend, StorageBackend
from lmcache_core.testing.rig import find_rig

CONTEXT = BuildContext(tier="t", object_bytes=8192, capacity=1 << 20, threads=1)


def test_built_ins_come_in_through_entry_points() -> None:
    plugins = Plugins()
    assert plugins.backend("cpu") is CpuConfig
    assert plugins.eviction("lru") is LruConfig
    assert {"cpu", "gds"} <= set(plugins.names(BACKENDS))
    assert {p.distribution for p in installed() if p.name == "cpu" and p.group == BACKENDS} == {"lmcache-core"}


def test_installed_is_not_imported_until_named(dists: Distributions) -> None:
    module = dists.backend("s9")
    other = dists.backend("s8")
    plugins = Plugins()
    assert {"s8", "s9"} <= set(plugins.names(BACKENDS))
    assert any(p.name == "s9" and p.version == "1.2.3" and p.file == str(dists.path) for p in installed())
    load({"tiers": [{"name": "a", "capacity": "1MiB", "backend": {"type": "cpu"}}]}, env={})
    assert not dists.imported(module)
    config = plugins.backend("s9")
    assert dists.imported(module)
    assert not dists.imported(other)
    assert config(url="s9://x").type == "s9"  # type: ignore[call-arg]
    assert plugins.active == {(BACKENDS, "s9")}


def test_a_named_plugin_works_in_a_configuration(dists: Distributions) -> None:
    dists.backend("s9")
    tiers = [
        {"name": "dram", "capacity": "1MiB", "backend": {"type": "cpu"}},
        {"name": "cold", "backend": {"type": "s9", "url": "s9://bucket", "access_key": "hunter2"}},
    ]
    loaded = load({"tiers": tiers}, env={})
    backend = loaded.config.tiers[1].backend
    assert (backend.type, backend.url) == ("s9", "s9://bucket")  # type: ignore[attr-defined]
    assert "region" in loaded.config.model_dump()["tiers"][1]["backend"], "a plugin's own fields survive a dump"
    assert "hunter2" not in repr(loaded) + str(loaded.config.model_dump(mode="json"))
    assert isinstance(loaded.plugins.build_backend(backend, CONTEXT), StorageBackend)


def test_unknown_names_say_what_is_near_what_is_there_and_how_to_get_it(dists: Distributions) -> None:
    dists.backend("redis")
    with pytest.raises(UnknownPlugin) as near:
        Plugins().backend("reddis")
    assert "no backend `reddis` is installed; did you mean `redis`? installed: " in str(near.value)
    assert all(f" {name}," in str(near.value) for name in ("cpu", "gds"))
    with pytest.raises(UnknownPlugin, match=r"`pip install lmcache-backend-floppydisk`"):
        Plugins().backend("floppydisk")
    with pytest.raises(UnknownPlugin, match=r"no serde `zstdd` is installed; did you mean `zstd`\?"):
        Plugins().serde("zstdd")
    with pytest.raises(UnknownPlugin, match="no eviction policy `random_mess`"):
        Plugins().eviction("random_mess")
    with pytest.raises(UnknownPlugin, match=r"no plugin `levitate` is installed; .*installed: "):
        Plugins(["levitate"])


def test_what_is_installed_after_the_first_look_is_found(dists: Distributions) -> None:
    plugins = Plugins()
    with pytest.raises(UnknownPlugin):
        plugins.backend("late")
    dists.backend("late")
    assert plugins.backend("late").model_fields["type"].default == "late"


def test_two_distributions_claiming_one_name_are_both_named(dists: Distributions) -> None:
    dists.backend("s9", "first-s9", "plug_first")
    dists.backend("s9", "second-s9", "plug_second")
    with pytest.raises(PluginConflict) as conflict:
        Plugins().backend("s9")
    assert "first-s9 1.2.3 (plug_first) and second-s9 1.2.3 (plug_second)" in str(conflict.value)
    assert "`pip uninstall first-s9` or `pip uninstall second-s9`" in str(conflict.value)
    assert not dists.imported("plug_first")
    assert not dists.imported("plug_second")


def test_nobody_can_shadow_a_built_in(dists: Distributions) -> None:
    dists.backend("cpu", "evil-cpu")
    with pytest.raises(PluginConflict, match=r"evil-cpu 1\.2\.3 .*lmcache-core|lmcache-core .*evil-cpu 1\.2\.3"):
        Plugins().backend("cpu")


def test_a_shadowed_copy_of_a_distribution_is_no_conflict(
    dists: Distributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "older"
    older.mkdir()
    dists.add("Lmcache_Backend.s9", {BACKENDS: {"s9": "plug_old"}}, {}, version="0.9", path=older)
    dists.backend("s9")
    monkeypatch.setattr(sys, "path", [*sys.path, str(older)])
    assert Plugins().backend("s9").__module__ == "plug_s9"


BROKEN = {
    "missing dependency": (
        "import not_installed_anywhere",
        ["cannot be imported", "ModuleNotFoundError", "it needs `not_installed_anywhere`, which is not installed"],
    ),
    "error at import": (
        "raise RuntimeError('no such device')",
        ["cannot be imported: RuntimeError: no such device", "`pip install --upgrade acme-plugin`"],
    ),
    "exit at import": ("import sys; sys.exit(3)", ["cannot be imported: SystemExit: 3"]),
    "silent error": ("raise ValueError", ["cannot be imported: ValueError()"]),
    "syntax error": ("def broken(:", ["cannot be imported: SyntaxError"]),
    "no hook": ("x = 1", ["does not implement the hook `lmcache_backends`", "hookimpl"]),
    "hook of another group": (
        """
        from lmcache_core.hookspecs import hookimpl
        @hookimpl
        def lmcache_serdes(): return []
        """,
        ["does not implement the hook `lmcache_backends`"],
    ),
    "unknown hook": (
        """
        from lmcache_core.hookspecs import hookimpl
        @hookimpl
        def lmcache_backend(): return []
        """,
        ["has a wrong hook", "lmcache_backend"],
    ),
    "wrong argument": (
        """
        from lmcache_core.hookspecs import hookimpl
        @hookimpl
        def lmcache_backends(context): return []
        """,
        ["has a wrong hook", "context"],
    ),
    "not a list": (
        """
        from lmcache_core.hookspecs import hookimpl
        @hookimpl
        def lmcache_backends(): return 5
        """,
        ["must return a list of classes, not 5"],
    ),
    "empty list": (
        """
        from lmcache_core.hookspecs import hookimpl
        @hookimpl
        def lmcache_backends(): return []
        """,
        ["the entry point says `acme`, its classes say none"],
    ),
    "not a config class": (
        """
        from lmcache_core.hookspecs import hookimpl
        @hookimpl
        def lmcache_backends(): return [dict]
        """,
        ["returned <class 'dict'>, which is not a subclass of BackendConfig"],
    ),
    "abstract class": (
        """
        from typing import Literal
        from lmcache_core.hookspecs import hookimpl
        from lmcache_core.protocols import BackendConfig
        class Config(BackendConfig):
            type: Literal["acme"] = "acme"
        @hookimpl
        def lmcache_backends(): return [Config]
        """,
        ["Config does not implement build"],
    ),
    "no type": (
        """
        from lmcache_core.hookspecs import hookimpl
        from lmcache_core.protocols import BackendConfig
        class Config(BackendConfig):
            def build(self, context): ...
        @hookimpl
        def lmcache_backends(): return [Config]
        """,
        ["must declare its name", 'type: Literal["acme"] = "acme"'],
    ),
    "another type": (
        """
        from typing import Literal
        from lmcache_core.hookspecs import hookimpl
        from lmcache_core.protocols import BackendConfig
        class Config(BackendConfig):
            type: Literal["emca"] = "emca"
            def build(self, context): ...
        @hookimpl
        def lmcache_backends(): return [Config]
        """,
        ["the entry point says `acme`, its classes say `emca`; they must agree"],
    ),
    "older api": ("LMCACHE_API = 0", ["was written for plugin API 0", "`pip install --upgrade acme-plugin`"]),
    "newer api": ("LMCACHE_API = 99", ["was written for plugin API 99", "`pip install --upgrade lmcache-core`"]),
    "odd api": ("LMCACHE_API = '1'", ["was written for plugin API 1"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugins_name_distribution_version_and_cause(dists: Distributions, name: str) -> None:
    source, says = BROKEN[name]
    dists.add("acme-plugin", {BACKENDS: {"acme": "plug_acme"}}, {"plug_acme": source}, version="4.5.6")
    with pytest.raises(PluginError) as error:
        Plugins().backend("acme")
    assert "backend `acme` of acme-plugin 4.5.6 (plug_acme)" in str(error.value)
    for words in says:
        assert words in str(error.value)


def test_a_missing_module_blames_the_distribution(dists: Distributions) -> None:
    dists.add("acme-plugin", {SERDES: {"acme": "plug_nowhere"}}, {})
    with pytest.raises(PluginError, match=r"serde `acme` of acme-plugin 1\.2\.3 .*reinstall or update it"):
        Plugins().serde("acme")


WRAPPER = """
from lmcache_core.hookspecs import hookimpl
calls = []
@hookimpl(wrapper=True)
def lmcache_build_backend(config, context):
    calls.append((config.type, context.tier))
    return (yield)
"""


def test_wrappers_see_every_backend_only_where_they_are_named(dists: Distributions) -> None:
    dists.add("acme-plugin", {PLUGINS: {"watch": "plug_watch"}}, {"plug_watch": WRAPPER})
    plain = Plugins().build_backend(CpuConfig(pin=False), CONTEXT)
    assert isinstance(plain, CpuMemory)
    assert "plug_watch" not in sys.modules
    built = Plugins(["watch"]).build_backend(CpuConfig(pin=False), CONTEXT)
    assert isinstance(built, MemoryBackend)
    assert sys.modules["plug_watch"].calls == [("cpu", "t")]
    assert Plugins().build_backend(CpuConfig(pin=False), CONTEXT)
    assert len(sys.modules["plug_watch"].calls) == 1, "a wrapper belongs to the configuration that names it"


def test_a_wrapper_that_returns_something_else_is_caught(dists: Distributions) -> None:
    source = WRAPPER.replace("return (yield)", "yield\n    return 5")
    dists.add("acme-plugin", {PLUGINS: {"watch": "plug_watch"}}, {"plug_watch": source})
    with pytest.raises(PluginError, match="building backend `cpu` gave a int, not a MemoryBackend"):
        Plugins(["watch"]).build_backend(CpuConfig(pin=False), CONTEXT)


def test_an_entry_may_name_an_object_of_a_module(dists: Distributions) -> None:
    source = """
    from lmcache_core.eviction.lru import Lru
    from lmcache_core.hookspecs import hookimpl
    from lmcache_core.protocols import EvictionConfig
    from typing import Literal
    class Config(EvictionConfig):
        type: Literal["mine"] = "mine"
        def build(self): return Lru()
    class Hooks:
        @hookimpl
        def lmcache_evictions(self): return (Config,)
    hooks = Hooks()
    """
    dists.add("acme-plugin", {GROUPS[2]: {"mine": "plug_mine:hooks"}}, {"plug_mine": source})
    policy = Plugins().eviction("mine")()
    config = PipelineConfig(tiers=(TierConfig(name="a", capacity=1 << 20, backend=CpuConfig(), eviction=policy),))
    assert config.tiers[0].eviction.type == "mine"


def test_a_new_process_imports_nothing_of_what_is_only_installed(dists: Distributions, tmp_path: Path) -> None:
    """Every group at once, through loading, building and the commands that look at a configuration."""
    name = "plug_quiet"
    entries = {group: {"quiet": name} for group in GROUPS[:4]} | {RIGS: {"quiet": f"{name}:Rig"}}
    source = "import pathlib; pathlib.Path(__file__).with_suffix('.imported').touch(); raise SystemExit('imported')"
    dists.add("acme-plugin", entries, {name: source})
    config = tmp_path / "lmcache.yaml"
    config.write_text(
        "chunk_tokens: 16\ntiers:\n"
        "  - {name: dram, capacity: 4MiB, backend: {type: cpu}}\n"
        f"  - {{name: disk, capacity: 64MiB, serde: {{type: zstd}}, backend: {{type: gds, path: {tmp_path}/kv}}}}\n"
    )
    program = """
import sys
from lmcache_core.build import build
from lmcache_core.cli import main
from lmcache_core.config import load
from lmcache_core.layout import KVLayout
loaded = load(sys.argv[1], env={})
build(loaded.config, KVLayout("lknhd", "bfloat16", 2, 2, 1, 8, chunk_tokens=16, block_tokens=4)).close()
for command in ("explain", "check", "plugins"):
    assert main([command, sys.argv[1]]) == 0
assert not [name for name in sys.modules if name.startswith("plug_")]
"""
    env = {**os.environ, "PYTHONPATH": str(dists.path)}
    done = subprocess.run([sys.executable, "-c", program, str(config)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "acme-plugin" in done.stdout, "`plugins` lists it"
    assert not dists.imported(name)


STOPPED = {
    "missing": ({}, "", ["no backend `acme` is installed", "`pip install lmcache-backend-acme`"]),
    "import error": ({BACKENDS: {"acme": "plug_acme"}}, "import not_there", ["it needs `not_there`"]),
    "hook missing": ({BACKENDS: {"acme": "plug_acme"}}, "", ["does not implement the hook `lmcache_backends`"]),
    "too new": ({BACKENDS: {"acme": "plug_acme"}}, "LMCACHE_API = 2", ["`pip install --upgrade lmcache-core`"]),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_broken_named_plugin_stops_the_start(
    dists: Distributions, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    entries, source, says = STOPPED[name]
    if entries:
        dists.add("acme-plugin", entries, {"plug_acme": source}, version="4.5.6")
        says = [*says, "acme-plugin 4.5.6"]
    file = tmp_path / "lmcache.yaml"
    tiers = "  - {name: dram, capacity: 1MiB, backend: {type: cpu}}\n  - name: far\n    backend: {type: acme}\n"
    file.write_text(f"tiers:\n{tiers}")
    with pytest.raises(ConfigError) as refused:
        load(file, env={})
    assert main(["check", str(file)]) == 2
    for text in (str(refused.value), capsys.readouterr().err):
        assert f"{file}:4:" in text and "tiers[1].backend" in text
        assert all(words in text for words in says), text


def test_two_distributions_of_one_name_stop_the_start(dists: Distributions) -> None:
    dists.backend("s9", "first-s9", "plug_first")
    dists.backend("s9", "second-s9", "plug_second")
    tiers = [
        {"name": "dram", "capacity": "1MiB", "backend": {"type": "cpu"}},
        {"name": "cold", "backend": {"type": "s9", "url": "s9://bucket"}},
    ]
    with pytest.raises(ConfigError, match=r"first-s9 1\.2\.3 .* and second-s9 1\.2\.3 [\s\S]*`pip uninstall first-s9`"):
        load({"tiers": tiers}, env={})
    assert not dists.imported("plug_first") and not dists.imported("plug_second")


@pytest.mark.parametrize("group", GROUPS)
def test_every_kind_of_plugin_says_its_api(dists: Distributions, group: str) -> None:
    """Also when the entry names an object of the module."""
    source = "LMCACHE_API = 99\nclass Thing: pass"
    dists.add("acme-plugin", {group: {"acme": "plug_acme:Thing"}}, {"plug_acme": source}, version="4.5.6")
    with pytest.raises(
        PluginError, match=r"of acme-plugin 4\.5\.6 .*written for plugin API 99, this lmcache-core has 1"
    ):
        Plugins().load(group, "acme")


@pytest.mark.parametrize(
    "source", ["from lmcache_core.protocols import NotThereYet", "import lmcache_core.protocols_of_tomorrow"]
)
def test_a_plugin_for_another_core_says_so(dists: Distributions, source: str) -> None:
    dists.add("acme-plugin", {BACKENDS: {"acme": "plug_acme"}}, {"plug_acme": source})
    with pytest.raises(PluginError, match=r"written for another version .*--upgrade lmcache-core acme-plugin`"):
        Plugins().backend("acme")


def test_the_api_of_this_version_is_fine(dists: Distributions) -> None:
    source = f"LMCACHE_API = {API_VERSION}\n" + BACKEND.replace("{name}", "acme")
    dists.add("acme-plugin", {BACKENDS: {"acme": "plug_acme"}}, {"plug_acme": source})
    assert Plugins().backend("acme").__module__ == "plug_acme"


def test_rigs_are_found_by_the_backends_type(dists: Distributions) -> None:
    plugins = Plugins()
    assert plugins.rig("nobodys") is None
    assert plugins.rig("gds") is GdsRig
    dists.add("acme-plugin", {RIGS: {"acme": "plug_acme:thing"}}, {"plug_acme": "thing = 5"})
    assert Plugins().rig("acme") == 5
    with pytest.raises(PluginError, match="names 5, not a subclass of Rig"):
        find_rig(Plugins(), "acme")
