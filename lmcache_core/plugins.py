"""Finding, importing and checking plugins. Everything here happens once, at start-up.

A plugin is a module with pluggy hook implementations, announced as an entry point in one of the first four groups:

    lmcache.backends    the entry's name is a backend `type`            -> hook lmcache_backends
    lmcache.serdes      the entry's name is a serde `type`              -> hook lmcache_serdes
    lmcache.evictions   the entry's name is an eviction `type`          -> hook lmcache_evictions
    lmcache.plugins     the entry's name stands in `plugins:`           -> hook lmcache_plugins (its settings), or
                                                                           lmcache_build_backend (without any)
    lmcache.rigs        the entry's name is a backend `type`            -> a class, see lmcache_core.testing.rig

Installed is not active: a module is imported only when a configuration names it. The built-ins are announced by
lmcache-core's own distribution and come in through the same door. The core calls each hook in one place, here.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import pluggy
from pydantic import BaseModel

from lmcache_core import hookspecs
from lmcache_core.errors import PluginConflict, PluginError, UnknownPlugin
from lmcache_core.hookspecs import PROJECT, hookimpl
from lmcache_core.protocols import (
    API_VERSION,
    BackendConfig,
    BuildContext,
    EvictionConfig,
    MemoryBackend,
    PluginConfig,
    SerdeConfig,
    StorageBackend,
)
from lmcache_core.spelling import closest

BACKENDS = "lmcache.backends"
SERDES = "lmcache.serdes"
EVICTIONS = "lmcache.evictions"
PLUGINS = "lmcache.plugins"
RIGS = "lmcache.rigs"
GROUPS = (BACKENDS, SERDES, EVICTIONS, PLUGINS, RIGS)
NOUNS = {BACKENDS: "backend", SERDES: "serde", EVICTIONS: "eviction policy", PLUGINS: "plugin", RIGS: "rig"}

OWN_DISTRIBUTION = "lmcache-core"
_SEPARATORS = re.compile(r"[-_.]+")


@dataclass(frozen=True, slots=True)
class Installed:
    """One announced plugin. Reading this imports nothing of the plugin."""

    group: str
    name: str
    distribution: str
    version: str
    target: str
    """What the entry point names: a module, or `module:attribute`."""
    file: str
    """Where the distribution's metadata lies."""
    entry: importlib.metadata.EntryPoint

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.target})"


def installed() -> list[Installed]:
    """Every announced plugin of every distribution on `sys.path`, sorted by group and name."""
    found: list[Installed] = []
    seen: set[str] = set()
    for dist in importlib.metadata.distributions():
        try:
            ours = [entry for entry in dist.entry_points if entry.group in GROUPS]
        except ValueError:  # somebody else's, and no text: no plugin of ours can be announced there
            continue
        if not ours or not dist.name:  # half removed: without its metadata it is not installed
            continue
        folded = _SEPARATORS.sub("-", dist.name).lower()
        if folded in seen:
            continue  # shadowed by a copy earlier on `sys.path`, as its modules are
        seen.add(folded)
        file = str(dist.locate_file(""))
        found += [Installed(e.group, e.name, dist.name, dist.version, e.value, file, e) for e in ours]
    return sorted(found, key=lambda p: (GROUPS.index(p.group), p.name, p.distribution))


class _Defaults:
    """What the core does when no plugin wraps a hook."""

    @hookimpl(trylast=True)
    def lmcache_build_backend(self, config: BackendConfig, context: BuildContext) -> StorageBackend | MemoryBackend:
        return config.build(context)


class Plugins:
    """The plugins of one configuration: resolves `type` names to classes and builds backends through the hooks."""

    def __init__(self, wrappers: Iterable[str] = ()) -> None:
        """Load the `lmcache.plugins` named in `wrappers`; they take part in every `build_backend` of this object.

        Raise `UnknownPlugin`, `PluginConflict` or `PluginError`.
        """
        self._installed: list[Installed] | None = None
        self._modules: dict[tuple[str, str], object] = {}
        self._manager = _manager()
        self._manager.register(_Defaults(), name="lmcache-defaults")
        self._activated: list[str] = []
        for name in wrappers:
            self.load(PLUGINS, name)

    def activate(self, named: Iterable[str | PluginConfig]) -> None:
        """Let what stands in `plugins:` of one configuration, and of no other, take part in `build_backend`.

        The one named last is the outermost wrapper. Raise what `load` raises, and what a plugin raises in its `build`.
        """
        for name in self._activated:
            self._manager.unregister(name=name)
        self._activated = []
        for number, item in enumerate(named):
            if isinstance(item, str):
                plugin = self.load(PLUGINS, item)
                # Loaded before, perhaps, by the loader: its place among the wrappers is the one it has in the list.
                self._manager.unregister(name=f"{PLUGINS}:{item}")
                _register(self._manager, plugin, self._modules[PLUGINS, item])
            else:
                name = f"{PLUGINS}:{number}:{item.type}"
                _checked_register(self._manager, f"plugin `{item.type}`", item.build(), name)
                self._activated.append(name)

    def register(self, plugin: object, name: str) -> None:
        """Let a plugin object that is not installed, such as a fault injector, take part in `build_backend`."""
        self._manager.register(plugin, name=name)
        self._manager.check_pending()

    @property
    def active(self) -> set[tuple[str, str]]:
        """(group, name) of everything imported so far through this object."""
        return set(self._modules)

    def names(self, group: str) -> list[str]:
        """Names announced in `group`."""
        return sorted({plugin.name for plugin in self._scan() if plugin.group == group})

    def backend(self, name: str) -> type[BackendConfig]:
        """The backend config class whose `type` is `name`."""
        plugin = self.load(BACKENDS, name)
        cls: type[BackendConfig] = _pick(
            plugin, _classes(plugin, self._modules[BACKENDS, name]).lmcache_backends(), BackendConfig
        )
        return cls

    def serde(self, name: str) -> type[SerdeConfig]:
        """The serde config class whose `type` is `name`."""
        plugin = self.load(SERDES, name)
        cls: type[SerdeConfig] = _pick(
            plugin, _classes(plugin, self._modules[SERDES, name]).lmcache_serdes(), SerdeConfig
        )
        return cls

    def eviction(self, name: str) -> type[EvictionConfig]:
        """The eviction config class whose `type` is `name`."""
        plugin = self.load(EVICTIONS, name)
        cls: type[EvictionConfig] = _pick(
            plugin, _classes(plugin, self._modules[EVICTIONS, name]).lmcache_evictions(), EvictionConfig
        )
        return cls

    def rig(self, name: str) -> object | None:
        """What the entry point of the rig for backend `name` names, imported; None where no distribution has one."""
        if name not in self.names(RIGS):
            return None
        self.load(RIGS, name)
        return self._modules[RIGS, name]

    def settings(self, name: str) -> type[PluginConfig] | None:
        """The settings class of the `lmcache.plugins` entry `name`; None for a plugin that takes none."""
        plugin = self.load(PLUGINS, name)
        answers = _classes(plugin, self._modules[PLUGINS, name]).lmcache_plugins()
        cls: type[PluginConfig] | None = _pick(plugin, answers, PluginConfig) if answers else None
        return cls

    def build_backend(self, config: BackendConfig, context: BuildContext) -> StorageBackend | MemoryBackend:
        """Build one tier's backend, through every wrapper. Raise what the backend or a wrapper raises."""
        context = self._wrapped(config, context)
        backend = self._manager.hook.lmcache_build_backend(config=config, context=context)
        want = MemoryBackend if config.in_memory else StorageBackend
        if not isinstance(backend, want):
            raise PluginError(
                f"tier `{context.tier}`: building backend `{config.type}` gave a {type(backend).__name__}, "
                f"not a {want.__name__} (in_memory is {config.in_memory})"
            )
        return backend

    def memory_bytes(self, config: BackendConfig, context: BuildContext) -> int:
        """Bytes of memory that a tier's backend and its wrappers take for buffers of their own."""
        context = self._wrapped(config, context)
        wrappers = self._manager.hook.lmcache_wrapper_memory(config=config, context=context)
        return config.memory_bytes(context) + int(sum(wrappers))

    def _wrapped(self, config: BackendConfig, context: BuildContext) -> BuildContext:
        """The context for what is inside the wrappers, which make objects larger."""
        added = sum(self._manager.hook.lmcache_object_overhead(config=config, context=context))
        return replace(context, object_bytes=context.object_bytes + added)

    def load(self, group: str, name: str) -> Installed:
        """Import and check one named plugin, once. Raise `UnknownPlugin`, `PluginConflict` or `PluginError`."""
        plugin = self._find(group, name)
        if (group, name) in self._modules:
            return plugin
        module = _import(plugin)
        _check_api(plugin, module)
        if group == PLUGINS:
            _register(self._manager, plugin, module)
        self._modules[group, name] = module
        return plugin

    def _scan(self) -> list[Installed]:
        if self._installed is None:
            self._installed = installed()
        return self._installed

    def _find(self, group: str, name: str) -> Installed:
        found = [p for p in self._scan() if p.group == group and p.name == name]
        if not found:
            self._installed = None  # something may have been installed since the last look
            found = [p for p in self._scan() if p.group == group and p.name == name]
        if not found:
            raise UnknownPlugin(self._unknown(group, name))
        if len({(p.distribution, p.target) for p in found}) > 1:
            claims = " and ".join(str(p) for p in found)
            raise PluginConflict(
                f"{NOUNS[group]} `{name}` is claimed by {claims}; uninstall one: "
                + " or ".join(f"`pip uninstall {d}`" for d in sorted({p.distribution for p in found}))
            )
        return found[0]

    def _unknown(self, group: str, name: str) -> str:
        noun, names = NOUNS[group], self.names(group)
        close = closest(name, names)
        hint = f"did you mean `{close}`? " if close else ""
        listed = ", ".join(names) or "none"
        if not any(p.distribution == OWN_DISTRIBUTION for p in self._scan()):
            mend = f"{OWN_DISTRIBUTION} itself is not installed, only importable: `pip install {OWN_DISTRIBUTION}`"
        elif group == BACKENDS:
            mend = f"to add it: `pip install lmcache-backend-{name}`"
        else:
            mend = "to add it, install the distribution that provides it"
        if close:
            mend = f"write `{close}`, or {mend}"
        return f"no {noun} `{name}` is installed; {hint}installed: {listed}; {mend}"


@functools.cache
def default() -> Plugins:
    """The process's plugins, used where a Python configuration names a `type` without giving a manager."""
    return Plugins()


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _import(plugin: Installed) -> object:
    try:
        return plugin.entry.load()
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}" if str(error) else repr(error)
        missing = error.name if isinstance(error, ImportError) else None
        root = __name__.partition(".")[0]
        if missing and missing.partition(".")[0] == root != plugin.target.partition(".")[0]:
            mend = (
                f"it was written for another version of {OWN_DISTRIBUTION}: "
                f"`pip install --upgrade {OWN_DISTRIBUTION} {plugin.distribution}`"
            )
        elif missing and missing != plugin.entry.module and isinstance(error, ModuleNotFoundError):
            mend = f"it needs `{missing.partition('.')[0]}`, which is not installed"
        else:
            mend = f"reinstall or update it: `pip install --upgrade {plugin.distribution}`"
        raise PluginError(
            f"{NOUNS[plugin.group]} `{plugin.name}` of {plugin} cannot be imported: {cause}; {mend}"
        ) from error


def _check_api(plugin: Installed, module: object) -> None:
    """A plugin may say which contract it was written for, as `LMCACHE_API = 1`; no statement means the current one."""
    version = getattr(module, "LMCACHE_API", None)
    if version is None:  # the entry may name an object inside the module
        version = getattr(sys.modules.get(plugin.entry.module), "LMCACHE_API", API_VERSION)
    if version != API_VERSION:
        older = isinstance(version, int) and version < API_VERSION
        update = plugin.distribution if older else OWN_DISTRIBUTION
        raise PluginError(
            f"{NOUNS[plugin.group]} `{plugin.name}` of {plugin} was written for plugin API {version}, this "
            f"{OWN_DISTRIBUTION} has {API_VERSION}: `pip install --upgrade {update}`"
        )


def _register(manager: pluggy.PluginManager, plugin: Installed, module: object) -> None:
    title = f"{NOUNS[plugin.group]} `{plugin.name}` of {plugin}"
    _checked_register(manager, title, module, f"{plugin.group}:{plugin.name}")


def _checked_register(manager: pluggy.PluginManager, title: str, plugin: object, name: str) -> None:
    try:
        manager.register(plugin, name=name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"{title} has a wrong hook: {error}") from error


@functools.lru_cache(maxsize=64)  # registering looks at every name of a module
def _classes(plugin: Installed, module: object) -> Any:
    """The hooks of this one module: a type name is answered by the plugin that owns it, by no other."""
    manager = _manager()
    _register(manager, plugin, module)
    return manager.hook


def _pick(plugin: Installed, answers: list[Any], base: type[BaseModel]) -> Any:
    """The class of the plugin's answers whose `type` is the plugin's name."""
    title = f"{NOUNS[plugin.group]} `{plugin.name}` of {plugin}"
    hook = plugin.group.replace(".", "_")
    if not answers:
        raise PluginError(
            f"{title} does not implement the hook `{hook}`; decorate it with lmcache_core.hookspecs.hookimpl"
        )
    types: list[str] = []
    for answer in answers:
        if not isinstance(answer, (list, tuple)):
            raise PluginError(f"{title}: `{hook}` must return a list of classes, not {answer!r}")
        for cls in answer:
            if not (isinstance(cls, type) and issubclass(cls, base)):
                raise PluginError(f"{title}: `{hook}` returned {cls!r}, which is not a subclass of {base.__name__}")
            if getattr(cls, "__abstractmethods__", None):
                missing = ", ".join(sorted(cls.__abstractmethods__))
                raise PluginError(f"{title}: {cls.__name__} does not implement {missing}")
            name = _type_name(cls)
            if name is None:
                declaration = f'type: Literal["{plugin.name}"] = "{plugin.name}"'
                raise PluginError(f"{title}: {cls.__name__} must declare its name as `{declaration}`")
            if name == plugin.name:
                return cls
            types.append(name)
    given = ", ".join(f"`{t}`" for t in types) or "none"
    raise PluginError(f"{title}: the entry point says `{plugin.name}`, its classes say {given}; they must agree")


def _type_name(cls: type[BaseModel]) -> str | None:
    """The one value of the `type` field, when it is a Literal with that default."""
    field = cls.model_fields.get("type")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    values = get_args(field.annotation)
    return values[0] if len(values) == 1 and field.default == values[0] else None
