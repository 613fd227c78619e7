"""Real distributions for tests of plugins: modules and `*.dist-info` directories in a directory of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

BACKEND = '''
import pathlib
pathlib.Path(__file__).with_suffix(".imported").touch()

from typing import Literal
from pydantic import SecretStr
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, StorageBackend

class Store(StorageBackend):
    contains_is_local = True
    def __init__(self): self.objects = {}
    def contains(self, keys): return [key in self.objects for key in keys]
    def get_into(self, keys, buffers):
        found = []
        for key, buffer in zip(keys, buffers):
            data = self.objects.get(key)
            if data is not None: buffer[:len(data)] = data
            found.append(None if data is None else len(data))
        return found
    def put_from(self, keys, buffers):
        self.objects.update((key, bytes(buffer)) for key, buffer in zip(keys, buffers))
        return [None] * len(keys)
    def delete(self, keys):
        for key in keys: self.objects.pop(key, None)
    def clear(self): self.objects.clear()
    def close(self): pass

class Config(BackendConfig):
    type: Literal["{name}"] = "{name}"
    url: str
    """Where it is."""
    access_key: SecretStr | None = None
    """Credential."""
    region: str = "here"
    def build(self, context): return Store()

@hookimpl
def lmcache_backends(): return [Config]
'''
"""A backend that keeps objects in a dict. Importing it leaves a file beside it."""


class Distributions:
    """Writes distributions below `path`, which must be on `sys.path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(
        self,
        distribution: str,
        entries: dict[str, dict[str, str]],
        modules: dict[str, str],
        version: str = "1.2.3",
        path: Path | None = None,
    ) -> None:
        """Write modules (name -> source) and metadata with entry points (group -> name -> module)."""
        root = path or self.path
        for name, source in modules.items():
            (root / f"{name}.py").write_text(dedent(source))
            sys.modules.pop(name, None)
        info = root / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [
            line
            for group, names in entries.items()
            for line in (f"[{group}]", *(f"{name} = {target}" for name, target in names.items()), "")
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))

    def backend(self, name: str, distribution: str | None = None, module: str | None = None) -> str:
        """Write a working backend `name` and return its module's name."""
        module = module or f"plug_{name}"
        self.add(
            distribution or f"lmcache-backend-{name}",
            {"lmcache.backends": {name: module}},
            {module: BACKEND.replace("{name}", name)},
        )
        return module

    def imported(self, module: str) -> bool:
        """Whether a module written by `backend` was ever imported."""
        return (self.path / f"{module}.imported").exists()
