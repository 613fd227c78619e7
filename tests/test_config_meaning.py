"""What a configuration says holds: no secret is shown, no plugin or overlay quietly does nothing, quotas stand."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path
from typing import Any, Literal

import pytest
from chunks import OBJECT, fill, tier
from conftest import BuildPipeline

from lmcache_core import plugins as P
from lmcache_core import redact
from lmcache_core.cli import main
from lmcache_core.config import LaneConfig, TenancyConfig, load
from lmcache_core.config.from_lmcache import convert
from lmcache_core.errors import ConfigError
from lmcache_core.hookspecs import hookimpl
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.protocols import PluginConfig
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig

DRAM = {"name": "dram", "capacity": "64MiB", "backend": {"type": "cpu"}}
LONG = "canary" + "0123456789" * 9


def refused(data: Any, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(data, env or {})
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {"tiers": [DRAM, {"name": "r", "backend": {"type": "redis", "ulr": f"redis://u:{LONG}@h:1"}}]},
        {"tiers": [DRAM, {"name": "r", "backend": {"type": "redis", "url": "redis://h:1", "pasword": LONG}}]},
        {"max_local_cpu_size": 0.1, "remote_url": f"nope://u:{LONG}@h:1"},
    ],
)
def test_a_long_secret_is_hidden_before_it_is_shortened(data: Any) -> None:
    assert "canary" not in refused(data)


@pytest.mark.parametrize("sign", ["*", "!", "&"])
def test_a_secret_that_begins_like_yaml(tmp_path: Path, sign: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "tiers:\n  - {name: dram, capacity: 64MiB, backend: {type: cpu}}\n  - name: r\n    backend:\n"
        f"      type: redis\n      url: redis://h:1\n      password: {sign}canary\n"
    )
    text = refused(file)
    assert "canary" not in text and "password" in text


@pytest.mark.parametrize("password", ["it's-canary", 'a"canary', "a canary"])
def test_a_quote_in_a_password(tmp_path: Path, capsys: Any, password: str) -> None:
    if " " not in password:
        assert "canary" not in redact.hide_urls(f"cannot reach redis://u:{password}@h:1")
    file = tmp_path / "c.toml"
    file.write_text(
        "[[tiers]]\nname='dram'\ncapacity='64MiB'\nbackend={type='cpu'}\n[[tiers]]\nname='r'\nbackend={type='redis',url="
        + json.dumps(f"redis://u:{password}@h:1")
        + "}\n"
    )
    main(["explain", str(file)])
    out = capsys.readouterr()
    assert "canary" not in out.out + out.err


def test_broken_extra_config_keeps_its_passwords() -> None:
    with pytest.raises(ConfigError) as caught:
        convert(None, {"LMCACHE_EXTRA_CONFIG": '{"password": "canary"'})
    assert "canary" not in str(caught.value)


def test_converted_urls_carry_no_password() -> None:
    env = {
        "LMCACHE_REMOTE_URL": "mooncakestore://m:1",
        "LMCACHE_EXTRA_CONFIG": '{"metadata_server": "redis://:canary@h:1"}',
    }
    assert "canary" not in convert(None, env).text


@pytest.mark.parametrize("tiers", [[], ["dram"]])
def test_seal_refuses_what_it_would_not_encrypt(tiers: list[str], monkeypatch: Any) -> None:
    from lmcache_core.build import build
    from lmcache_core.layout import KVLayout

    monkeypatch.setenv("E_KEYS", "k " + "0" * 64)
    layout = KVLayout("lknhd", "bfloat16", 2, 2, 2, 64, 16, 16)
    seal = {"type": "seal", "keys_env": "E_KEYS", "tiers": tiers}

    def start() -> None:
        loaded = load({"chunk_tokens": 16, "tiers": [DRAM], "plugins": [seal]})
        build(loaded.config, layout, plugins=loaded.plugins).close()

    with pytest.raises(ConfigError, match=r"encrypt|names no tier"):
        start()


def _wrapper(name: str, order: list[str]) -> Any:
    module = types.ModuleType(name)

    @hookimpl(wrapper=True)
    def lmcache_build_backend(config: Any, context: Any) -> Any:
        order.append(name)
        return (yield)

    module.lmcache_build_backend = lmcache_build_backend  # type: ignore[attr-defined]
    return module


def test_the_plugin_named_last_is_outermost() -> None:
    order: list[str] = []

    class Settings(PluginConfig):
        type: Literal["withset"] = "withset"

        def build(self) -> object:
            return _wrapper("withset", order)

    sys.modules["e_plain"] = _wrapper("plain", order)
    manager = P.Plugins()
    entry = importlib.metadata.EntryPoint("plain", "e_plain", P.PLUGINS)
    manager._installed = [P.Installed(P.PLUGINS, "plain", "d", "1", "e_plain", "f", entry)]
    manager.load(P.PLUGINS, "plain")  # as the loader does
    manager.activate([Settings(), "plain"])
    impls = manager._manager.hook.lmcache_build_backend.get_hookimpls()
    assert impls[-1].plugin_name == "lmcache.plugins:plain", [i.plugin_name for i in impls]


def test_an_overlay_finds_the_tenant_it_names() -> None:
    data = {"tiers": [DRAM], "tenancy": {"secret": "s" * 16, "quotas": {"Alice": "1MiB", "team-a": "1MiB"}}}
    env = {"LMCACHE__TENANCY__QUOTAS__ALICE": "2MiB", "LMCACHE__TENANCY__QUOTAS__TEAM_A": "2MiB"}
    assert load(data, env).config.tenancy.quotas == {"Alice": 2 << 20, "team-a": 2 << 20}  # type: ignore[union-attr]


@pytest.mark.timeout(60)
def test_a_quota_holds_where_the_medium_refuses_to_delete(pipelines: BuildPipeline, identity: Identity) -> None:
    injector = FaultInjector({"store": Rates()})
    medium = DictConfig()
    pipeline = pipelines(
        tier(backend=medium, capacity=32 * OBJECT, lane=LaneConfig(threads=1, deadline=30.0)),
        slots=64,
        tenancy=TenancyConfig(secret="sixteen letters!", quota="25%"),
        injector=injector,
    )
    injector["store"].fail["delete"] = OSError("Access Denied: s3:DeleteObject")
    busy = pipeline.tenant_identity(identity, "busy")
    for prompt in range(40):
        names = chunk_keys(busy, [1 + prompt] * 16 * 4)
        pipeline.store(names, fill(names))
        settle(pipeline)
    held = sum(key[:16] == busy.prefix for key in medium.objects) * OBJECT
    assert held <= 8 * OBJECT, f"{held // OBJECT} objects of a tenant that may hold 8"


def test_a_sealed_medium_still_tells_its_numbers() -> None:
    from lmcache_wrapper_seal.backend import SealedBackend
    from lmcache_wrapper_seal.keys import Masters

    from lmcache_core.testing.memory import DictBackend

    class Talking(DictBackend):
        def stats(self) -> dict[str, Any]:
            return {"io": "direct"}

    assert SealedBackend(Talking({}), Masters.parse("k " + "0" * 64, "x"), 8192, 1, 1).stats() == {"io": "direct"}


TWICE = {"tiers": [{"name": "dram", "capacity": "1GiB", "backend": {"type": "cpu"}}]}


@pytest.mark.parametrize("text", ['{"threads": 1, "threads": 7}', '{"deadline": "1s", "deadline": "1s"}'])
def test_json_in_a_variable_names_no_key_twice(text: str) -> None:
    with pytest.raises(ConfigError, match="holds a key twice"):
        load(TWICE, {"LMCACHE__TIERS__DRAM__LANE": text})


def test_nested_json_in_a_variable_names_no_key_twice() -> None:
    with pytest.raises(ConfigError, match="holds a key twice"):
        load({}, {"LMCACHE__TIERS": '[{"name": "r", "capacity": "1GiB", "backend": {"type": "cpu", "type": "cpu"}}]'})


def test_two_variables_that_name_one_setting_are_refused() -> None:
    names = ("LMCACHE__TIERS__DRAM__CAPACITY", "LMCACHE__tiers__dram__capacity")
    with pytest.raises(ConfigError, match="given twice: LMCACHE__TIERS__DRAM__CAPACITY"):
        load(TWICE, dict(zip(names, ("2GiB", "3GiB"), strict=True)))
