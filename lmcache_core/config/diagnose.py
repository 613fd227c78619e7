"""From validation errors to messages for people: the place, the value, the nearest right word, the mend."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretBytes, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lmcache_core import redact
from lmcache_core.config.draft import Draft
from lmcache_core.config.findings import Code, Loc, dotted, shorten
from lmcache_core.errors import PluginError, Problem
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import BackendConfig, EvictionConfig, PluginConfig, SerdeConfig
from lmcache_core.spelling import closest

_CONSEQUENCE = {
    "capacity": "without its limit the tier could grow until the machine fails",
    "write": "chunks would be written at another time than meant",
    "path": "objects would be stored in another place than meant",
    "deadline": "a slow medium would be waited for longer or shorter than meant",
    "verify": "checksums would be verified less often than meant",
}
_EXAMPLE = {
    "name": "name: dram",
    "capacity": "capacity: 4GiB",
    "backend": "backend: {type: cpu}",
    "type": "type: cpu",
    "tiers": "tiers: [{name: dram, capacity: 4GiB, backend: {type: cpu}}]",
    "path": "path: /var/cache/lmcache",
}
_PLUGIN_KEYS = ("backend", "serde", "eviction")
_RENAMED = {
    "chunk_size": "chunk_tokens",
    "max_size": "capacity",
    "max_local_cpu_size": "capacity",
    "max_local_disk_size": "capacity",
    "size": "capacity",
    "timeout": "deadline",
    "workers": "threads",
    "cache_policy": "eviction",
    "policy": "eviction",
    "remote_serde": "serde",
    "codec": "serde",
}


class Diagnosis:
    """Turns the errors of one validation into problems."""

    def __init__(self, draft: Draft, root: type[BaseModel], plugins: Plugins) -> None:
        self._draft = draft
        self._root = root
        self._plugins = plugins
        self._secrets = redact.collect(draft.data) | {str(value) for value in self._typed_secrets(draft.data, ())}

    def problems(self, errors: Sequence[ErrorDetails]) -> list[Problem]:
        """One problem per cause."""
        found: list[Problem] = []
        renamed: set[Loc] = set()
        for error in errors:
            if error["type"] == "extra_forbidden":
                loc = error["loc"]
                problem, meant = self._unknown(loc)
                found.append(problem)
                if meant is not None:
                    renamed.add((*loc[:-1], meant))
        for error in errors:
            if error["type"] == "extra_forbidden" or (error["type"] == "missing" and error["loc"] in renamed):
                continue  # a required setting that is only misspelt is one problem, not two
            found.append(self._other(error))
        return found

    def clean(self, text: str) -> str:
        """`text` without any secret of this configuration."""
        return redact.scrub(text, self._secrets)

    def show(self, loc: Loc) -> str:
        """The value at `loc` for a message: short, one line, without secrets; empty when nothing stands there."""
        try:
            value = self._draft.value(loc)
        except KeyError:
            return ""
        return self.show_value(loc, value)

    def show_value(self, loc: Loc, value: Any) -> str:
        """`value`, given for the setting at `loc`, as `show` does."""
        names = [part for part in loc if isinstance(part, str)]
        if names and (redact.telling(names[-1]) or self._is_secret(loc)):
            return redact.HIDDEN
        # Before it is shortened: the beginning of a secret is no longer known as one.
        return self.clean(shorten(self.clean(value) if isinstance(value, str) else value))

    # -- kinds of errors -------------------------------------------------------------------------------------
    def _unknown(self, loc: Loc) -> tuple[Problem, str | None]:
        key = str(loc[-1])
        fields = self._fields(loc[:-1])
        present = self._keys(loc[:-1])
        # A missing required setting is the likeliest meaning of a misspelt key, one already given the least.
        required = [f for f in fields if fields[f].is_required() and f not in present]
        ranked = [*required, *(f for f in fields if f not in present and f not in required)]
        renamed = _RENAMED.get(key.lower().replace("-", "_"))
        elsewhere = self._elsewhere(loc, key)
        meant = renamed if renamed in ranked else closest(key, ranked)
        if elsewhere and (meant is None or meant != renamed):
            what, fix, meant = "unknown key here", elsewhere, None
        elif meant or (meant := closest(key, [f for f in fields if f in present])):
            what = f"unknown key; did you mean `{meant}`?"
            twice = f" (`{meant}` is given already: keep one)" if meant in present else ""
            fix = f"rename it to `{meant}`{twice}"
        else:
            what = "unknown key"
            listed = ", ".join(f"`{f}`" for f in fields)
            fix = f"remove it; keys here: {listed}" if fields else "remove it"
        why = _CONSEQUENCE.get(meant or "", "an ignored key would leave its default in force without a word")
        if meant is not None and (redact.telling(meant) or self._is_secret((*loc[:-1], meant))):
            self._secrets |= _words(self._draft.value(loc))
        problem = self._problem(Code.UNKNOWN, loc, what, why, fix)
        return problem, meant if meant not in present else None

    def _elsewhere(self, loc: Loc, key: str) -> str | None:
        """The mend for a key that is right in another place nearby."""
        parent = loc[:-1]
        owners = (*_PLUGIN_KEYS, "lane")
        for name in self._keys(parent):
            if name in owners and key in self._fields((*parent, name)) and key != "type":
                return f"move it into `{name}:` of this tier"
        if (
            len(parent) == 2
            and "lane" not in self._keys(parent)
            and key in ("threads", "queue", "inflight", "deadline")
        ):
            return f"move it into a lane: `lane: {{{key}: ...}}`"
        if not parent and key in self._fields(("tiers",)):
            return "move it into a tier of `tiers:`"
        for end in range(len(parent) - 1, -1, -1):
            above = parent[:end]
            if not isinstance(parent[end], int) and key in self._fields(above):
                return f"move it out to {f'`{dotted(above)}`' if above else 'the top level'}"
        return None

    def _other(self, error: ErrorDetails) -> Problem:
        loc, kind, context = self._real(error["loc"]), error["type"], error.get("ctx", {})
        if kind == "finding":
            return self._problem(Code(context["code"]), loc, context["what"], context["why"], context["fix"])
        if kind == "plugin":
            what, _, fix = context["what"].rpartition("; ")
            why = "a tier without its plugin would silently not be there"
            return self._problem(Code.PLUGIN, loc, what, why, fix)
        if kind == "missing":
            name = str(error["loc"][-1])
            loc = error["loc"]
            why, fix = "there is no safe default for it", f"add e.g. `{_EXAMPLE.get(name, f'{name}: ...')}`"
            return self._problem(Code.MISSING, loc, "is required and missing", why, fix)
        if kind == "literal_error":
            return self._choice(loc)
        what, fix = self._wording(error)
        return self._problem(Code.VALUE, loc, what, "", fix or self._example(loc))

    def _example(self, loc: Loc) -> str:
        """What to write for a setting, where no message of its own says it."""
        field = self._field(loc)
        if field is None or self._draft.origin(loc).path:
            return "correct the value, or remove the key"
        default = field.get_default()
        plain = isinstance(default, (str, int, float)) and not redact.telling(str(loc[-1]))
        example = _EXAMPLE.get(str(loc[-1])) or (f"{loc[-1]}: {shorten(default)}" if plain else "")
        told = f"`{loc[-1]}` is: " + " ".join(field.description.split()) if field.description else ""
        given = f"write e.g. `{example}`" if example else "" if told else f"correct `{loc[-1]}`, or remove it"
        return "; ".join(part for part in (told.rstrip("."), given) if part)

    def _choice(self, loc: Loc) -> Problem:
        field = self._field(loc)
        choices = [str(choice) for choice in _literals(field.annotation)] if field else []
        given = self.show(loc)
        near = closest(given, choices) or next(iter(difflib.get_close_matches(given, choices, n=1, cutoff=0.5)), None)
        listed = ", ".join(f"`{choice}`" for choice in choices)
        what = "is not one of the choices" + (f"; did you mean `{near}`?" if near else "")
        return self._problem(Code.VALUE, loc, what, "", f"choose one of {listed}")

    def _wording(self, error: ErrorDetails) -> tuple[str, str]:
        kind, context = error["type"], error.get("ctx", {})
        if kind == "value_error":
            return str(context.get("error", error["msg"])) or "is not valid", ""
        if kind in ("int_parsing", "int_type", "int_from_float"):
            return "must be a whole number", ""
        if kind in ("bool_parsing", "bool_type"):
            near = closest(str(error["input"]), ["true", "false"]) if isinstance(error["input"], str) else None
            return "must be true or false" + (f"; did you mean `{near}`?" if near else ""), "write `true` or `false`"
        if kind == "string_type":
            quoted = "put it in quotes" if isinstance(error["input"], (int, float)) else ""
            return "must be text", quoted or ("write the name of a plugin" if error["loc"][-1:] == ("type",) else "")
        if kind == "string_pattern_mismatch" and error["loc"][-1:] == ("name",):
            return "must be lower-case letters and digits, with single `-` or `_` between", "e.g. `name: nvme-1`"
        if kind in ("tuple_type", "list_type"):
            is_map = isinstance(error["input"], dict)
            fix = "write a list: start each item with `- `" + (" and give it its key as `name:`" if is_map else "")
            return "must be a list", fix + "; as JSON in the environment"
        if kind in ("model_type", "model_attributes_type", "dict_type", "is_instance_of"):
            name, given = error["loc"][-1], error["input"]
            plugin = isinstance(given, str) and name in _PLUGIN_KEYS
            fix = f"write `{name}: {{type: {given}}}`" if plugin else ""
            return "must be a mapping of settings", fix
        bounds = {"greater_than": ("above", "gt"), "greater_than_equal": ("at least", "ge")} | {
            "less_than": ("below", "lt"),
            "less_than_equal": ("at most", "le"),
        }
        if kind in bounds:
            word, key = bounds[kind]
            return f"must be {word} {context[key]:g}", ""
        message = error["msg"]
        return message[:1].lower() + message[1:], ""

    def _problem(self, code: Code, loc: Loc, what: str, why: str, fix: str) -> Problem:
        origin = self._draft.origin(loc)
        return Problem(
            where=origin.where,
            path=origin.path or dotted(loc),
            what=self.clean(what),
            why=self.clean(why),
            fix=self.clean(fix),
            value=self.clean(origin.value) or self.show(loc),
            code=code,
        )

    # -- looking around --------------------------------------------------------------------------------------
    def _keys(self, loc: Loc) -> list[str]:
        try:
            node = self._draft.value(loc)
        except KeyError:
            return []
        return [str(key) for key in node] if isinstance(node, Mapping) else []

    def _real(self, loc: Loc) -> Loc:
        """`loc` without the names that pydantic adds for branches of unions."""
        for end in range(len(loc) + 1):
            try:
                self._draft.value(loc[:end])
            except KeyError:
                # A setting that is absent but known (a finding about it) keeps its name.
                return loc[:end] if self._field(loc[:end]) is not None else loc[: end - 1]
        return loc

    def _fields(self, loc: Loc) -> Mapping[str, FieldInfo]:
        model = self._model(loc)
        return model.model_fields if model else {}

    def _field(self, loc: Loc) -> FieldInfo | None:
        return self._fields(loc[:-1]).get(loc[-1]) if loc and isinstance(loc[-1], str) else None

    def _is_secret(self, loc: Loc) -> bool:
        field = self._field(loc)
        return field is not None and any(part in (SecretStr, SecretBytes) for part in _parts(field.annotation))

    def _model(self, loc: Loc) -> type[BaseModel] | None:
        """The model that describes what stands at `loc`; the plugin's own inside `backend`, `serde`, `eviction`."""
        model: type[BaseModel] | None = self._root
        for i, part in enumerate(loc):
            if isinstance(part, int):
                continue
            field = model.model_fields.get(part) if model else None
            models = [] if field is None else [p for p in _parts(field.annotation) if _is_model(p)]
            if len(models) != 1:
                return None
            listed = i + 1 < len(loc) and isinstance(loc[i + 1], int)
            model = self._concrete(models[0], loc[: i + 1 + listed])
        return model

    def _concrete(self, model: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
        finders: dict[type[BaseModel], Callable[[str], type[BaseModel]]] = {
            BackendConfig: self._plugins.backend,
            SerdeConfig: self._plugins.serde,
            EvictionConfig: self._plugins.eviction,
            PluginConfig: lambda name: self._plugins.settings(name) or PluginConfig,
        }
        for base, find in finders.items():
            if model is base:
                try:
                    given = self._draft.value(loc)
                    kind = given["type"] if isinstance(given, Mapping) else None
                    return type(given) if isinstance(given, base) else find(kind) if isinstance(kind, str) else base
                except (KeyError, PluginError):
                    return base
        return model

    def _typed_secrets(self, value: Any, loc: Loc) -> Iterator[Any]:
        if isinstance(value, (Mapping, list)):
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                yield from self._typed_secrets(item, (*loc, key))
        elif isinstance(value, (str, int, float)) and loc and self._is_secret(loc):
            yield value


def _words(value: Any) -> set[str]:
    """Every text and number in plain data."""
    if isinstance(value, (Mapping, list)):
        return set().union(*(_words(item) for item in (value.values() if isinstance(value, Mapping) else value)))
    return {str(value)} if isinstance(value, (str, int, float)) and not isinstance(value, bool) else set()


def _parts(annotation: Any) -> Iterable[Any]:
    """Every type inside an annotation."""
    yield annotation
    if get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _parts(part)


def _is_model(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _literals(annotation: Any) -> list[Any]:
    return [value for part in _parts(annotation) if get_origin(part) is Literal for value in get_args(part)]
