"""`lmcachectl schema`: one JSON Schema of the configuration, with the built-in plugins' own settings inside."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from lmcache_core.cli.console import OK
from lmcache_core.config import PipelineConfig
from lmcache_core.plugins import BACKENDS, EVICTIONS, OWN_DISTRIBUTION, SERDES, Plugins, installed
from lmcache_core.units import Percent

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_BASES = {"BackendConfig": BACKENDS, "SerdeConfig": SERDES, "EvictionConfig": EVICTIONS}


class _Generator(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Percent) else super().encode_default(dft)


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "schema",
        help="print the JSON Schema of the configuration",
        description="Print the JSON Schema of the configuration, for editors and validators. Settings of third-party "
        "plugins are accepted as they are; `lmcachectl check` validates them.",
    )
    parser.add_argument("--json", action="store_true", help="print it on one line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(schema(), separators=(",", ":")) if args.json else json.dumps(schema(), indent=2))
    return OK


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a configuration file."""
    plugins = Plugins()
    finders = {BACKENDS: plugins.backend, SERDES: plugins.serde, EVICTIONS: plugins.eviction}
    models: dict[str, list[type[BaseModel]]] = {base: [] for base in _BASES}
    for base, group in _BASES.items():
        for plugin in installed():
            if plugin.group == group and plugin.distribution == OWN_DISTRIBUTION:
                models[base].append(finders[group](plugin.name))
    everything: list[type[BaseModel]] = [PipelineConfig, *(model for some in models.values() for model in some)]
    references, record = models_json_schema(
        [(model, "validation") for model in everything], schema_generator=_Generator
    )
    definitions = record["$defs"]
    for base, some in models.items():
        definitions[base] = _choice([references[model, "validation"] for model in some], some)
    top = definitions.pop("PipelineConfig")
    return {"$schema": DIALECT, **top, "title": "lmcache-core configuration", "$defs": definitions}


def _choice(references: list[JsonSchemaValue], models: list[type[BaseModel]]) -> dict[str, Any]:
    """One of the built-ins by `type`, or any other plugin's settings."""
    names = [model.model_fields["type"].default for model in models]
    other = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"type": "string", "not": {"enum": names}}},
        "description": "settings of another installed plugin",
    }
    cases = [
        {"allOf": [reference, {"type": "object", "required": ["type"], "properties": {"type": {"const": name}}}]}
        for reference, name in zip(references, names, strict=True)
    ]
    return {"oneOf": [*cases, other]}
