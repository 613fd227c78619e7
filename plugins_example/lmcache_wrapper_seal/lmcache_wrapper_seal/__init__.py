"""Plugin `seal`: authenticated encryption in front of any storage tier.

plugins:
  - {type: seal, tiers: [cold], keys: /etc/lmcache/seal.keys}
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lmcache_core.errors import ConfigError, Problem
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, PluginConfig, StorageBackend
from lmcache_wrapper_seal.backend import SealedBackend, staging_bytes
from lmcache_wrapper_seal.envelope import OVERHEAD
from lmcache_wrapper_seal.keys import BadKeys, Masters, read_private, variable

LMCACHE_API = 1


class SealConfig(PluginConfig):
    """AES-256-GCM with a key of its own for each identity (model, layout, tenant)."""

    type: Literal["seal"] = "seal"
    keys: Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(path.expanduser())))] | None = None
    """File with the master keys, mode 0600 or stricter: a line `ID 64-HEX-DIGITS` each. The first seals, all open."""
    keys_env: str | None = None
    """Environment variable with the same text, instead of a file."""
    buffers: Annotated[int, Field(ge=1, le=64)] = 2
    """Objects that each thread of a tier has room for at once; more makes larger batches for the medium."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.keys is None) == (self.keys_env is None):
            raise ValueError("name the master keys once: with `keys`, a file, or `keys_env`, an environment variable")
        return self

    def build(self) -> Seal:
        """Read the keys. Raise `ConfigError` when they cannot be used; no message shows any of them."""
        try:
            if self.keys is not None:
                source, text = str(self.keys), read_private(self.keys)
            else:
                source = variable(self.keys_env or "")
                text = os.environ.get(self.keys_env or "", "")
            return Seal(self, Masters.parse(text, source))
        except BadKeys as error:
            setting = "keys" if self.keys is not None else "keys_env"
            why = "without its keys the tier could neither be written nor read"
            problem = Problem(where="build", path=f"plugins.seal.{setting}", what=str(error), why=why, fix=error.fix)
            raise ConfigError([problem]) from error


class Seal:
    """The plugin object: wraps the backends of the storage tiers that the settings name."""

    def __init__(self, config: SealConfig, masters: Masters) -> None:
        self._config = config
        self._masters = masters

    @hookimpl
    def lmcache_object_overhead(self, config: BackendConfig, context: BuildContext) -> int:
        return OVERHEAD if self._seals(config, context) else 0

    @hookimpl
    def lmcache_wrapper_memory(self, config: BackendConfig, context: BuildContext) -> int:
        return staging_bytes(context, self._config.buffers) if self._seals(config, context) else 0

    @hookimpl(wrapper=True)
    def lmcache_build_backend(
        self, config: BackendConfig, context: BuildContext
    ) -> Generator[None, StorageBackend | MemoryBackend, StorageBackend | MemoryBackend]:
        if config.in_memory and context.tier in (self._config.tiers or ()):
            what = f"tier `{context.tier}` is in memory, where chunks are never encrypted"
            why = "its chunks would stay in clear text without a word"
            fix = "name storage tiers only, or none: then all of them are encrypted"
            raise ConfigError([Problem("build", "plugins.seal.tiers", what, why, fix)])
        inner = yield
        if not isinstance(inner, StorageBackend) or not self._seals(config, context):
            return inner
        return SealedBackend(inner, self._masters, context.object_bytes, context.threads, self._config.buffers)

    def _seals(self, config: BackendConfig, context: BuildContext) -> bool:
        return not config.in_memory and self._config.applies_to(context.tier)


@hookimpl
def lmcache_plugins() -> list[type[PluginConfig]]:
    return [SealConfig]
