"""Broken configurations by the hundred: each is a good one with one thing wrong, at a known line.

Deterministic: the same mutants in every run. `DIR` stands for the test's directory. Bases are the examples and three
files that together give every setting there is. Words of four letters and less get one wrong letter, longer ones two
as well: two random letters of a word of four leave nothing to recognise.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lmcache_core import redact
from lmcache_core.config import text as reader
from lmcache_core.config.findings import Loc

EXAMPLES = Path(__file__).parent.parent / "examples"

FULL = """\
chunk_tokens: 256
verify: load
recompute: {tokens_per_s: 5000, factor: 0.25}
tenancy: {secret: secret-of-the-tenants, quota: 30%}
plugins: []
tiers:
  - name: dram
    capacity: 64MiB
    eviction: {type: lru}
    backend: {type: cpu, pin: true, shared: false}
  - name: nvme
    capacity: 1GiB
    write: back
    promote: true
    lossy: false
    serde: {type: zstd, level: 1}
    eviction:
      type: lru
    lane:
      threads: 2
      queue: 64
      inflight: 1MiB
      deadline: 5s
      lookup_deadline: 250ms
    backend:
      type: gds
      path: DIR/kv
      mode: segments
      io: auto
      isolate: auto
      free_floor: 1%
      segment_bytes: 16MiB
  - name: "files"
    capacity: 1GB
    write: through
    serde: {type: raw}
    backend: {type: gds, path: 'DIR/files', mode: files, inodes: 1000}
"""

FAR = """\
tiers:
  - {name: dram, capacity: 64MiB, backend: {type: cpu}}
  - name: cold
    write: never
    lane: {deadline: 500ms, threads: 8}
    backend:
      type: far
      url: far://host/bucket
      region: north
      access_key: canary-key
      retry: {attempts: 3, pause: 100ms, mode: steady}
"""
"""A third party's backend, with settings of its own and a model inside them."""

FAR_MODEL = '''
import pydantic
from lmcache_core.protocols import Frozen
from lmcache_core.units import Seconds

class Retry(Frozen):
    attempts: int = 3
    """How often."""
    pause: Seconds = 0.1
    mode: Literal["steady", "growing"] = "steady"
'''

MEDIA = """\
tiers:
  - {name: dram, capacity: 64MiB, backend: {type: cpu}}
  - name: shared
    promote: false
    backend:
      type: redis
      url: redis://localhost:6379/0
      mode: single
      username: lmcache
      prefix: "kv:"
      ttl: 1h
      part_bytes: 1MiB
      connections: 8
      timeout: 250ms
      track: true
      track_keys: 100000
  - name: bucket
    capacity: 100GiB
    backend:
      type: fsspec
      url: memory://kv
      client: auto
      concurrency: 32
      timeout: 2s
"""
"""Media on the network."""

TOML = """\
chunk_tokens = 256
verify = "serve"

[[tiers]]
name = "dram"
capacity = "64MiB"
backend = { type = "cpu", pin = false }

[[tiers]]
name = "nvme"
capacity = "1GiB"
write = "through"
lane.deadline = "2s"
serde = { type = "zstd" }
[tiers.backend]
type = "gds"
path = "DIR/kv"
io = "buffered"
"""

CHOICES = {
    "write": ("through", "back", "never"),
    "verify": ("load", "serve"),
    "mode": ("segments", "files", "steady", "single"),
    "client": ("auto", "obstore"),
    "isolate": ("auto", "always"),
    "io": ("auto", "direct", "buffered"),
}
"""Enumerations: setting -> the words that are typed wrong."""

TYPES = ("cpu", "gds", "zstd", "raw", "lru", "far", "redis", "fsspec")
BOOLEANS = ("pin", "shared", "promote", "track", "lossy")
COUNTS = ("chunk_tokens", "threads", "queue", "connections", "concurrency")
SIZES = (
    "capacity",
    "inflight",
    "free_floor",
    "segment_bytes",
    "part_bytes",
    "quota",
    "max_local_cpu_size",
    "max_local_disk_size",
)
RATES = ("tokens_per_s", "factor")
DURATIONS = ("deadline", "lookup_deadline", "pause", "timeout", "ttl")

WRONG = {
    "count": ["many", "-1", "0", "1.5", "true", "[1]", "{a: 1}", "99999999999", "4x", ".nan", "null", "'8 x'"],
    "size": ["4G", "4GiBB", "4 gigs", "-3", "120%", "[1GiB]", "{max: 1GiB}", "true", "lots", ".inf", "9999PiB", "0%"],
    "rate": ["many", "-1", "0", "true", "[1]", "{a: 1}", ".nan", "5x"],
    "classic size": ["lots", "-3", "[1]", "{a: 1}", "4GX"],
    "duration": ["0", "-2s", "5 sconds", "24h", "[1s]", "{s: 1}", "true", "soon", ".nan", "7200", "2mins"],
    "name": ["My Disk", "5", "a__b", "''", "[x]", "null", "-x", "tier.one", "ä", "NVME", "{a: b}", f"'{'x' * 33}'"],
    "path": [
        "/",
        "/etc/kv",
        "/tmp",
        "DIR/file",
        "DIR/file/kv",
        "DIR/open",
        "[a]",
        "5",
        "null",
        "{a: b}",
        "/usr/../etc",
    ],
    "choice": ["sometimes", "[a]", "5", "null", "{a: b}", "true"],
    "truth": ["maybe", "2", "[true]", "{a: b}", "'null'"],
    "type": ["nonesuch", "7", "null", "[cpu]", "os.system", "'plug_far:Config'", "{a: b}"],
    "plugin": ["cpu", "[cpu]", "5", "true"],
    "lane": ["fast", "[4]", "4", "true"],
    "tiers": ["cpu", "{dram: 1}", "[]", "null", "5", "[cpu]", "[[]]", "[null]"],
    "plugins": ["watch", "{a: 1}", "[watch ]", "[55 ]", "5"],
    "text": ["[a]", "{a: b}", "5", "null"],
}
"""Values of the wrong kind, unit or size for each kind of setting."""
VALID_SOMEWHERE = {
    ("inflight", "120%"),
    ("pause", "24h"),
    ("ttl", "24h"),
    ("ttl", "7200"),
    ("connections", "null"),
    ("timeout", "24h"),
    ("timeout", "7200"),
    ("pause", "0"),
    ("pause", "7200"),
    ("segment_bytes", "null"),
    ("threads", "null"),
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One broken file."""

    base: str
    kind: str
    """Which sort of mistake it is, for the totals."""
    text: str
    line: int
    """The line that is wrong."""
    value: str = ""
    """What must be shown of it; empty where a syntax error leaves no value."""
    meant: str = ""
    """The word that must be suggested, for typing mistakes."""
    also: tuple[int, ...] = ()
    """Other lines that may be named instead, where a mistake is made by two lines together."""

    def __str__(self) -> str:
        return f"{self.base}:{self.line} {self.kind} `{self.value}`" + (f" for `{self.meant}`" if self.meant else "")


THOROUGH = ("full.yaml", "far.yaml", "media.yaml", "full.toml")


def bases() -> dict[str, str]:
    """Good files: name -> text, with their directories below DIR."""
    found = {path.name: path.read_text() for path in sorted(EXAMPLES.glob("*.[yt][ao]ml"))}
    found = {name: text.replace("/var/cache/", "DIR/") for name, text in found.items()}
    return {**found, "full.yaml": FULL, "far.yaml": FAR, "media.yaml": MEDIA, "full.toml": TOML}


def mutants() -> list[Mutant]:
    """All of them, each text once."""
    rng = random.Random(3)
    found: dict[str, Mutant] = {}
    for name, text in bases().items():
        # The examples repeat what the full files have: a third of their mutants is enough.
        for mutant in list(_Mill(name, text, rng).all())[:: 1 if name in THOROUGH else 3]:
            found.setdefault(f"{name}\0{mutant.text}", mutant)
    return list(found.values())


def typos(word: str, rng: random.Random) -> Iterator[str]:
    """Insert, delete, substitute and transpose a letter; the same twice in longer words."""
    once = [_insert(word, rng), _delete(word, rng), _substitute(word, rng), _transpose(word, rng)]
    yield from once
    if len(word) > 4:
        edits = [_insert, _delete, _substitute, _transpose]
        for first in once[:2]:
            yield rng.choice(edits)(first, rng)


def _insert(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word) + 1)
    return word[:at] + rng.choice(string.ascii_lowercase) + word[at:]


def _delete(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word))
    return word[:at] + word[at + 1 :]


def _substitute(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word))
    return word[:at] + rng.choice(string.ascii_lowercase.replace(word[at], "")) + word[at + 1 :]


def _transpose(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word) - 1)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


_VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|\[[^\n\]]*\]|\{[^\n}]*\}|[^,}\]\n#]*[^,}\]\n# ]")


class _Mill:
    """Makes the mutants of one base."""

    def __init__(self, name: str, text: str, rng: random.Random) -> None:
        self._name = name
        self._text = text
        self._rng = rng
        self._toml = name.endswith(".toml")
        doc = reader.parse_toml(name, text) if self._toml else reader.parse_yaml(name, text)
        assert doc.problems == [], "a base has nothing wrong"
        self._places = {loc: place for loc, place in doc.places.items() if loc and isinstance(loc[-1], str)}
        if self._toml:  # a header's place is one of several: only keys with a value of their own are changed
            self._places = {loc: place for loc, place in self._places.items() if self._line(place).find("[") != 0}
        self._keys = {str(loc[-1]) for loc in self._places}
        self._lines = text.splitlines()

    def _line(self, place: tuple[int, int]) -> str:
        return self._text.splitlines()[place[0] - 1]

    def all(self) -> Iterator[Mutant]:
        for loc, place in self._places.items():
            yield from self._misspelt_key(loc, place)
            yield from self._values(loc, place)
        yield from self._words() if not self._toml else ()
        yield from self._structure() if not self._toml else self._toml_structure()

    def _mutant(self, kind: str, at: int, old: str, new: str, **more: str) -> Mutant:
        line = self._text.count("\n", 0, at) + 1
        assert self._text.startswith(old, at)
        return Mutant(self._name, kind, self._text[:at] + new + self._text[at + len(old) :], line, **more)

    def _at(self, place: tuple[int, int]) -> int:
        return sum(len(line) + 1 for line in self._lines[: place[0] - 1]) + place[1] - 1

    # -- keys ------------------------------------------------------------------------------------------------
    def _misspelt_key(self, loc: Loc, place: tuple[int, int]) -> Iterator[Mutant]:
        key, at = str(loc[-1]), self._at(place)
        if not self._text.startswith(key, at):
            return  # a dotted TOML key: its parts share a place
        for bad in typos(key, self._rng):
            if len(bad) > 1 and bad != key and bad not in self._keys and bad not in ("serde", "inodes", "level"):
                yield self._mutant("misspelt key", at, key, bad, value=bad, meant=key)
        indent = ", " if "{" in self._line(place)[: place[1]] else "\n" + " " * (place[1] - 1)
        if not self._toml and loc[0] == "tiers" and self._value_of(loc, place) is not None and len(loc) == 3:
            yield replace(
                self._mutant("unknown key", at, key, f"colour: red{indent}{key}", value="red"),
                line=place[0],
            )

    # -- values ----------------------------------------------------------------------------------------------
    def _value_of(self, loc: Loc, place: tuple[int, int]) -> tuple[int, str] | None:
        """Where the value on the key's own line starts, and its text; None for blocks below."""
        at, key = self._at(place), str(loc[-1])
        match = re.compile(re.escape(key) + r"\s*[:=]\s*").match(self._text, at) or re.compile(r"[\w.]+ = ").match(
            self._text, at
        )
        value = _VALUE.match(self._text, match.end()) if match else None
        if match is None or value is None or "\n" in match[0]:
            return None
        return match.end(), value[0]

    def _values(self, loc: Loc, place: tuple[int, int]) -> Iterator[Mutant]:
        key, found = str(loc[-1]), self._value_of(loc, place)
        if found is None:
            return
        at, old = found
        kind = self._kind(loc)
        words = CHOICES.get(key, ()) if kind == "choice" else TYPES if kind == "type" else ()
        plain = old.strip("\"'")
        if plain in words:
            for bad in typos(plain, self._rng):
                if bad not in words and len(bad) > 1 and re.fullmatch("[a-z]+", bad):
                    new = f'"{bad}"' if self._toml else bad
                    yield self._mutant(f"misspelt {kind}", at, old, new, value=bad, meant=plain)
        for new in WRONG.get(kind, ()):
            if (key, new) in VALID_SOMEWHERE or (self._toml and (kind == "lane" or not self._can_be_toml(new))):
                continue
            if key == "max_local_disk_size" and new == "{a: 1}":
                continue  # is what `[1]` is
            written = self._as_toml(new) if self._toml else new
            shown = new[1:-2] if new.endswith(" ]") else new  # an item of a list is shown by itself
            yield self._mutant(f"wrong {kind}", at, old, written, value=shown)

    def _kind(self, loc: Loc) -> str:
        key = str(loc[-1])
        if key.startswith("max_local"):
            return "classic size"
        named = {"name": "name", "path": "path", "type": "type", "lane": "lane", "tiers": "tiers", "plugins": "plugins"}
        named |= {"backend": "plugin", "eviction": "plugin", "serde": "plugin", "url": "text", "region": "text"}
        groups = {"count": COUNTS, "size": SIZES, "duration": DURATIONS, "rate": RATES, "truth": BOOLEANS}
        named |= {key: kind for kind, keys in groups.items() for key in keys}
        return named.get(key, "choice" if key in CHOICES else "")

    def _can_be_toml(self, new: str) -> bool:
        return new not in ("null", ".nan", ".inf") and not new.startswith(("{", "["))

    def _as_toml(self, new: str) -> str:
        bare = re.fullmatch(r"-?[0-9]+(\.[0-9]+)?|true", new)
        return new if bare or new.startswith("'") else f'"{new}"'

    # -- text ------------------------------------------------------------------------------------------------
    def _words(self) -> Iterator[Mutant]:
        """YAML's own traps, at every other value."""
        for loc, place in list(self._places.items())[::2]:
            found = self._value_of(loc, place)
            if found is None:
                continue
            at, old = found
            yield self._mutant("tag", at, old, f"!!python/object/apply:os.system {old}", value="tag")
            hidden = redact.HIDDEN if redact.telling(str(loc[-1])) else None
            yield self._mutant("anchor", at, old, f"&a {old}", value=hidden or "&a")
            yield self._mutant("alias", at, old, "*a", value=hidden or "*a")
            if old[0] not in "\"'{[":
                yield self._mutant("half-quoted", at, old, f'"{old}')
                yield self._mutant("half-quoted", at, old, f"'{old}")
            elif old[0] in "{[":
                yield self._mutant("unclosed", at, old, old[:-1])

    def _structure(self) -> Iterator[Mutant]:
        lines = self._lines
        for i, line in enumerate(lines):
            bare = line.lstrip(" ")
            key = re.match(r"([a-z_]+):", bare)
            depth = len(line) - len(bare)
            if key is None or bare.startswith("#"):
                continue
            value = bare.partition(":")[2].strip()
            scalar = bool(value) and value[0] not in "{["
            again = [*lines[: i + 1], line, *lines[i + 1 :]]
            if value:
                yield self._lines_mutant("duplicate key", again, i + 2, value.strip("\"'") if scalar else "")
            if depth:
                yield self._lines_mutant("tab", [*lines[:i], "\t" + bare, *lines[i + 1 :]], i + 1)
            # The first line of a block turns the block into another value, and its key is what gets it.
            also = (i,) if lines[i - 1].endswith(":") else ()
            if value and depth >= 4 and i + 1 < len(lines):
                listed = [*lines[:i], f"{line[:depth]}- {bare}", *lines[i + 1 :]]
                yield replace(self._lines_mutant("a list item", listed, i + 1), also=also)
            mute = [*lines[:i], line.replace(":", "", 1), *lines[i + 1 :]]
            yield replace(self._lines_mutant("no colon", mute, i + 1), also=also)
            yield self._lines_mutant("question", [*lines[:i], f"{line[:depth]}? {bare}", *lines[i + 1 :]], i + 1)
            merge = [*lines[:i], f"{line[:depth]}<<: {{a: b}}", *lines[i:]]
            if depth != 2 or not lines[i - 1].endswith("tiers:"):
                yield self._lines_mutant("merge key", merge, i + 1, "{...}")
        yield self._lines_mutant("second document", [*lines, "---", "tiers: []"], len(lines) + 1)
        yield self._lines_mutant("directive", ["%YAML 9.9", "---", *lines], 1)
        bomb = ["a: &a [x, x]", "b: &b [*a, *a]", "c: &c [*b, *b]"]
        yield self._lines_mutant("alias bomb", [*bomb, *lines], 1, "&a")

    def _lines_mutant(self, kind: str, lines: list[str], line: int, value: str = "") -> Mutant:
        return Mutant(self._name, kind, "\n".join(lines) + "\n", line, value)

    def _toml_structure(self) -> Iterator[Mutant]:
        lines = self._lines
        for i, line in enumerate(lines):
            key, equals, value = line.partition(" = ")
            if not equals or line.startswith("#"):
                continue
            yield self._lines_mutant("duplicate key", [*lines[: i + 1], line, *lines[i + 1 :]], i + 2)
            yield self._lines_mutant("no equals sign", [*lines[:i], f"{key} {value}", *lines[i + 1 :]], i + 1)
            if value[0] in "\"'":
                yield self._lines_mutant("half-quoted", [*lines[:i], line[:-1], *lines[i + 1 :]], i + 1)
                yield self._lines_mutant("no quotes", [*lines[:i], f"{key} = {value[1:-1]}", *lines[i + 1 :]], i + 1)
            if value[0] == "{":
                yield self._lines_mutant("unclosed", [*lines[:i], line[:-1], *lines[i + 1 :]], i + 1)


def between() -> list[Mutant]:
    """Contradictions and things in the wrong place or order, written out by hand on `FULL`."""
    nvme = FULL.index("  - name: nvme")
    files = FULL.index('  - name: "files"')
    head, dram, disk, last = FULL[: FULL.index("  - name: dram")], "", FULL[nvme:files], FULL[files:]
    dram = FULL[len(head) : nvme]

    def made(kind: str, text: str, needle: str, value: str, also: str = "") -> Mutant:
        line = text[: text.index(needle)].count("\n") + 1
        others = (text[: text.index(also)].count("\n") + 1,) if also else ()
        return Mutant("full.yaml", kind, text, line, value, also=others)

    def changed(kind: str, old: str, new: str, value: str, needle: str = "", also: str = "") -> Mutant:
        assert FULL.count(old) == 1, old
        return made(kind, FULL.replace(old, new), needle or new, value, also)

    memory = "backend: {type: cpu, pin: true, shared: false}"
    return [
        made("out of order", head + disk + dram + last, memory, "{...}"),
        made("out of order", head + disk + last + dram, memory, "{...}"),
        made("out of order", head + last + dram + disk, memory, "{...}"),
        made("no memory tier", head + disk + last, "tiers:", "[...]"),
        changed(
            "two memory tiers", "{type: gds, path: 'DIR/files', mode: files, inodes: 1000}", "{type: cpu}", "{...}"
        ),
        changed("duplicate name", "name: nvme", "name: dram", "dram", "name: dram\n    capacity: 1GiB"),
        changed("duplicate name", 'name: "files"', "name: nvme", "nvme", "name: nvme\n    capacity: 1GB"),
        changed("serde on memory", memory, memory + "\n    serde: {type: raw}", "{...}", "serde: {type: raw}"),
        changed("write mode on memory", memory, memory + "\n    write: back", "back", "write: back"),
        changed("one directory twice", "'DIR/files'", "DIR/kv", "DIR/kv", "path: DIR/kv, mode"),
        changed("directory inside another", "'DIR/files'", "DIR/kv/sub", "DIR/kv/sub"),
        changed("directory around another", "'DIR/files'", "DIR", "DIR", "path: DIR, mode"),
        changed("option of another mode", "mode: files, inodes: 1000", "inodes: 1000", "{...}"),
        changed("option of another mode", "mode: segments", "mode: files", "{...}", "backend:\n      type: gds"),
        changed("too much memory", "capacity: 64MiB", "capacity: 900TiB", "900TiB"),
        changed("too much disk", "capacity: 1GiB", "capacity: 2PiB", "2PiB"),
        changed("moved in", "    promote: true\n", "    path: DIR/x\n", "DIR/x", "path: DIR/x"),
        changed("moved in", "    write: back\n", "    threads: 3\n", "3", "threads: 3"),
        changed("moved in", "    write: back\n", "    deadline: 3s\n", "3s", "deadline: 3s"),
        changed("moved out", "pin: true", "capacity: 1MiB", "1MiB"),
        changed("moved out", "      mode: segments\n", "      write: back\n", "back", "      write: back"),
        changed("moved out", "      queue: 64\n", "      promote: true\n", "true", "      promote: true"),
        changed("moved up", "verify: load", "capacity: 1GiB", "1GiB"),
        changed("moved up", "verify: load", "type: cpu", "cpu"),
        changed("moved down", "    promote: true\n", "    chunk_tokens: 16\n", "16", "    chunk_tokens: 16"),
        changed("moved down", "    promote: true\n", "    verify: serve\n", "serve", "    verify: serve"),
        changed("classic key", "chunk_tokens: 256", "chunk_size: 256", "256"),
        changed("classic key", "verify: load", "max_local_cpu_size: 5", "5"),
        changed("no name", "  - name: nvme\n    capacity: 1GiB", "  - capacity: 1GiB", "", "  - capacity"),
        changed("no capacity", "    capacity: 64MiB\n", "", "", "  - name: dram"),
        changed("no capacity", "    capacity: 1GB\n", "", "", '  - name: "files"'),
        changed("no path", "      path: DIR/kv\n", "", "", "    backend:\n      type: gds"),
        changed("no type", "{type: cpu, pin: true, shared: false}", "{}", "", "backend: {}"),
    ]
