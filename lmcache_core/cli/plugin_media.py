"""A backend's medium for `plugin test` and `plugin bench`: what its rig starts, or what `--option` reaches."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lmcache_core import redact
from lmcache_core.config.draft import once
from lmcache_core.errors import ConfigError, Problem
from lmcache_core.plugins import RIGS, Plugins
from lmcache_core.spelling import closest
from lmcache_core.testing.rig import Medium, find_rig

Config = TypeVar("Config", bound=BaseModel)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The option that sets what would stand in a configuration."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the plugin, on top of what its rig sets; lists and mappings as JSON; may be repeated",
    )


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as settings. Raise `ConfigError` with every word that is none."""
    options: dict[str, Any] = {}
    problems: list[Problem] = []
    for word in given:
        key, equals, value = word.partition("=")
        if not (equals and key.isidentifier()):
            fix = "write it as key=value, e.g. --option path=/var/tmp/kv"
            problems.append(
                Problem(where="command line", path="--option", what=f"`{_word(key)}` is no setting", fix=fix)
            )
            continue
        try:
            options[key] = json.loads(value, object_pairs_hook=once) if value[:1] in ("[", "{") else value
        except ValueError as error:
            problems.append(Problem(where="command line", path=f"--option {key}", what=f"is no JSON: {error}"))
    if problems:
        raise ConfigError(problems)
    return options


def _word(text: str) -> str:
    """The name that a wrong word begins with: behind it a password may stand."""
    found = re.match(r"\w*", text)
    return f"{found[0]}..." if found and found[0] != text else text


def secrets_of(options: Mapping[str, Any], cls: type[BaseModel] | None) -> set[str]:
    """What must not be shown of the settings given to a `cls`."""
    fields = {} if cls is None else cls.model_fields
    typed = {
        str(options[name])
        for name, field in fields.items()
        if name in options and any(kind in str(field.annotation) for kind in ("SecretStr", "SecretBytes"))
    }
    return typed | redact.collect(options)


def configure(cls: type[Config], settings: Mapping[str, Any], hint: str = "") -> Config:
    """`cls` with these settings. Raise `ConfigError` naming each that is wrong or missing; values are not shown."""
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as error:
        problems = []
        for found in error.errors(include_input=False, include_url=False, include_context=False):
            name = ".".join(str(part) for part in found["loc"])
            fix = f"give it: --option {name}=..." if found["type"] == "missing" else ""
            if found["type"] == "extra_forbidden":
                near = closest(name, cls.model_fields)
                known = ", ".join(key for key in cls.model_fields if key != "type")
                fix = f"did you mean `{near}`?" if near else f"there are: {known}"
            path = f"{cls.model_fields['type'].default}.{name}" if name else str(cls.model_fields["type"].default)
            problems.append(Problem(where="command line", path=path, what=found["msg"], why=hint, fix=fix))
        raise ConfigError(problems) from None


@contextmanager
def started(plugins: Plugins, name: str, options: Mapping[str, Any], directory: Path) -> Iterator[Medium]:
    """The medium of backend `name`, up and empty; `directory` is for its files.

    A rig's settings are those of the medium it started, changed by `options`; without a rig there are only `options`.
    Raise `PluginError`, `ConfigError`, or `BackendUnavailable` where the rig cannot start it.
    """
    cls = plugins.backend(name)
    rig = find_rig(plugins, name)
    if rig is None:
        have = ", ".join(plugins.names(RIGS)) or "none"
        yield Medium(configure(cls, options, f"backend `{name}` has no rig that would set it; rigs installed: {have}"))
        return
    directory.mkdir(parents=True, exist_ok=True)
    with rig.start(directory) as medium:
        given = {key: getattr(medium.config, key) for key in medium.config.model_fields_set}
        config = configure(type(medium.config), {**given, **options}) if options else medium.config
        yield Medium(config, medium.baseline)
