"""The corpus of broken configurations: text -> what must be said about it. `DIR` stands for the test's directory."""

from __future__ import annotations

Says = tuple[str, str, str, str]
"""Place after the file's name (a prefix where it ends in `:`), path, value, words of the message or of the mend."""

GOOD = """\
chunk_tokens: 256
tiers:
  - name: dram
    capacity: 64MiB
    backend: {type: cpu}
  - name: nvme
    capacity: 1GiB
    write: through
    backend: {type: gds, path: DIR/kv}
"""


def change(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


MEMORY_LINE = "  - {name: m, capacity: 1MiB, backend: {type: cpu}}\n"

YAML: dict[str, tuple[str, list[Says]]] = {
    # -- keys ------------------------------------------------------------------------------------------------
    "misspelt top key": (
        change("chunk_tokens: 256", "chunk_tokns: 128"),
        [("1:1", "chunk_tokns", "128", "did you mean `chunk_tokens`?")],
    ),
    "misspelt tiers": (change("tiers:", "teirs:"), [("2:1", "teirs", "[...]", "did you mean `tiers`?")]),
    "misspelt capacity": (
        change("capacity: 64MiB", "capcity: 64MiB"),
        [("4:5", "tiers[0].capcity", "64MiB", "did you mean `capacity`?")],
    ),
    "misspelt name": (change("- name: nvme", "- nmae: nvme"), [("6:5", "tiers[1].nmae", "nvme", "`name`")]),
    "misspelt type": (
        change("backend: {type: cpu}", "backend: {typ: cpu}"),
        [("5:15", "tiers[0].backend.typ", "cpu", "did you mean `type`?")],
    ),
    "misspelt plugin key": (
        change("path: DIR/kv", "pth: DIR/kv"),
        [("9:26", "tiers[1].backend.pth", "DIR/kv", "did you mean `path`?")],
    ),
    "misspelt and given": (
        change("    capacity: 1GiB\n", "    capacity: 1GiB\n    capasity: 2GiB\n"),
        [("8:5", "tiers[1].capasity", "2GiB", "`capacity` is given already: keep one")],
    ),
    "misspelt lane key": (
        change("    write: through\n", "    lane: {treads: 4}\n"),
        [("8:12", "tiers[1].lane.treads", "4", "did you mean `threads`?")],
    ),
    "as near to a given key as to a free one": (
        change("    write: through\n", "    nane: {threads: 4}\n"),
        [("8:5", "tiers[1].nane", "{...}", "did you mean `lane`?")],
    ),
    "upper case key": (change("write: through", "Write: back"), [("8:5", "tiers[1].Write", "back", "`write`")]),
    "key of another place, inwards": (
        change("    write: through\n", "    path: /x\n"),
        [("8:5", "tiers[1].path", "/x", "move it into `backend:`")],
    ),
    "key of another place, outwards": (
        change("backend: {type: cpu}", "backend: {type: cpu, capacity: 1GiB}"),
        [("5:26", "tiers[0].backend.capacity", "1GiB", "move it out to `tiers[0]`")],
    ),
    "tier key at the top": ("capacity: 1GiB\n" + GOOD, [("1:1", "capacity", "1GiB", "move it into a tier")]),
    "top key in a tier": (
        change("    write: through\n", "    chunk_tokens: 16\n"),
        [("8:5", "tiers[1].chunk_tokens", "16", "move it out to the top level")],
    ),
    "lane key in a tier": (
        change("    write: through\n", "    threads: 8\n"),
        [("8:5", "tiers[1].threads", "8", "move it into a lane: `lane: {threads: ...}`")],
    ),
    "classic key in a tiered file": (
        "chunk_size: 128\n" + GOOD.partition("\n")[2],
        [("1:1", "chunk_size", "128", "rename it to `chunk_tokens`")],
    ),
    "unknown key without a likeness": (
        change("    write: through\n", "    colour: red\n"),
        [("8:5", "tiers[1].colour", "red", "keys here: `name`")],
    ),
    # -- values ----------------------------------------------------------------------------------------------
    "chunk size in words": (change("256", "abc"), [("1:1", "chunk_tokens", "abc", "must be a whole number")]),
    "chunk size of a half": (change("256", "256.5"), [("1:1", "chunk_tokens", "256.5", "must be a whole number")]),
    "chunk size of truth": (change("256", "true"), [("1:1", "chunk_tokens", "true", "must be a whole number")]),
    "chunk size null": (change("256", "null"), [("1:1", "chunk_tokens", "null", "must be a whole number")]),
    "chunk size zero": (change("256", "0"), [("1:1", "chunk_tokens", "0", "must be at least 1")]),
    "chunk size huge": (change("256", "1000000"), [("1:1", "chunk_tokens", "1000000", "must be at most 65536")]),
    "negative capacity": (change("64MiB", "-3"), [("4:5", "tiers[0].capacity", "-3", "not negative")]),
    "capacity zero": (change("64MiB", "0"), [("4:5", "tiers[0].capacity", "0", "must be above 0")]),
    "ambiguous unit": (change("64MiB", "4G"), [("4:5", "tiers[0].capacity", "4G", "`GiB` counts in 1024s")]),
    "unknown unit": (change("64MiB", "4GX"), [("4:5", "tiers[0].capacity", "4GX", "unknown unit `GX`")]),
    "capacity in words": (change("64MiB", "plenty"), [("4:5", "tiers[0].capacity", "plenty", "written like 4GiB")]),
    "share above the whole": (change("1GiB", "120%"), [("7:5", "tiers[1].capacity", "120%", "at most 100%")]),
    "capacity as a mapping": (
        change("1GiB", "{max: 1GiB}"),
        [("7:5", "tiers[1].capacity", "{...}", "a number or text")],
    ),
    "write mode": (
        change("write: through", "write: thru"),
        [("8:5", "tiers[1].write", "thru", "did you mean `through`?")],
    ),
    "write mode unlike any": (
        change("write: through", "write: sometimes"),
        [("8:5", "tiers[1].write", "sometimes", "choose one of `through`, `back`, `never`")],
    ),
    "verify mode": ("verify: serv\n" + GOOD, [("1:1", "verify", "serv", "did you mean `serve`?")]),
    "promote in words": (
        change("write: through", "promote: maybe"),
        [("8:5", "tiers[1].promote", "maybe", "must be true or false")],
    ),
    "name with a space": (change("name: nvme", "name: my disk"), [("6:5", "tiers[1].name", "my disk", "lower-case")]),
    "name in capitals": (change("name: nvme", "name: NVMe"), [("6:5", "tiers[1].name", "NVMe", "lower-case")]),
    "name that is a number": (change("name: nvme", "name: 5"), [("6:5", "tiers[1].name", "5", "put it in quotes")]),
    "name with a double underscore": (change("name: nvme", "name: a__b"), [("6:5", "tiers[1].name", "a__b", "single")]),
    "tiers as a mapping": (
        "tiers:\n  dram: {capacity: 1GiB, backend: {type: cpu}}\n",
        [("1:1", "tiers", "{...}", "give it its key as `name:`")],
    ),
    "tiers as text": ("tiers: cpu\n", [("1:1", "tiers", "cpu", "must be a list")]),
    "tier as text": ("tiers:\n  - cpu\n", [("2:5", "tiers[0]", "cpu", "must be a mapping of settings")]),
    "backend as text": (
        change("backend: {type: cpu}", "backend: cpu"),
        [("5:5", "tiers[0].backend", "cpu", "write `backend: {type: cpu}`")],
    ),
    "type as a number": (change("{type: cpu}", "{type: 7}"), [("5:15", "tiers[0].backend.type", "7", "must be text")]),
    "plugins as text": ("plugins: watch\n" + GOOD, [("1:1", "plugins", "watch", "must be a list")]),
    "deadline zero": (
        change("write: through", "lane: {deadline: 0}"),
        [("8:12", "tiers[1].lane.deadline", "0", "must be above 0")],
    ),
    "deadline negative": (
        change("write: through", "lane: {deadline: -2s}"),
        [("8:12", "tiers[1].lane.deadline", "-2s", "not negative")],
    ),
    "deadline unit": (
        change("write: through", "lane: {deadline: 5 sconds}"),
        [("8:12", "tiers[1].lane.deadline", "5 sconds", "unknown unit `sconds`")],
    ),
    "deadline of a day": (
        change("write: through", "lane: {deadline: 24h}"),
        [("8:12", "tiers[1].lane.deadline", "24h", "must be at most 3600")],
    ),
    "no threads": (
        change("write: through", "lane: {threads: 0}"),
        [("8:12", "tiers[1].lane.threads", "0", "at least 1")],
    ),
    "endless queue": (
        change("write: through", "lane: {queue: .inf}"),
        [("8:12", "tiers[1].lane.queue", ".inf", "whole number")],
    ),
    "no bytes in flight": (
        change("write: through", "lane: {inflight: 0}"),
        [("8:12", "tiers[1].lane.inflight", "0", "must be above 0")],
    ),
    "plugin's own check": (
        change("path: DIR/kv", "path: DIR/kv, inodes: 100"),
        [("9:5", "tiers[1].backend", "{...}", "inodes has no meaning in mode `segments`")],
    ),
    # -- missing ---------------------------------------------------------------------------------------------
    "no tiers": ("chunk_tokens: 256\n", [("1:1", "tiers", "", "is required and missing")]),
    "empty file": ("", [("1:1", "tiers", "", "is required and missing")]),
    "empty tiers": ("tiers: []\n", [("1:1", "tiers", "[]", "there are no tiers")]),
    "no name": (
        change("- name: nvme\n    capacity", "- capacity"),
        [("6:5", "tiers[1].name", "", "add e.g. `name: dram`")],
    ),
    "no backend": (
        change("    backend: {type: cpu}\n", ""),
        [("3:5", "tiers[0].backend", "", "add e.g. `backend: {type: cpu}`")],
    ),
    "no type": (change("{type: cpu}", "{}"), [("5:5", "tiers[0].backend.type", "", "is required and missing")]),
    "no path": (change(", path: DIR/kv", ""), [("9:5", "tiers[1].backend.path", "", "add e.g. `path: ")]),
    "no capacity of memory": (
        change("    capacity: 64MiB\n", ""),
        [("3:5", "tiers[0].capacity", "", "a `cpu` tier needs")],
    ),
    "no capacity of a disk": (
        change("    capacity: 1GiB\n", ""),
        [("6:5", "tiers[1].capacity", "", "a `gds` tier needs")],
    ),
    # -- plugins ---------------------------------------------------------------------------------------------
    "misspelt backend": (
        change("type: gds", "type: gsd"),
        [("9:15", "tiers[1].backend.type", "gsd", "did you mean `gds`?")],
    ),
    "backend to install": (
        change("type: gds", "type: papertape"),
        [("9:15", "tiers[1].backend.type", "papertape", "`pip install lmcache-backend-papertape`")],
    ),
    "unknown serde": (
        change("write: through", "serde: {type: gzip9}"),
        [("8:13", "tiers[1].serde.type", "gzip9", "no serde `gzip9` is installed")],
    ),
    "unknown policy": (
        change("write: through", "eviction: {type: S4-FIFO}"),
        [("8:16", "tiers[1].eviction.type", "S4-FIFO", "no eviction policy `S4-FIFO`")],
    ),
    "unknown plugin": (
        "plugins: [watch]\n" + GOOD,
        [("1:11", "plugins[0]", "watch", "no plugin `watch` is installed")],
    ),
    # -- contradictions --------------------------------------------------------------------------------------
    "two tiers of one name": (
        change("name: nvme", "name: dram"),
        [("6:5", "tiers[1].name", "dram", "names must differ")],
    ),
    "two names the environment cannot tell apart": (
        GOOD.replace("name: dram", "name: a-b").replace("name: nvme", "name: a_b"),
        [("6:5", "tiers[1].name", "a_b", "tiers[0] is called `a-b`")],
    ),
    "no memory tier": (
        "tiers:\n  - {name: d, capacity: 1GiB, backend: {type: gds, path: DIR/kv}}\n",
        [("1:1", "tiers", "[...]", "there is no memory tier")],
    ),
    "memory tier last": (
        "tiers:\n  - {name: d, capacity: 1GiB, backend: {type: gds, path: DIR/kv}}\n" + MEMORY_LINE,
        [("3:31", "tiers[1].backend", "{...}", "move tiers[1] to the top")],
    ),
    "two memory tiers": (
        change("{type: gds, path: DIR/kv}", "{type: cpu}"),
        [("9:5", "tiers[1].backend", "{...}", "only one memory tier")],
    ),
    "serde on memory": (
        change("capacity: 64MiB", "capacity: 64MiB\n    serde: {type: raw}"),
        [("5:5", "tiers[0].serde", "{...}", "takes no serde")],
    ),
    "write mode on memory": (
        change("capacity: 64MiB", "capacity: 64MiB\n    write: back"),
        [("5:5", "tiers[0].write", "back", "a memory tier has no write mode")],
    ),
    # -- the machine -----------------------------------------------------------------------------------------
    "more memory than there is": (
        change("64MiB", "900TiB"),
        [("4:5", "tiers[0].capacity", "900TiB", "can be allocated now")],
    ),
    "more disk than there is": (
        change("1GiB", "2PiB"),
        [("7:5", "tiers[1].capacity", "2PiB", "the whole file system")],
    ),
    "system directory": (
        change("DIR/kv", "/etc/kv"),
        [("9:26", "tiers[1].backend.path", "/etc/kv", "directory of the system")],
    ),
    "the root directory": (change("DIR/kv", "/"), [("9:26", "tiers[1].backend.path", "/", "directory of the system")]),
    "a directory everybody uses": (change("DIR/kv", "/tmp"), [("9:26", "tiers[1].backend.path", "/tmp", "of its own")]),
    "a file for a directory": (
        change("DIR/kv", "DIR/file"),
        [("9:26", "tiers[1].backend.path", "DIR/file", "is not a directory")],
    ),
    "a directory below a file": (
        change("DIR/kv", "DIR/file/kv"),
        [("9:26", "tiers[1].backend.path", "DIR/file/kv", "`DIR/file` is not a directory")],
    ),
    "a directory others may write to": (
        change("DIR/kv", "DIR/open"),
        [("9:26", "tiers[1].backend.path", "DIR/open", "`chmod 700 DIR/open`")],
    ),
    "one directory twice": (
        GOOD + "  - {name: d2, capacity: 1GiB, backend: {type: gds, path: DIR/x/../kv/}}\n",
        [("10:53", "tiers[2].backend.path", "DIR/x/../kv/", "overlaps the directory of tiers[1]")],
    ),
    "one directory around another": (
        GOOD + "  - {name: d2, capacity: 1GiB, backend: {type: gds, path: DIR}}\n",
        [("10:53", "tiers[2].backend.path", "DIR", "overlaps the directory of tiers[1]")],
    ),
    "one directory inside another": (
        GOOD + "  - {name: d2, capacity: 1GiB, backend: {type: gds, path: DIR/kv/sub}}\n",
        [("10:53", "tiers[2].backend.path", "DIR/kv/sub", "overlaps the directory of tiers[1]")],
    ),
    # -- text ------------------------------------------------------------------------------------------------
    "duplicate key": (
        change("    write: through\n", "    capacity: 2GiB\n"),
        [("8:5", "tiers[1].capacity", "2GiB", "given twice (first in line 7)")],
    ),
    "duplicate key inside a plugin": (
        change("{type: cpu}", "{type: cpu, type: gds}"),
        [("5:26", "tiers[0].backend.type", "gds", "given twice")],
    ),
    "alias bomb": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntiers: [*c, *c]\n",
        [("1:4", "a", "&a", "an anchor (`&`) is not supported"), ("4:9", "tiers[0]", "*c", "an alias (`*`)")],
    ),
    "merge key": (
        change("    write: through\n", "    <<: {write: back}\n"),
        [("8:5", "tiers[1].<<", "{...}", "unknown key")],
    ),
    "python tag": (
        change("64MiB", "!!python/object/apply:os.system ['true']"),
        [("4:15", "tiers[0].capacity", "tag:yaml.org,2002:python/object/apply:os.system", "is not supported")],
    ),
    "harmless tag": (change("256", "!!str 256"), [("1:15", "chunk_tokens", "tag:yaml.org,2002:str", "a tag (`!`)")]),
    "own tag": (change("64MiB", "!env HOME"), [("4:15", "tiers[0].capacity", "!env", "a tag (`!`)")]),
    "two documents": (GOOD + "---\ntiers: []\n", [("10:1", "", "", "a second document")]),
    "tab": (change("    capacity: 1GiB", "\tcapacity: 1GiB"), [("7:1", "", "", "indent with spaces")]),
    "unclosed bracket": (
        change("{type: cpu}", "{type: cpu"),
        [("5:14", "", "", "`{` is opened and not closed (noticed in line 6) write the closing `}`")],
    ),
    "unclosed quote": (
        change("name: dram", 'name: "dram'),
        [("3:11", "", "", "a quote is opened and not closed in its line (noticed in line 10)")],
    ),
    "a list": ("- tiers\n", [("1:1", "", "", "the file holds a list")]),
    "a word": ("tiers\n", [("1:1", "", "", "the file holds a single value")]),
    "a mapping as a key": ("{a: b}: c\n", [("1:1", "", "", "a key must be a plain word")]),
    "too deep": ("tiers: " + "[" * 40 + "]" * 40, [("1:23", "", "", "nested more than 16 levels")]),
    "too many": ("tiers:\n" + "- a\n" * 5000, [("", "", "", "more than 1024 settings")]),
    "control character": (change("dram", "dr\x07am"), [("", "", "", "not valid YAML")]),
}

TOML_GOOD = """\
chunk_tokens = 256

[[tiers]]
name = "dram"
capacity = "64MiB"
backend = { type = "cpu" }

[[tiers]]
name = "nvme"
capacity = "1GiB"
[tiers.backend]
type = "gds"
path = "DIR/kv"
"""

TOML: dict[str, tuple[str, list[Says]]] = {
    "misspelt key": (
        TOML_GOOD.replace('name = "nvme"\ncapacity', 'name = "nvme"\ncapasity'),
        [("10:1", "tiers[1].capasity", "1GiB", "did you mean `capacity`?")],
    ),
    "misspelt key in an inline table": (
        TOML_GOOD.replace('type = "cpu"', 'type = "cpu", pni = false'),
        [("6:27", "tiers[0].backend.pni", "false", "did you mean `pin`?")],
    ),
    "misspelt key in a table": (
        TOML_GOOD.replace("path =", "pth ="),
        [("13:1", "tiers[1].backend.pth", "DIR/kv", "did you mean `path`?")],
    ),
    "wrong value": (TOML_GOOD.replace("256", '"many"'), [("1:1", "chunk_tokens", "many", "must be a whole number")]),
    "missing key": (TOML_GOOD.replace('type = "gds"\n', ""), [("11:2", "tiers[1].backend.type", "", "is required")]),
    "date for a size": (TOML_GOOD.replace('"1GiB"', "2024-01-01"), [("10:1", "tiers[1].capacity", "date", "a number")]),
    "duplicate key": (
        TOML_GOOD.replace('name = "nvme"', 'name = "a"\nname = "b"'),
        [("10:11", "", "", "not valid TOML")],
    ),
    "no quotes": (TOML_GOOD.replace('"dram"', "dram"), [("4:8", "", "", "not valid TOML")]),
    "unclosed": (TOML_GOOD.replace('{ type = "cpu" }', '{ type = "cpu"'), [("6:", "", "", "not valid TOML")]),
    "far too deep": ("a = " + "[" * 5000 + "]" * 5000, [("", "", "", "nested too deeply")]),
    "too deep": ("a = " + "[" * 20 + "]" * 20, [("", "", "", "nested more than 16 levels deep")]),
    "a key of many parts": (".".join("a" * 30_000) + " = 1", [("1:1", "", "", "nested more than 16 levels deep")]),
    "a key of many parts inside": (
        "x = 1\ny = {z.'q w'" + ".a" * 30_000 + " = 1}",
        [("2:1", "", "", "nested more than 16 levels deep")],
    ),
    "too many": ("a = [" + "1," * 5000 + "]", [("", "", "", "more than 1024 settings")]),
}

ENVIRONMENT: dict[str, tuple[dict[str, str], Says]] = {
    "misspelt key": ({"LMCACHE__TIERS__NVME__CAPACTY": "8GiB"}, ("", "tiers[1].capacty", "8GiB", "`capacity`")),
    "misspelt tier": ({"LMCACHE__TIERS__NVM__CAPACITY": "8GiB"}, ("", "tiers.nvm", "", "did you mean `NVME`?")),
    "unknown tier": ({"LMCACHE__TIERS__TAPE__CAPACITY": "8GiB"}, ("", "tiers.tape", "", "it cannot add one")),
    "unknown top key": ({"LMCACHE__CHUNK_TOKEN": "16"}, ("", "chunk_token", "16", "did you mean `chunk_tokens`?")),
    "wrong value": ({"LMCACHE__CHUNK_TOKENS": "many"}, ("", "chunk_tokens", "many", "must be a whole number")),
    "wrong size": ({"LMCACHE__TIERS__DRAM__CAPACITY": "8G"}, ("", "tiers[0].capacity", "8G", "`GiB` counts")),
    "plugin's key": ({"LMCACHE__TIERS__NVME__BACKEND__PATHS": "/x"}, ("", "tiers[1].backend.paths", "/x", "`path`")),
    "no setting": ({"LMCACHE__TIERS__NVME": "1"}, ("", "tiers.nvme", "", "the name of the setting is missing")),
    "empty part": ({"LMCACHE__TIERS____CAPACITY": "1"}, ("", "", "", "a setting's name is missing")),
    "below a value": ({"LMCACHE__CHUNK_TOKENS__X": "1"}, ("", "chunk_tokens", "", "is not a mapping")),
    "deep list": ({"LMCACHE__PLUGINS": "[" * 50 + "]" * 50}, ("", "plugins", "", "nested more than 16 levels")),
    "bottomless list": ({"LMCACHE__PLUGINS": "[" * 50_000 + "]" * 50_000}, ("", "plugins", "", "not valid JSON")),
    "broken list": ({"LMCACHE__PLUGINS": "[watch"}, ("", "plugins", "", "is not valid JSON")),
    "no list": ({"LMCACHE__PLUGINS": "watch"}, ("", "plugins", "watch", "must be a list")),
}
