"""A configuration on its way: plain data, and where each part of it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmcache_core.config.findings import Code, Loc, dotted
from lmcache_core.config.text import Document, out_of_bounds
from lmcache_core.errors import Problem
from lmcache_core.spelling import closest

OVERLAY = "LMCACHE__"
"""Prefix of overlays: `LMCACHE__TIERS__DRAM__CAPACITY=8GiB`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a setting was written."""

    where: str
    """For messages: `file:line:column`, `environment variable NAME`, `python`."""
    label: str
    """For provenance: `file:line`, `env:NAME`, `python`, `default`."""
    path: str = ""
    """What the setting is called there, when that is not its own path."""
    value: str = ""
    """What was written there, for messages, when that is not the value itself."""


DEFAULT = Origin("built-in default", "default")
PYTHON = Origin("python", "python")


@dataclass(slots=True)
class Draft:
    """Data to validate, the origin of its parts, and what has been found wrong or worth a word so far."""

    data: dict[str, Any]
    origins: dict[Loc, Origin]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: dict[str, tuple[Loc, Any]] = field(default_factory=dict)
    """What stands where the reader found a problem, by the problem's place."""

    @classmethod
    def of_document(cls, doc: Document) -> Draft:
        origins = {
            loc: Origin(f"{doc.name}:{line}:{column}", f"{doc.name}:{line}")
            for loc, (line, column) in doc.places.items()
        }
        return cls(doc.data, origins, list(doc.problems), refused=doc.refused)

    @classmethod
    def of_data(cls, data: Mapping[str, Any], origin: Origin) -> Draft:
        return cls(_plain(data), {(): origin})

    def origin(self, loc: Loc) -> Origin:
        """The origin of the setting, or of the nearest part around it."""
        while loc not in self.origins:
            loc = loc[:-1]
        return self.origins[loc]

    def value(self, loc: Loc) -> Any:
        """What stands at `loc`; raise `KeyError` when nothing does."""
        node: Any = self.data
        for part in loc:
            if isinstance(node, list):
                node = dict(enumerate(node))
            if not isinstance(node, Mapping):
                raise KeyError(part)
            node = node[part]
        return node

    def put(self, loc: Loc, value: Any, origin: Origin) -> None:
        """Set what stands at `loc`; the mapping around it must exist."""
        node: Any = self.data
        for part in loc[:-1]:
            node = node[part]
        node[loc[-1]] = value
        for below in [known for known in self.origins if known[: len(loc)] == loc]:
            del self.origins[below]
        self.origins[loc] = origin


def _plain(value: Any) -> Any:
    """A copy of mappings and sequences, so that overlays never change the caller's objects."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class GivenTwice(ValueError):
    """A key that stands twice in the same JSON object."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that takes no key twice. Raise `GivenTwice`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise GivenTwice("a key is given twice")
    return found


def overlay(draft: Draft, env: Mapping[str, str]) -> None:
    """Apply every `LMCACHE__...` variable. Tiers are addressed by name, everything else by its keys."""
    names = [name for name in env if name.startswith(OVERLAY)]
    # Outer settings first, so that a whole backend can be replaced and one of its keys changed in one go.
    known: dict[str, str] = {}
    for name in sorted(names, key=lambda n: (n.count("__"), n)):
        first = known.setdefault(name.upper(), name)
        found = _apply(draft, name, env[name]) if first == name else _twice(first)
        if found is not None:
            path, what, fix = found
            why = "an overlay that changes nothing would be believed to be in force"
            draft.problems.append(Problem(f"environment variable {name}", path, what, why, fix, code=Code.ENVIRONMENT))


def _twice(first: str) -> tuple[str, str, str]:
    return "", f"the setting is given twice: {first} names the same one", "remove one of the two variables"


def _apply(draft: Draft, name: str, text: str) -> tuple[str, str, str] | None:
    """Set one value; or return the path, what is wrong and how to mend it."""
    keys = [part.lower() for part in name[len(OVERLAY) :].split("__")]
    if not all(keys):
        return "", "a setting's name is missing between underscores", f"write e.g. `{OVERLAY}TIERS__DRAM__CAPACITY`"
    loc: Loc = ()
    if keys[0] == "tiers" and len(keys) > 1:
        names = _tier_names(draft)
        if keys[1] not in names:
            near = closest(keys[1], names)
            shown = f"did you mean `{near.upper()}`? " if near else ""
            fix = f"{shown}tiers: {', '.join(names) or 'none'}; the environment changes tiers, it cannot add one"
            return f"tiers.{keys[1]}", f"there is no tier `{keys[1]}`", fix
        if len(keys) == 2:
            return f"tiers.{keys[1]}", "the name of the setting is missing", f"write e.g. `{name}__CAPACITY`"
        loc = ("tiers", names[keys[1]])
        keys = keys[2:]
    origin = Origin(f"environment variable {name}", f"env:{name}")
    for key in keys[:-1]:
        loc = (*loc, _given(draft, loc, key))
        try:
            node = draft.value(loc)
        except KeyError:
            node = None
        if node is None:
            draft.put(loc, {}, origin)
        elif not isinstance(node, dict):
            return (
                dotted(loc),
                "is not a mapping, so it has no settings inside",
                f"set `{OVERLAY}...` of the mapping itself",
            )
    value: Any = text
    if text.lstrip()[:1] in ("[", "{") or text == "null":
        path, fix = dotted((*loc, keys[-1])), "lists and mappings are written as JSON, with double quotes"
        try:
            value = json.loads(text, object_pairs_hook=once)
        except GivenTwice:
            return path, "holds a key twice", "remove one of the two: one would win silently"
        except (ValueError, RecursionError):
            return path, "is not valid JSON", fix
        if reason := out_of_bounds(value):
            return path, reason, "write a list or mapping of the setting's own shape"
    draft.put((*loc, _given(draft, loc, keys[-1])), value, origin)
    return None


def _given(draft: Draft, loc: Loc, key: str) -> str:
    """The key as it is written at `loc` already, such as a tenant's name; variables know neither case nor dashes."""
    try:
        node = draft.value(loc)
    except KeyError:
        node = None
    known = [k for k in node if isinstance(k, str)] if isinstance(node, Mapping) else []
    return next((k for k in known if k == key or k.replace("-", "_").lower() == key), key)


def _tier_names(draft: Draft) -> dict[str, int]:
    """Positions of the tiers by name, as the environment writes it."""
    tiers = draft.data.get("tiers")
    return {
        tier["name"].replace("-", "_"): i
        for i, tier in enumerate(tiers if isinstance(tiers, list) else [])
        if isinstance(tier, dict) and isinstance(tier.get("name"), str)
    }
