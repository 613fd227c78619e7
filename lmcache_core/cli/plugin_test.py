"""`lmcachectl plugin test TYPE`: the conformance kit over an installed plugin."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from lmcache_core import redact
from lmcache_core.cli.bench_common import work_directory
from lmcache_core.cli.console import OK, PROBLEM, add_json, emit, working
from lmcache_core.cli.plugin_media import add_options, configure, parse_options, secrets_of, started
from lmcache_core.cli.plugin_new import KINDS
from lmcache_core.errors import PluginError, UnknownPlugin
from lmcache_core.plugins import BACKENDS, EVICTIONS, PLUGINS, SERDES, Plugins
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, StorageBackend
from lmcache_core.spelling import closest
from lmcache_core.testing.conformance import Outcome, run_kit, run_storage_tests
from lmcache_core.testing.eviction import EvictionTests
from lmcache_core.testing.memory import DictConfig
from lmcache_core.testing.rig import Medium
from lmcache_core.testing.serde import SerdeTests


def register(kinds: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "test",
        help="run the conformance kit over an installed plugin",
        description="Run the conformance kit over an installed plugin: a backend on the medium that its rig starts, a "
        "wrapper around objects in memory. The medium is cleared: --option must name a place of its own.",
    )
    parser.add_argument("type", metavar="TYPE", help="the plugin's name, see `lmcachectl plugins`")
    parser.add_argument("--kind", choices=list(KINDS), help="where several plugins of different kinds have the name")
    parser.add_argument(
        "--path", type=Path, metavar="DIR", help="where the medium's files go (default: the cache directory)"
    )
    add_options(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Test and print; 1 when a contract is broken. Raise `LMCacheError` when nothing could be tested."""
    options = parse_options(args.option)
    plugins = Plugins()
    kind = args.kind or _kind(plugins, args.type)
    with work_directory(args.path) as directory, working(f"testing {kind} {args.type}"):
        outcomes = check(plugins, kind, args.type, options, directory)
    finders: dict[str, Callable[[str], type[BaseModel] | None]] = {
        BACKENDS: plugins.backend,
        SERDES: plugins.serde,
        EVICTIONS: plugins.eviction,
        PLUGINS: plugins.settings,
    }
    secrets = secrets_of(options, finders[KINDS[kind].group](args.type))
    outcomes = [replace(outcome, message=redact.scrub(outcome.message, secrets)) for outcome in outcomes]
    failed = sum(not outcome.passed for outcome in outcomes)
    passed = len(outcomes) - failed
    if args.json:
        emit({
            "ok": not failed,
            "type": args.type,
            "kind": kind,
            "passed": passed,
            "failed": failed,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        })  # fmt: skip
    else:
        for outcome in outcomes:
            print(f"  ok      {_words(outcome)}" if outcome.passed else f"  FAILED  {_words(outcome)}")
            if not outcome.passed:
                print("\n".join(f"          {line}" for line in outcome.message.splitlines()))
        print(f"{kind} {args.type}: {passed} passed, {failed} failed")
    return PROBLEM if failed else OK


def check(plugins: Plugins, kind: str, name: str, options: Mapping[str, Any], directory: Path) -> list[Outcome]:
    """Every test of the kit for that kind of plugin; `directory` is for the medium's files."""
    group = KINDS[kind].group
    if group == SERDES:
        return run_kit(SerdeTests(), configure(plugins.serde(name), options).build)
    if group == EVICTIONS:
        return run_kit(EvictionTests(), configure(plugins.eviction(name), options).build)
    if group == PLUGINS:
        settings = plugins.settings(name)
        if settings is None and options:
            raise PluginError(f"wrapper `{name}` has no settings that --option could give")
        wrapper = Plugins()
        wrapper.activate([name if settings is None else configure(settings, options)])
        return run_storage_tests(lambda _: _behind(wrapper), directory)
    return run_storage_tests(lambda place: started(plugins, name, options, place), directory)


def _words(outcome: Outcome) -> str:
    return outcome.name.replace("_", " ")


def _kind(plugins: Plugins, name: str) -> str:
    """What the name is. Raise `PluginError` when it is nothing, or several things."""
    groups = {kind: plugins.names(what.group) for kind, what in KINDS.items()}
    found = [kind for kind, names in groups.items() if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise PluginError(f"`{name}` is a {' and a '.join(found)}: say which with --kind {found[0]}")
    near = closest(name, [each for names in groups.values() for each in names])
    hint = f"did you mean `{near}`? " if near else ""
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in groups.items() if names)
    raise UnknownPlugin(
        f"no plugin `{name}` is installed; {hint}installed: {listed}; to add yours: `pip install -e .` in its directory"
    )


class _Behind(BackendConfig):
    """Objects in a dict, behind the wrappers of `plugins`."""

    type: Literal["dict"] = "dict"
    plugins: Any
    inner: DictConfig

    def build(self, context: BuildContext) -> StorageBackend | MemoryBackend:
        backend: StorageBackend | MemoryBackend = self.plugins.build_backend(self.inner, context)
        return backend


@contextmanager
def _behind(wrappers: Plugins) -> Iterator[Medium]:
    yield Medium(_Behind(plugins=wrappers, inner=DictConfig()))
