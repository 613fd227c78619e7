"""Loading configurations that are right: one model from YAML, TOML, environment and Python, with provenance."""

from __future__ import annotations

import json
import string
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dists import Distributions
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmcache_backends.cpu import CpuConfig
from lmcache_backends.gds import GdsConfig
from lmcache_core.config import DEFAULT_CONFIG, LaneConfig, Loaded, PipelineConfig, TierConfig, load, machine, text
from lmcache_core.config.diagnose import shorten
from lmcache_core.errors import ConfigError

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
    assert dumped["tiers"][0]["backend"] == {"type": "cpu", "pin": False, "shared": False}
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


# -- reading text --------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | WORDS | st.floats(-1e6, 1e6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(alphabet=string.ascii_letters, min_size=1, max_size=6), PLAIN, max_size=4))
def test_json_is_yaml_with_places(data: dict[str, Any]) -> None:
    doc = text.parse_yaml("x", json.dumps(data, ensure_ascii=False))
    assert doc.data == data
    assert doc.problems == []
    assert set(doc.places) == {(), *locs(data)}
    lines = text.parse_yaml("x", json.dumps(data, indent=1, ensure_ascii=False)).places
    assert len({place for loc, place in lines.items() if loc}) == len(lines) - 1, "every setting has its own place"


@given(st.dictionaries(st.text(alphabet=string.ascii_letters, min_size=1, max_size=6), PLAIN, max_size=4))
def test_what_pyyaml_writes_reads_back(data: dict[str, Any]) -> None:
    assert text.parse_yaml("x", yaml.safe_dump(data)).data == data


def locs(value: Any, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*loc, key)
        yield from locs(item, (*loc, key))


@pytest.mark.parametrize(
    "written, value",
    [
        ("on", "on"),
        ("yes", "yes"),
        ("True", True),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("+5", 5),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("'5'", "5"),
        ('"\\u00e9"', "é"),
        ("9" * 5000, "9" * 5000),
        ("| \n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_scalars_follow_the_core_schema(written: str, value: Any) -> None:
    assert text.parse_yaml("x", f"key: {written}").data == {"key": value}


TRICKY_TOML = [
    'a = 1\nb.c = "x # not a comment"\n"d e".f = 2 # comment\n',
    "[t]\nx = [1, 2, # one\n  [3], {y = 4, z = [5]}]\n[t.u]\nv = '''\nw = 1\n[no]\n'''\n",
    '[[a]]\nb = 1\n[[a]]\n[a.c]\nd = 2\n[[a.e]]\nf = 3\n[[a.e]]\nf = 4\n[z]\ny = """\\"""" \n',
    "x = []\ny = {}\nz = [[], {}, [[]]]\n'q.r' = 1979-05-27T07:32:00Z\ns = -inf\n",
    'k = """a""quoted""" \nl = """"tight""""\nm = ""\nn = \'\'\n',
    "[ a . b ]\r\nc=1\r\n",
    "a = { b.c = 1, b.d = [ { e = 2 } ] }\n",
]


@pytest.mark.parametrize("content", TRICKY_TOML)
def test_toml_places_cover_every_setting(content: str) -> None:
    data = tomllib.loads(content)
    doc = text.parse_toml("x", content)
    assert doc.data == data
    assert set(doc.places) == {(), *locs(data)}


TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(map(toml, value)) + "]"
    return json.dumps(value)


@given(st.dictionaries(st.text(max_size=4), TOML_VALUES, max_size=4))
def test_toml_places_of_any_document(data: dict[str, Any]) -> None:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped, and surrogates, which it has none of.
    content = "\n".join(f"{json.dumps(key)} = {toml(item)}" for key, item in data.items()).replace("\x7f", "\\u007f")
    try:
        expected = tomllib.loads(content)
    except tomllib.TOMLDecodeError:
        return
    doc = text.parse_toml("x", content)
    assert doc.data == expected
    assert set(doc.places) == {(), *locs(expected)}


def test_toml_places_are_exact() -> None:
    doc = text.parse_toml("x", '[[a]]\nb = 1\n  c = {d = 1, "e" = [1,\n 2]}\n[a.f]\ng.h = 1\n')
    assert doc.places["a", 0] == (1, 3)
    assert doc.places["a", 0, "c", "d"] == (3, 8)
    assert doc.places["a", 0, "c", "e"] == (3, 15)
    assert doc.places["a", 0, "c", "e", 1] == (4, 2)
    assert doc.places["a", 0, "f", "g", "h"] == (6, 1)


# -- classic keys --------------------------------------------------------------------------------------------

CLASSIC = """\
chunk_size: 128
local_cpu: true
max_local_cpu_size: 0.5
local_disk: "file://DIR/kv/"
max_local_disk_size: 1.5
cache_policy: LRU
remote_serde: naive
remote_url: null
save_unfull_chunk: true
enable_p2p: false
nixl_role: sender
extra_config: {a: 1}
"""


def test_a_classic_file_becomes_tiers(tmp_path: Path) -> None:
    file = write(tmp_path, CLASSIC)
    loaded = load(file, env={})
    assert loaded.config == PipelineConfig(
        chunk_tokens=128,
        tiers=(
            TierConfig(name="dram", capacity=GIB // 2, backend=CpuConfig()),
            TierConfig(name="disk", capacity=3 * GIB // 2, backend=GdsConfig(path=tmp_path / "kv")),
        ),
    )
    assert loaded.provenance["chunk_tokens"] == f"{file}:1"
    assert loaded.provenance["tiers[0].capacity"] == f"{file}:3"
    assert loaded.provenance["tiers[1].backend.path"] == f"{file}:4"
    assert loaded.provenance["tiers[1].write"] == "default"
    ignored = [note.split("`")[1] for note in loaded.notes]
    assert ignored == ["save_unfull_chunk", "enable_p2p", "nixl_role", "extra_config"]
    assert loaded.notes[0] == f"{file}:9: `save_unfull_chunk` is ignored: only whole chunks are stored"


def test_classic_variables_win_over_a_classic_file_and_stand_alone(tmp_path: Path) -> None:
    file = write(tmp_path, CLASSIC)
    env = {"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.25", "LMCACHE_LOCAL_CPU": "False"}
    loaded = load(file, env=env)
    assert loaded.config.chunk_tokens == 64
    assert loaded.config.tiers[0].capacity == GIB // 4
    assert loaded.provenance["tiers[0].capacity"] == "env:LMCACHE_MAX_LOCAL_CPU_SIZE"
    assert any("`local_cpu: false` keeps a memory tier" in note for note in loaded.notes)
    alone = load(None, env=env)
    assert (alone.source, alone.config.chunk_tokens, len(alone.config.tiers)) == ("environment", 64, 1)
    assert load(None, env={**env, "LMCACHE__CHUNK_TOKENS": "32"}).config.chunk_tokens == 32, "overlays come last"


def test_classic_variables_beside_a_tiered_file_are_reported(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, YAML), env={"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_NATIVE": "0"})
    assert loaded.config.chunk_tokens == 128
    assert len(loaded.notes) == 1
    assert loaded.notes[0].startswith("env:LMCACHE_CHUNK_SIZE: is ignored")


@pytest.mark.parametrize(
    "line, path, value, says",
    [
        ("chunk_size: abc", "chunk_size", "abc", "must be a whole number"),
        ("max_local_cpu_size: -3", "max_local_cpu_size", "-3", "must be a size in GiB"),
        ("max_local_cpu_size: lots", "max_local_cpu_size", "lots", "must be a size in GiB"),
        ("max_local_cpu_size: [1]", "max_local_cpu_size", "[...]", "must be a size in GiB"),
        ("max_local_cpu_size: 1e6", "max_local_cpu_size", "1000000.0", "can be allocated now"),
        ("max_local_cpu_siz: 3", "max_local_cpu_siz", "3", "did you mean `max_local_cpu_size`?"),
        ("local_cpu: perhaps", "local_cpu", "perhaps", "must be true or false"),
        ("local_disk: DIR/kv", "local_disk", "DIR/kv", "needs `max_local_disk_size`"),
        ("local_disk: true", "local_disk", "true", "must be a directory"),
        ("local_disk: /a,/b", "local_disk", "/a,/b", "several directories need a tier each"),
        ("cache_policy: S4-FIFO", "cache_policy", "S4-FIFO", "no eviction policy `s4-fifo` is installed"),
        ("remote_url: far://h", "remote_url", "far://h", "`pip install lmcache-backend-far`"),
        ("remote_url: host", "remote_url", "host", "must be a URL"),
        ("colour: red", "colour", "red", "unknown key"),
    ],
)
def test_classic_mistakes_name_the_classic_key(tmp_path: Path, line: str, path: str, value: str, says: str) -> None:
    rest = "" if line.startswith("max_local_cpu_size") else "max_local_cpu_size: 0.1\n"
    file = write(tmp_path, f"{line}\nsave_decode_cache: false\n{rest}")
    with pytest.raises(ConfigError) as error:
        load(file, env={})
    [problem] = error.value.problems
    assert (problem.where, problem.path) == (f"{file}:1:1", path)
    assert problem.value == value.replace("DIR", str(tmp_path))
    assert says in f"{problem.what} {problem.fix}"


def test_a_remote_url_reaches_its_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    Distributions(tmp_path).backend("s3")
    loaded = load({"remote_url": "s3://bucket/kv", "remote_serde": "naive", "max_local_cpu_size": 0.1}, env={})
    backend = loaded.config.tiers[1].backend
    assert (backend.type, backend.url) == ("s3", "s3://bucket/kv")  # type: ignore[attr-defined]


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


@pytest.mark.usefixtures("far")
def test_secrets_from_the_environment_and_in_dumps_stay_hidden() -> None:
    tiers = [*DEFAULT_CONFIG["tiers"], {"name": "cold", "backend": {"type": "far", "url": f"far://u:{CANARY}@h"}}]
    env = {"LMCACHE__TIERS__COLD__BACKEND__ACCESS_KEY": CANARY}
    loaded = load({"tiers": tiers}, env=env)
    backend: Any = loaded.config.tiers[1].backend
    assert backend.access_key.get_secret_value() == CANARY, "the plugin itself gets it"
    assert CANARY not in str(loaded.provenance) + str(loaded.notes) + backend.access_key.__repr__()
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


# -- the machine ---------------------------------------------------------------------------------------------


def proc(directory: Path, cgroup: str) -> None:
    (directory / "proc/self").mkdir(parents=True)
    (directory / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\n")
    (directory / "proc/self/cgroup").write_text(cgroup)


def group(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_text(content)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "cg")
    return tmp_path


def test_memory_without_a_cgroup(fake: Path) -> None:
    proc(fake, "")
    assert (machine.memory_total(), machine.memory_available()) == (1000 << 10, 800 << 10)


def test_memory_of_nested_version_2_groups(fake: Path) -> None:
    proc(fake, "0::/pod/box\n")
    inner = {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "anon 5\n"}
    outer = {"memory.max": "500000\n", "memory.current": "300000\n", "memory.stat": "anon 1\ninactive_file 100000\n"}
    group(fake / "cg", {"memory.max": "max"})
    group(fake / "cg/pod", outer)
    group(fake / "cg/pod/box", inner)
    assert (machine.memory_total(), machine.memory_available()) == (500000, 300000)


def test_memory_of_a_version_1_group_seen_from_inside(fake: Path) -> None:
    proc(fake, "9:memory:/host/only/path\n2:cpu:/x\n0::/\n")
    files = {
        "memory.limit_in_bytes": "400000",
        "memory.usage_in_bytes": "390000",
        "memory.stat": "cache 1 total_inactive_file 90000",
    }
    group(fake / "cg/memory", files)
    assert (machine.memory_total(), machine.memory_available()) == (400000, 100000)


def test_a_group_without_a_limit_does_not_count(fake: Path) -> None:
    proc(fake, "9:memory:/x\n")
    files = {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "1", "memory.stat": ""}
    group(fake / "cg/memory/x", files)
    assert machine.memory_total() == 1000 << 10


def test_a_budget_above_the_groups_limit_is_refused(fake: Path) -> None:
    proc(fake, "0::/\n")
    group(fake / "cg", {"memory.max": "500000", "memory.current": "100000", "memory.stat": ""})
    tier = {"name": "dram", "capacity": 450000, "backend": {"type": "cpu"}}
    with pytest.raises(ConfigError, match=r"439 KiB of memory are more than the 391 KiB"):
        load({"tiers": [tier]}, env={})
    assert isinstance(load({"tiers": [{**tier, "capacity": 390000}]}, env={}), Loaded)


# -- examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.[yt][ao]ml")), ids=lambda path: path.name)
def test_examples_load(example: Path) -> None:
    assert load(example, env={}).config.tiers[0].backend.in_memory
