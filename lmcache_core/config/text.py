"""Reading YAML and TOML into plain data that remembers where every setting stands.

YAML is read from parser events, so nothing in it is ever constructed: no tags, no anchors or aliases (an alias
bomb cannot even be written), no duplicate keys, one document, and the scalars of YAML 1.2's core schema (`on`,
`12:30` and `2024-01-01` are text). JSON is a subset and needs no reader of its own.
"""

from __future__ import annotations

import bisect
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lmcache_core.config.findings import Code, Loc, dotted
from lmcache_core.config.syntax import mistake
from lmcache_core.errors import ConfigError, Problem
from lmcache_core.spelling import closest

MAX_BYTES = 1 << 16
MAX_DEPTH = 16
MAX_SETTINGS = 1024
"""Bounds on what is read: a configuration is a page of text, and no text may cost seconds to refuse."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]{1,40}", re.ASCII)
_BASED = re.compile(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{1,4})?", re.ASCII)
_PART = r"(?:[A-Za-z0-9_-]+|\"[^\"\n]*\"|'[^'\n]*')"
_LONG_KEY = re.compile(rf"(?:^|[{{,\[])[ \t]*{_PART}(?:[ \t]*\.[ \t]*{_PART}){{{MAX_DEPTH},}}", re.MULTILINE)
"""A dotted TOML key of too many parts; `tomllib` takes time quadratic in their number."""
_TOML_PLACE = re.compile(r"^(.*?) \(at (?:line (\d+), column (\d+)|end of document)\)$", re.DOTALL)


@dataclass(slots=True)
class Document:
    """The settings of one file."""

    name: str
    data: dict[str, Any]
    places: dict[Loc, tuple[int, int]]
    """Line and column, from 1, of each key and each list item."""
    problems: list[Problem] = field(default_factory=list)
    """What is wrong with the text itself, where reading could go on."""
    refused: dict[str, tuple[Loc, Any]] = field(default_factory=dict)
    """What stands where a problem is, by the problem's place; its words leave values out, for they may be secrets."""


def read(path: Path) -> Document:
    """Read a file: TOML by the suffix `.toml`, else YAML. Raise `ConfigError` when it cannot be parsed at all."""
    text = _decode(path, _bytes(path))
    return parse_toml(str(path), text) if path.suffix.lower() == ".toml" else parse_yaml(str(path), text)


def _bytes(path: Path) -> bytes:
    try:
        # Not blocking: a FIFO given by mistake must not hang the start-up.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "give the path of a YAML or TOML file"
        if isinstance(error, FileNotFoundError) and path.parent.is_dir():
            near = closest(path.name, sorted(p.name for p in path.parent.iterdir()))
            fix = f"did you mean `{path.parent / near}`?" if near else fix
        raise _unreadable(path, reason[:1].lower() + reason[1:], fix) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _unreadable(path, "is not a regular file", "give the path of a YAML or TOML file")
    try:
        with open(fd, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:  # a network file system, a broken disk
        raise _unreadable(
            path, (error.strerror or str(error)).lower(), "look after its medium, and try again"
        ) from error
    if len(raw) > MAX_BYTES:
        raise _unreadable(
            path, f"is larger than {MAX_BYTES >> 10} KiB", "a configuration is a page of text; is this the right file?"
        )
    return raw


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"is not UTF-8 text (byte {error.start})", "save the file as UTF-8") from error


def _unreadable(path: Path, reason: str, fix: str) -> ConfigError:
    return ConfigError([Problem(str(path), "", f"cannot read the configuration: {reason}", fix=fix, code=Code.READ)])


def out_of_bounds(data: Any) -> str | None:
    """Why nested data is too much for a configuration; None when it is not."""
    count = 0
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        count += len(level)
        if count > MAX_SETTINGS:
            return f"more than {MAX_SETTINGS} settings"
        boxes = [box for box in level if isinstance(box, (dict, list))]
        level = [item for box in boxes for item in (box.values() if isinstance(box, dict) else box)]
        if not level:
            return None
    return f"nested more than {MAX_DEPTH} levels deep"


# -- YAML ----------------------------------------------------------------------------------------------------


def parse_yaml(name: str, text: str) -> Document:
    """Parse YAML 1.2 (core schema, see the module's text). Raise `ConfigError` on a syntax error."""
    try:
        return _Yaml(name, yaml.parse(text, Loader=_LOADER)).document()
    except yaml.MarkedYAMLError as error:
        found = mistake(text, error)
        if found is None:
            raise _syntax(name, f"not valid YAML: {error.problem}", "check quotes, colons and indentation") from error
        where = f"{name}:{found.line}:{found.column}"
        raise _syntax(where, f"not valid YAML: {found.what}", found.fix) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _syntax(f"{name}:{line}:1", f"not valid YAML: {error.reason}", "remove the character") from error


def _syntax(where: str, what: str, fix: str) -> ConfigError:
    return ConfigError([Problem(where, "", what, fix=fix, code=Code.SYNTAX)])


class _Yaml:
    """Builds plain data from parser events."""

    def __init__(self, name: str, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._doc = Document(name, {}, {(): (1, 1)})
        self._count = 0

    def document(self) -> Document:
        doc = self._doc
        next(self._events)  # stream start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return doc
        data = self._node(next(self._events), (), 1)
        next(self._events)  # document end
        more = next(self._events)
        if not isinstance(more, yaml.StreamEndEvent):
            self._refuse(more, (), "a second document (`---`)", "keep one document in the file")
        if isinstance(data, dict):
            doc.data = data
        elif data is not None:
            what = f"the file holds {'a list' if isinstance(data, list) else 'a single value'}, not settings"
            raise _syntax(f"{doc.name}:1:1", what, "write `key: value` lines, e.g. `tiers:`")
        return doc

    def _node(self, event: yaml.Event, loc: Loc, depth: int) -> Any:
        if depth > MAX_DEPTH:
            line, column = _place(event)
            raise _syntax(
                f"{self._doc.name}:{line}:{column}", f"nested more than {MAX_DEPTH} levels deep", "flatten it"
            )
        self._count += 1
        if self._count > MAX_SETTINGS:
            raise _syntax(self._doc.name, f"more than {MAX_SETTINGS} settings", "is this the right file?")
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, loc, "an alias (`*`)", "write the value out, or in quotes", f"*{event.anchor}")
            return None
        assert isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent), "the parser only starts nodes here"
        if event.anchor is not None:
            fix = "write repeated values out, or text in quotes"
            self._refuse(event, loc, "an anchor (`&`)", fix, f"&{event.anchor}")
        if event.tag is not None:
            self._refuse(event, loc, "a tag (`!`)", "remove it, or write text in quotes", event.tag)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(loc, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(loc, depth)
        assert isinstance(event, yaml.ScalarEvent)
        if event.style not in ("|", ">") and event.end_mark and event.end_mark.line + 1 > _place(event)[0]:
            self._refuse(event, loc, "a value over several lines", "write it in one line; close a quote where it opens")
        return event.value if event.style else _scalar(event.value)

    def _mapping(self, loc: Loc, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                line, column = _place(event)
                raise _syntax(f"{self._doc.name}:{line}:{column}", "a key must be a plain word", "write `key: value`")
            key = event.value
            place = _place(event)
            below = (*loc, key)
            if event.anchor is not None or event.tag is not None:
                self._refuse(event, below, "an anchor or tag on a key", "remove it")
            value = self._node(next(self._events), below, depth + 1)
            if key in result:
                first = self._doc.places[below][0]
                what = f"the key is given twice (first in line {first})"
                self._problem(Code.DUPLICATE, place, below, what, "one of the two would win silently", "remove one")
                self._doc.refused[self._doc.problems[-1].where] = (below, value)
                continue
            result[key] = value
            self._doc.places[below] = place
        return result

    def _sequence(self, loc: Loc, depth: int) -> list[Any]:
        result: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            below = (*loc, len(result))
            self._doc.places[below] = _place(event)
            result.append(self._node(event, below, depth + 1))
        return result

    def _refuse(self, event: yaml.Event, loc: Loc, what: str, fix: str, value: str = "") -> None:
        why = "configurations are plain data: nothing in them expands or constructs anything"
        self._problem(Code.SYNTAX, _place(event), loc, f"{what} is not supported", why, fix)
        if value:  # it may be a password without its quotes
            self._doc.refused[self._doc.problems[-1].where] = (loc, value)

    def _problem(self, code: Code, place: tuple[int, int], loc: Loc, what: str, why: str, fix: str) -> None:
        where = f"{self._doc.name}:{place[0]}:{place[1]}"
        self._doc.problems.append(Problem(where, dotted(loc), what, why, fix, code=code))


def _place(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    assert mark is not None, "the parser marks every event"
    return mark.line + 1, mark.column + 1


def _scalar(text: str) -> Any:
    """A plain scalar of YAML 1.2's core schema."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text) and not text.lstrip("+-").isdigit():
        return float(text)
    return text


# -- TOML ----------------------------------------------------------------------------------------------------


def parse_toml(name: str, text: str) -> Document:
    """Parse TOML 1.0. Raise `ConfigError` on a syntax error."""
    text = text.replace("\r\n", "\n")
    if long := _LONG_KEY.search(text):
        where = f"{name}:{text.count(chr(10), 0, long.start()) + 1}:1"
        raise _syntax(where, f"nested more than {MAX_DEPTH} levels deep", "is this the right file?")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _TOML_PLACE.match(str(error))
        what, line, column = match.groups() if match else (str(error), None, None)
        last = text.count("\n") + 1
        where = f"{name}:{line or last}:{column or 1}"
        raise _syntax(
            where, f"not valid TOML: {what[:1].lower()}{what[1:]}", "check the line; text needs quotes"
        ) from error
    except RecursionError as error:
        raise _syntax(name, "nested too deeply", "flatten it") from error
    if reason := out_of_bounds(data):
        raise _syntax(name, reason, "is this the right file?")
    return Document(name, data, _Toml(text).places())


class _Toml:
    """Finds where each key stands in text that `tomllib` has accepted (so syntax is not checked again)."""

    _SKIP = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
    _BLANK = re.compile(r"[ \t]*")
    _BARE = re.compile(r"[A-Za-z0-9_-]+")
    _STRING = re.compile(
        r'"""(?:[^\\]|\\.)*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:[^"\\]|\\.)*"|' + r"'[^']*'",
        re.DOTALL,
    )
    _PLAIN = re.compile(r"[^,\]}\n#]+")

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._places: dict[Loc, tuple[int, int]] = {(): (1, 1)}
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        self._tables: dict[Loc, int] = {}
        """Tables in each array of tables so far."""

    def places(self) -> dict[Loc, tuple[int, int]]:
        text = self._text
        table: Loc = ()
        self._skip(self._SKIP)
        while self._at < len(text):
            if text.startswith("[[", self._at):
                self._at += 2
                start = self._at
                name = self._resolve(self._key(), start)
                index = self._tables.get(name, 0)
                self._tables[name] = index + 1
                table = (*name, index)
                self._note(table, start)
                self._at += 2
            elif text[self._at] == "[":
                self._at += 1
                start = self._at
                table = self._resolve(self._key(), start)
                self._at += 1
            else:
                self._pair(table)
            self._skip(self._SKIP)
        return self._places

    def _resolve(self, keys: tuple[str, ...], start: int) -> Loc:
        """A header's dotted name; the name of an array of tables means its last table."""
        loc: Loc = ()
        for i, key in enumerate(keys):
            loc = (*loc, key)
            self._note(loc, start)
            if loc in self._tables and i < len(keys) - 1:
                loc = (*loc, self._tables[loc] - 1)
        return loc

    def _pair(self, table: Loc) -> None:
        start = self._at
        loc = table
        for key in self._key():
            loc = (*loc, key)
            self._note(loc, start)
        self._at += 1  # the equals sign
        self._skip(self._BLANK)
        self._value(loc)

    def _key(self) -> tuple[str, ...]:
        parts: list[str] = []
        while True:
            self._skip(self._BLANK)
            quoted = self._text[self._at] in "\"'"
            match = (self._STRING if quoted else self._BARE).match(self._text, self._at)
            assert match is not None, "tomllib accepted a key that this scanner does not know"
            self._at = match.end()
            parts.append(_toml_string(match[0]) if quoted else match[0])
            self._skip(self._BLANK)
            if self._text[self._at] != ".":
                return tuple(parts)
            self._at += 1

    def _value(self, loc: Loc) -> None:
        first = self._text[self._at]
        if first in "[{":
            self._at += 1
            self._skip(self._SKIP)
            index = 0
            while self._text[self._at] not in "]}":
                if first == "{":
                    self._pair(loc)
                else:
                    self._note((*loc, index), self._at)
                    self._value((*loc, index))
                    index += 1
                self._skip(self._SKIP)
                if self._text[self._at] == ",":
                    self._at += 1
                    self._skip(self._SKIP)
            self._at += 1
            return
        match = (self._STRING if first in "\"'" else self._PLAIN).match(self._text, self._at)
        assert match is not None, "tomllib accepted a value that this scanner does not know"
        self._at = match.end()

    def _note(self, loc: Loc, start: int) -> None:
        line = bisect.bisect_right(self._lines, start)
        self._places.setdefault(loc, (line, start - self._lines[line - 1] + 1))

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        if match is not None:
            self._at = match.end()


def _toml_string(quoted: str) -> str:
    """The text of a quoted key."""
    return next(iter(tomllib.loads(f"{quoted} = 0")))
