"""Loading configurations that are right: one model from YAML, TOML, environment and Python, with provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from dists import Distributions
from pydantic import BaseModel, ValidationError

from lmcache_backends.cpu import CpuConfig
from lmcache_backends.gds import GdsConfig
from lmcache_core import cli
from lmcache_core.cli import check
from lmcache_core.config import (
    DEFAULT_CONFIG,
    LaneConfig,
    PipelineConfig,
    TierConfig,
    classic,
    load,
    machine,
)
from lmcache_core.config.convert import Kind
from lmcache_core.config.findings import Code, shorten
from lmcache_core.errors import ConfigError
from lmcache_core.lanes import Breaker
from lmcache_core.protocols import BackendConfig, EvictionConfig, PluginConfig, SerdeConfig

ROOT = Path(__file__).parent.parent
GIB = 1 << 30

YAML = """\
chunk_tokens: 128
tiers:
  - name: dram
    capacity: 64MiB
    backend: {type: cpu, pin: false}
  - name: nvme
    capacity: 1GiB
    write: back
    lane: {threads: 4, deadline: 500ms}
    backend:
      type: gds
      path: DIR/kv
"""
TOML = """\
chunk_tokens = 128
[[tiers]]
name = "dram"
capacity = "64MiB"
backend = {type = "cpu", pin = false}
[[tiers]]
name = "nvme"
capacity = "1GiB"
write = "back"
lane.threads = 4
lane.deadline = "500ms"
[tiers.backend]
type = "gds"
path = "DIR/kv"
"""


def python(directory: Path) -> PipelineConfig:
    return PipelineConfig(
        chunk_tokens=128,
        tiers=(
            TierConfig(name="dram", capacity=64 << 20, backend=CpuConfig(pin=False)),
            TierConfig(
                name="nvme",
                capacity=GIB,
                write="back",
                lane=LaneConfig(threads=4, deadline=0.5),
                backend=GdsConfig(path=directory / "kv"),
            ),
        ),
    )


def write(directory: Path, content: str, name: str = "lmcache.yaml") -> Path:
    file = directory / name
    file.write_text(content.replace("DIR", str(directory)))
    return file


# -- one model, many sources ---------------------------------------------------------------------------------


def test_every_source_gives_the_same_model(tmp_path: Path) -> None:
    expected = python(tmp_path)
    from_yaml = load(write(tmp_path, YAML), env={})
    from_toml = load(str(write(tmp_path, TOML, "lmcache.toml")), env={})
    from_json = load(write(tmp_path, json.dumps(expected.model_dump(mode="json")), "lmcache.json"), env={})
    from_python = load({"chunk_tokens": 128, "tiers": list(expected.tiers)}, env={})
    from_env = load(
        {"tiers": [{"name": "dram"}, {"name": "nvme"}]},
        env={
            "LMCACHE__CHUNK_TOKENS": "128",
            "LMCACHE__TIERS__DRAM__CAPACITY": "64MiB",
            "LMCACHE__TIERS__DRAM__BACKEND": '{"type": "cpu", "pin": false}',
            "LMCACHE__TIERS__NVME__CAPACITY": "1GiB",
            "LMCACHE__TIERS__NVME__WRITE": "back",
            "LMCACHE__TIERS__NVME__LANE__THREADS": "4",
            "LMCACHE__TIERS__NVME__LANE__DEADLINE": "500ms",
            "LMCACHE__TIERS__NVME__BACKEND__TYPE": "gds",
            "LMCACHE__TIERS__NVME__BACKEND__PATH": str(tmp_path / "kv"),
        },
    )
    for loaded in (from_yaml, from_toml, from_json, from_python, from_env):
        assert loaded.config == expected
        assert loaded.notes == ()


def test_models_are_frozen_refuse_unknown_keys_and_survive_dumps(tmp_path: Path) -> None:
    config = python(tmp_path)
    dumped = config.model_dump(mode="json")
    assert dumped["tiers"][0]["backend"] == {"type": "cpu", "pin": False, "numa_node": None, "shared": False}
    assert dumped["tiers"][1]["eviction"] == {"type": "lru"}
    assert PipelineConfig.model_validate(dumped) == config
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config
    assert load(dumped, env={}).config == config
    with pytest.raises(ValidationError, match="frozen"):
        config.chunk_tokens = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        TierConfig(name="a", capacity=1, backend=CpuConfig(), colour="red")  # type: ignore[call-arg]


def test_python_objects_are_checked_too() -> None:
    memory = TierConfig(name="dram", capacity=1 << 20, backend=CpuConfig())
    with pytest.raises(ValidationError, match="tier names must differ"):
        PipelineConfig(tiers=(memory, memory))
    with pytest.raises(ValidationError, match="needs a capacity"):
        TierConfig(name="dram", backend=CpuConfig())
    with pytest.raises(ValidationError, match="there are no tiers"):
        PipelineConfig(tiers=())
    with pytest.raises(ValidationError, match="did you mean `cpu`"):
        TierConfig(name="dram", capacity=1, backend={"type": "cpuu"})  # type: ignore[arg-type]


def test_strings_and_shares_in_python() -> None:
    tier = TierConfig(name="dram", capacity="25%", backend={"type": "cpu"}, lane={"deadline": "2s"})  # type: ignore[arg-type]
    assert tier.capacity == machine.memory_total() // 4
    assert (tier.backend, tier.lane.deadline) == (CpuConfig(), 2.0)


def test_a_share_of_a_disk_is_of_its_file_system(tmp_path: Path) -> None:
    file = write(tmp_path, YAML.replace("capacity: 1GiB", "capacity: 10%"))
    assert load(file, env={}).config.tiers[1].capacity == machine.disk(tmp_path).total // 10


def test_a_share_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    Distributions(tmp_path).backend("far")
    tiers = [*DEFAULT_CONFIG["tiers"], {"name": "cold", "capacity": "5%", "backend": {"type": "far", "url": "u"}}]
    with pytest.raises(ConfigError, match="a share such as 5% has no meaning for backend `far`"):
        load({"tiers": tiers}, env={})


def test_load_leaves_the_given_mapping_alone() -> None:
    source = {"tiers": [{"name": "dram", "capacity": "1MiB", "backend": {"type": "cpu"}}]}
    before = json.dumps(source)
    loaded = load(source, env={"LMCACHE__TIERS__DRAM__CAPACITY": "2MiB"})
    assert loaded.config.tiers[0].capacity == 2 << 20
    assert json.dumps(source) == before


# -- where values come from ----------------------------------------------------------------------------------


def test_provenance_of_a_file_with_overlays(tmp_path: Path) -> None:
    file = write(tmp_path, YAML)
    loaded = load(
        file, env={"LMCACHE__TIERS__NVME__CAPACITY": "2GiB", "LMCACHE__TIERS__NVME__EVICTION": '{"type": "lru"}'}
    )
    assert loaded.source == str(file)
    got = loaded.provenance
    assert got["chunk_tokens"] == f"{file}:1"
    assert got["verify"] == "default"
    assert got["tiers[0].backend.pin"] == f"{file}:5"
    assert got["tiers[0].backend.shared"] == "default"
    assert got["tiers[1].capacity"] == "env:LMCACHE__TIERS__NVME__CAPACITY"
    assert got["tiers[1].eviction.type"] == "env:LMCACHE__TIERS__NVME__EVICTION"
    assert got["tiers[1].backend.path"] == f"{file}:12"
    assert got["tiers[1].lane.deadline"] == f"{file}:9"
    assert got["tiers[1].lane.queue"] == "default"
    assert leaves(loaded.config.model_dump()) == set(got), "every value has an origin"


def test_provenance_of_toml_and_python(tmp_path: Path) -> None:
    file = write(tmp_path, TOML, "lmcache.toml")
    got = load(file, env={}).provenance
    assert got["tiers[1].lane.deadline"] == f"{file}:11"
    assert got["tiers[1].backend.path"] == f"{file}:14"
    assert got["tiers[0].backend.pin"] == f"{file}:5"
    got = load({"tiers": list(python(tmp_path).tiers)}, env={}).provenance
    assert got["tiers[0].backend.pin"] == "python"
    assert got["tiers[0].backend.shared"] == "default"
    assert got["tiers[1].name"] == "python"


def leaves(value: Any, path: str = "") -> set[str]:
    if isinstance(value, dict) and value:
        return set().union(*(leaves(item, f"{path}.{key}" if path else key) for key, item in value.items()))
    if isinstance(value, (list, tuple)) and value:
        return set().union(*(leaves(item, f"{path}[{i}]") for i, item in enumerate(value)))
    return {path}


def test_the_default_is_one_modest_memory_tier() -> None:
    loaded = load(None, env={})
    assert (loaded.source, loaded.notes) == ("default", ())
    assert [(t.name, t.capacity, t.backend) for t in loaded.config.tiers] == [("dram", GIB, CpuConfig())]
    assert set(loaded.provenance.values()) == {"default"}
    overlaid = load(None, env={"LMCACHE__TIERS__DRAM__CAPACITY": "2MiB"})
    assert overlaid.config.tiers[0].capacity == 2 << 20
    assert load(None, env={}).config.tiers[0].capacity == GIB, "an overlay never changes the default itself"


def test_the_environment_can_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, YAML)
    assert load(None, env={"LMCACHE_CONFIG_FILE": str(file)}).source == str(file)
    other = write(tmp_path, YAML.replace("128", "64"), "other.yaml")
    assert load(other, env={"LMCACHE_CONFIG_FILE": str(file)}).config.chunk_tokens == 64, "the argument wins"
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(other))
    assert load().config.chunk_tokens == 64, "os.environ is the default"


def test_overlays_change_whole_parts_before_their_keys(tmp_path: Path) -> None:
    env = {
        "LMCACHE__TIERS__NVME__LANE__THREADS": "7",
        "LMCACHE__TIERS__NVME__LANE": '{"queue": 9}',
        "LMCACHE__TIERS__NVME__SERDE": "null",
        "LMCACHE__PLUGINS": "[]",
    }
    lane = load(write(tmp_path, YAML), env=env).config.tiers[1].lane
    assert (lane.threads, lane.queue, lane.deadline) == (7, 9, 5.0)


def test_tier_names_fold_dashes_in_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, YAML.replace("name: nvme", "name: nvme-0"))
    assert load(file, env={"LMCACHE__TIERS__NVME_0__WRITE": "never"}).config.tiers[1].write == "never"


# -- secrets -------------------------------------------------------------------------------------------------

CANARY = "hunter2-canary"

LEAKS = {
    "typed secret of a wrong type": {"url": "far://x", "access_key": {"a": CANARY}},
    "typed secret beside a mistake": {"url": 5, "access_key": CANARY},
    "misspelt secret": {"url": "far://x", "acess_key": CANARY},
    "secret under a telling name": {"url": "far://x", "password": CANARY},
    "unknown api key": {"url": "far://x", "api_key": CANARY},
    "password in a url": {"url": f"far://user:{CANARY}@host/x", "regoin": "here"},
    "password in a wrong url": {"url": [f"far://user:{CANARY}@host/x"]},
    "token in a query": {"url": f"far://host/x?token={CANARY}&a=1", "x": 1},
    "password with a slash": {"uri": f"far://user:{CANARY}/{CANARY}@host"},
    "secret in a wrong place": {"url": "far://x", "region": {"secret_key": CANARY}},
}


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    Distributions(tmp_path).backend("far")


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.usefixtures("far")
def test_no_error_shows_a_secret(tmp_path: Path, name: str) -> None:
    tiers = [*DEFAULT_CONFIG["tiers"], {"name": "cold", "backend": {"type": "far", **LEAKS[name]}}]
    for source in ({"tiers": tiers}, write(tmp_path, yaml.safe_dump({"tiers": tiers}))):
        with pytest.raises(ConfigError) as error:
            load(source, env={})
        chain: list[BaseException] = [error.value]
        while (nested := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(nested)
        for shown in (part for e in chain for part in (str(e), repr(e), repr(getattr(e, "problems", "")))):
            assert CANARY not in shown


def test_a_plugin_that_repeats_a_secret_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = Distributions(tmp_path).backend("near")
    source = (tmp_path / f"{module}.py").read_text()
    validator = """
    @model_validator(mode="after")
    def _check(self):
        raise ValueError(f"cannot log in as {self.access_key.get_secret_value()}")
    def build("""
    source = source.replace("    def build(", validator).replace(
        "import SecretStr", "import SecretStr, model_validator"
    )
    (tmp_path / f"{module}.py").write_text(source)
    backend = {"type": "near", "url": "u", "access_key": CANARY}
    with pytest.raises(ConfigError, match=r"cannot log in as \*\*\*") as error:
        load({"tiers": [*DEFAULT_CONFIG["tiers"], {"name": "cold", "backend": backend}]}, env={})
    assert CANARY not in str(error.value)


@pytest.mark.usefixtures("far")
def test_secrets_from_the_environment_and_in_dumps_stay_hidden() -> None:
    tiers = [*DEFAULT_CONFIG["tiers"], {"name": "cold", "backend": {"type": "far", "url": f"far://u:{CANARY}@h"}}]
    env = {"LMCACHE__TIERS__COLD__BACKEND__ACCESS_KEY": CANARY}
    loaded = load({"tiers": tiers}, env=env)
    backend: Any = loaded.config.tiers[1].backend
    assert backend.access_key.get_secret_value() == CANARY, "the plugin itself gets it"
    assert CANARY not in repr(loaded) + str(loaded.config) + str(loaded.provenance)
    with pytest.raises(ConfigError) as error:
        load({"tiers": tiers}, env={**env, "LMCACHE__TIERS__COLD__BACKEND__REGION": "[1]"})
    assert CANARY not in str(error.value)
    with pytest.raises(ConfigError) as error:
        load({"remote_url": f"far:{CANARY}@h", "max_local_cpu_size": 0.1}, env={})
    assert CANARY not in str(error.value)


def test_values_are_shown_short_and_on_one_line() -> None:
    assert shorten("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert shorten("x" * 500) == "x" * 77 + "..."
    assert (shorten(None), shorten(True), shorten({}), shorten({"a": 1}), shorten([1])) == (
        "null",
        "true",
        "{}",
        "{...}",
        "[...]",
    )
    assert shorten("") == "''"


# -- examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.[yt][ao]ml")), ids=lambda path: path.name)
def test_examples_load(example: Path) -> None:
    assert load(example, env={}).config.tiers[0].backend.in_memory


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and those inside it, but for plugins' own."""
    yield model
    for field in model.model_fields.values():
        for part in [field.annotation, *get_args(field.annotation), *map(_first, get_args(field.annotation))]:
            plugin = (BackendConfig, SerdeConfig, EvictionConfig, PluginConfig)
            if isinstance(part, type) and issubclass(part, BaseModel) and not issubclass(part, plugin):
                yield from _models(part)


def _first(annotation: Any) -> Any:
    return next(iter(get_args(annotation)), None)


def test_the_manual_names_every_setting_and_no_stale_one() -> None:
    manual = (ROOT / "docs/configuration.md").read_text()
    settings = manual[manual.index("## Settings") : manual.index("## Environment")]
    plugins = settings[settings.index("<!-- begin") : settings.index("<!-- end -->")]
    tables = "\n".join(re.findall(r"\| key \| default \| meaning \|\n(?:\|.*\n)+", settings.replace(plugins, "")))
    documented = set(re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE))
    models = list(_models(PipelineConfig))
    assert {TierConfig, LaneConfig} <= set(models)
    assert documented == {key for model in models for key in model.model_fields}


def test_the_manual_has_the_tables_of_the_built_in_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    manual = (ROOT / "docs/configuration.md").read_text()
    assert cli.main(["schema", "--markdown"]) == 0
    written = re.search(r"<!-- begin: lmcachectl schema --markdown -->\n(.*?)<!-- end -->", manual, re.DOTALL)
    assert written is not None
    assert written[1] == capsys.readouterr().out, "run it again and paste it"


def test_the_manual_names_every_code_key_and_kind() -> None:
    manual = (ROOT / "docs/configuration.md").read_text()
    for code in Code:
        assert f"| `{code}` |" in manual
    for key in classic.TRANSLATED:
        assert f"`{key}`" in manual
    for kind in Kind:
        assert f"| `{kind}` |" in manual
    for words in (f"{Breaker.ERRORS_IN_A_ROW} errors in a row", f"{Breaker.DEADLINES_IN_A_ROW} missed deadlines"):
        assert words in manual
    assert f"{Breaker.RATE:.0%}".replace("%", " %") in manual
    assert f"{check._BUILD_S:.0f} seconds" in manual
