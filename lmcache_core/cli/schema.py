"""`lmcachectl schema`: one JSON Schema of the configuration, with plugins' own settings inside."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from lmcache_core.cli.console import OK, PROBLEM, warn
from lmcache_core.cli.reference import markdown
from lmcache_core.config import PipelineConfig, named_plugins
from lmcache_core.errors import PluginError
from lmcache_core.plugins import BACKENDS, EVICTIONS, OWN_DISTRIBUTION, PLUGINS, SERDES, Installed, Plugins, installed
from lmcache_core.units import Percent

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_BASES = {"BackendConfig": BACKENDS, "SerdeConfig": SERDES, "EvictionConfig": EVICTIONS, "PluginConfig": PLUGINS}


class _Generator(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Percent) else super().encode_default(dft)


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "schema",
        help="print the JSON Schema of the configuration",
        description="Print the JSON Schema of the configuration, for editors and validators: with the settings of the "
        "built-in plugins, of those that FILE names, and with --installed of every plugin there is (which imports "
        "them). Settings of other plugins are accepted as they are; `lmcachectl check` validates them.",
    )
    parser.add_argument("file", nargs="?", type=Path, help="a configuration whose plugins are described, too")
    parser.add_argument("--installed", action="store_true", help="import and describe every installed plugin")
    parser.add_argument("--markdown", action="store_true", help="print tables of the plugins' settings instead")
    parser.add_argument("--json", action="store_true", help="print it on one line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the schema; exit code 1 when a plugin that was asked for cannot be described."""
    named = named_plugins(args.file)[0] if args.file else set()
    failed: list[str] = []
    asked: Callable[[Installed], bool] = lambda plugin: args.installed or (plugin.group, plugin.name) in named  # noqa: E731
    if args.markdown:
        models = _models(asked, failed)
        print(markdown([(_BASES[base], model) for base, some in models.items() for model in some]), end="")
        return _warned(failed)
    made = schema(asked, failed)
    print(json.dumps(made, separators=(",", ":")) if args.json else json.dumps(made, indent=2))
    return _warned(failed)


def _warned(failed: list[str]) -> int:
    for reason in failed:
        warn(f"left out: {reason}")
    return PROBLEM if failed else OK


def schema(
    asked: Callable[[Installed], bool] = lambda plugin: False, failed: list[str] | None = None
) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a configuration file. Imports the built-in plugins and those `asked` for, no other.

    `failed` gets the reasons why plugins that were asked for are not in it; without it their `PluginError` is raised.
    """
    models = _models(asked, failed)
    everything: list[type[BaseModel]] = [PipelineConfig, *(model for some in models.values() for model in some)]
    references, record = models_json_schema(
        [(model, "validation") for model in everything], schema_generator=_Generator
    )
    definitions = record["$defs"]
    for base, some in models.items():
        definitions[base] = _choice([references[model, "validation"] for model in some], some)
    top = definitions.pop("PipelineConfig")
    return {"$schema": DIALECT, **top, "title": "lmcache-core configuration", "$defs": definitions}


def _models(asked: Callable[[Installed], bool], failed: list[str] | None) -> dict[str, list[type[BaseModel]]]:
    """The settings of the built-in plugins and of those asked for, by what they are."""
    plugins = Plugins()
    models: dict[str, list[type[BaseModel]]] = {base: [] for base in _BASES}
    for base, group in _BASES.items():
        for plugin in installed():
            if plugin.group != group or (plugin.distribution != OWN_DISTRIBUTION and not asked(plugin)):
                continue
            try:
                model = _model(plugins, plugin)
            except PluginError as error:
                if failed is None:
                    raise
                failed.append(str(error))
            else:
                models[base] += [] if model is None or model in models[base] else [model]
    return models


def _model(plugins: Plugins, plugin: Installed) -> type[BaseModel] | None:
    """A plugin's settings, None when it has none. Raise `PluginError`, also when they have no JSON Schema."""
    finders: dict[str, Callable[[str], type[BaseModel] | None]] = {
        BACKENDS: plugins.backend,
        SERDES: plugins.serde,
        EVICTIONS: plugins.eviction,
        PLUGINS: plugins.settings,
    }
    model = finders[plugin.group](plugin.name)
    try:
        if model is not None:
            model.model_json_schema(schema_generator=_Generator)
    except PydanticUserError as error:
        raise PluginError(f"{plugin}: its settings have no JSON Schema: {error.message}") from error
    return model


def _choice(references: list[JsonSchemaValue], models: list[type[BaseModel]]) -> dict[str, Any]:
    """One of the built-ins by `type`, or any other plugin's settings."""
    names = [model.model_fields["type"].default for model in models]
    taken = {"not": {"enum": names}} if names else {}
    other = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"type": "string", **taken}},
        "description": "settings of another installed plugin",
    }
    cases = [
        {"allOf": [reference, {"type": "object", "required": ["type"], "properties": {"type": {"const": name}}}]}
        for reference, name in zip(references, names, strict=True)
    ]
    return {"oneOf": [*cases, other]}
