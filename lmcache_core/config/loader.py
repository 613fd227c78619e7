"""`load`: from a file, the environment or Python to one checked `PipelineConfig`, or every problem at once."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lmcache_core.config import classic, text
from lmcache_core.config.checks import machine_findings
from lmcache_core.config.diagnose import Diagnosis
from lmcache_core.config.draft import DEFAULT, PYTHON, Draft, Origin, overlay
from lmcache_core.config.findings import Code, Loc, dotted, raise_findings
from lmcache_core.config.models import PipelineConfig, Shape, pipeline_findings, plugin_findings
from lmcache_core.errors import ConfigError, PluginError, Problem
from lmcache_core.plugins import BACKENDS, EVICTIONS, PLUGINS, SERDES, Plugins

CONFIG_FILE = "LMCACHE_CONFIG_FILE"

DEFAULT_CONFIG: dict[str, Any] = {"tiers": [{"name": "dram", "capacity": "1GiB", "backend": {"type": "cpu"}}]}
"""What `load(None)` gives when the environment names nothing: 1 GiB of host memory."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checked configuration and where each value came from."""

    config: PipelineConfig
    provenance: dict[str, str]
    """Setting (`tiers[0].capacity`) -> `file:line`, `env:NAME`, `python` or `default`."""
    notes: tuple[str, ...]
    """Things worth a word that stop nothing, such as classic keys without a meaning here."""
    source: str
    """The file's name, or `environment`, `python`, `default`."""
    plugins: Plugins
    """Everything the configuration names, imported and checked."""


def load(source: Path | str | Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> Loaded:
    """Load, overlay, validate and check a configuration.

    `source` is a path, a mapping, or None for the file that `LMCACHE_CONFIG_FILE` names, else classic variables,
    else `DEFAULT_CONFIG`. `env` stands for `os.environ`. Raise `ConfigError` with every problem found.
    """
    env = os.environ if env is None else env
    plugins = Plugins()
    draft, name = _read(source, env)
    overlay(draft, env)
    diagnosis = Diagnosis(draft, PipelineConfig, plugins)
    _wrappers(draft, plugins)
    problems, config = [_with_value(problem, draft, diagnosis) for problem in draft.problems], None
    try:
        config = PipelineConfig.model_validate(draft.data, context={"plugins": plugins})
    except ValidationError as error:
        known = {(details["loc"], details["msg"]) for details in error.errors()}
        between = [
            details for details in _between_tiers(draft, plugins) if (details["loc"], details["msg"]) not in known
        ]
        # What the reader refused (a tag, a second value) is one problem, not also a wrong value.
        refused = {problem.path for problem in draft.problems}
        found = diagnosis.problems([*error.errors(), *between])
        problems += [problem for problem in found if problem.path not in refused]
    if config is not None:
        try:
            raise_findings("PipelineConfig", machine_findings(config))
        except ValidationError as error:
            problems += diagnosis.problems(error.errors())
    if problems or config is None:
        # Without a cause: a traceback would print pydantic's own message, with values that may be secrets.
        raise ConfigError([_clean(problem, diagnosis) for problem in sorted(problems, key=_text_order)])
    notes = tuple(diagnosis.clean(note) for note in draft.notes)
    return Loaded(config, _provenance(draft, config), notes, name, plugins)


def named_plugins(
    source: Path | str | Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None
) -> tuple[set[tuple[str, str]], str]:
    """(group, name) of every plugin that the configuration names, and its source. Imports no plugin, validates nothing.

    Raise `ConfigError` when the file cannot be parsed.
    """
    env = os.environ if env is None else env
    draft, name = _read(source, env)
    overlay(draft, env)
    wrappers, tiers = draft.data.get("plugins"), draft.data.get("tiers")
    items = [_plugin_type(item) for item in (wrappers if isinstance(wrappers, list) else [])]
    named = {(PLUGINS, item) for item in items if item is not None}
    for tier in tiers if isinstance(tiers, list) else []:
        parts = tier if isinstance(tier, dict) else {}
        for key, group in (("backend", BACKENDS), ("serde", SERDES), ("eviction", EVICTIONS)):
            part = parts.get(key, {"type": "lru"} if key == "eviction" else None)
            kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
            if isinstance(kind, str):
                named.add((group, kind))
    return named, name


def _read(source: Path | str | Mapping[str, Any] | None, env: Mapping[str, str]) -> tuple[Draft, str]:
    if source is None and env.get(CONFIG_FILE):
        source = env[CONFIG_FILE]
    variables = classic.variables(env)
    if source is None and not variables:
        return Draft.of_data(DEFAULT_CONFIG, DEFAULT), "default"
    if source is None:
        draft, name = Draft.of_data({}, Origin("environment", "environment")), "environment"
    elif isinstance(source, Mapping):
        draft, name = Draft.of_data(source, PYTHON), "python"
    else:
        draft, name = Draft.of_document(text.read(Path(source))), str(source)
    if source is None or classic.is_classic(draft.data):
        classic.translate(draft, env)
    else:
        for variable in sorted(variables.values()):
            draft.notes.append(f"env:{variable}: is ignored, because {name} is not written in classic keys")
    return draft, name


def _plugin_type(item: Any) -> str | None:
    """The plugin that an item of `plugins:` names, as text or with its settings."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", item)
    return kind if isinstance(kind, str) else None


def _with_value(problem: Problem, draft: Draft, diagnosis: Diagnosis) -> Problem:
    """A problem of the reader's, together with what was written there."""
    if problem.value or problem.where not in draft.refused:
        return problem
    return dataclasses.replace(problem, value=diagnosis.show_value(*draft.refused[problem.where]))


def _wrappers(draft: Draft, plugins: Plugins) -> None:
    """Import the named plugins now, so that a missing one is reported beside everything else."""
    names = draft.data.get("plugins")
    for i, name in enumerate(names if isinstance(names, list) else []):
        if isinstance(name, str):
            try:
                plugins.load(PLUGINS, name)
            except PluginError as error:
                loc: Loc = ("plugins", i)
                what, _, fix = str(error).rpartition("; ")
                why = "what the plugin was to add would silently not be there"
                where = draft.origin(loc).where
                draft.problems.append(Problem(where, dotted(loc), what, why, fix, value=name, code=Code.PLUGIN))


def _between_tiers(draft: Draft, plugins: Plugins) -> list[ErrorDetails]:
    """What is wrong between tiers, where other errors kept the models from saying it."""
    tiers = draft.data.get("tiers")
    if not isinstance(tiers, list):
        return []
    shapes = [_shape(tier, plugins) for tier in tiers]
    names = [shape.name for shape in shapes if shape.name is not None]
    found = pipeline_findings(shapes)
    if len(names) == len(shapes):
        found += plugin_findings(_plugin_tiers(draft), names)
    try:
        raise_findings("PipelineConfig", found)
    except ValidationError as findings:
        return findings.errors()
    return []


def _plugin_tiers(draft: Draft) -> list[list[str]]:
    """The tiers that each item of `plugins:` names, as far as they are names."""
    items = draft.data.get("plugins")
    lists = [
        item.get("tiers") if isinstance(item, dict) else None for item in (items if isinstance(items, list) else [])
    ]
    named = [names if isinstance(names, list) else [] for names in lists]
    return [names if all(isinstance(name, str) for name in names) else [] for names in named]


def _shape(tier: Any, plugins: Plugins) -> Shape:
    tier = tier if isinstance(tier, dict) else {}
    name, backend = tier.get("name"), tier.get("backend")
    kind = backend.get("type") if isinstance(backend, dict) else getattr(backend, "type", None)
    try:
        cls = plugins.backend(kind) if isinstance(kind, str) else None
    except PluginError:
        cls = None
    memory, device = (None, False) if cls is None else (cls.in_memory, cls.on_device)
    return Shape(name if isinstance(name, str) else None, memory, device)


def _provenance(draft: Draft, config: PipelineConfig) -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(value: Any, loc: Loc, given: bool) -> None:
        if isinstance(value, BaseModel):
            for key in type(value).model_fields:
                walk(getattr(value, key), (*loc, key), given and key in value.model_fields_set)
        elif isinstance(value, (list, tuple)) and value:
            for i, item in enumerate(value):
                walk(item, (*loc, i), given)
        else:
            found[dotted(loc)] = draft.origin(loc).label if given else "default"

    walk(config, (), True)
    return found


_PLACE = re.compile(r":(\d+):(\d+)$")


def _text_order(problem: Problem) -> tuple[int, int]:
    match = _PLACE.search(problem.where)
    return (int(match[1]), int(match[2])) if match else (1 << 30, 0)


def _clean(problem: Problem, diagnosis: Diagnosis) -> Problem:
    """The problem without secrets, whoever wrote its words."""
    return Problem(
        problem.where,
        diagnosis.clean(problem.path),
        diagnosis.clean(problem.what),
        diagnosis.clean(problem.why),
        diagnosis.clean(problem.fix),
        diagnosis.clean(problem.value),
        problem.code,
    )
