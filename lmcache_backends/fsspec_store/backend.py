"""Sealed objects as files of a filesystem or keys of an object store.

    <root>/<h>/<h>/<key in hex>    h: one hex digit each of the token chain, 256 leaves
    <root>/tmp/<random>            being written, where a write to the final name could be seen half done

Names come from the key alone. Whatever else lies below the root is left alone.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable
from functools import partial
from typing import TypeVar

from lmcache_backends.fsspec_store.object_store import first_line
from lmcache_backends.fsspec_store.stores import TEMPORARY, Entry, Store
from lmcache_core.aio import AsyncStorage, Stored, key_of_path, object_name
from lmcache_core.errors import BackendError, BackendUnavailable, LMCacheError
from lmcache_core.protocols import BuildContext
from lmcache_core.redact import scrub
from lmcache_core.types import KEY_BYTES, ChunkKey

_T = TypeVar("_T")

_TEMPORARY_NAME = re.compile(r"[0-9a-f]{32}")
_TRIES = 3
"""How often a listing is asked for: not on the hot path."""

_PAUSE_S = 0.1
_START_S = 10.0
"""Shortest time for the first answers: clients load models, look for credentials and connect before they ask."""

_OLD_S = 60.0
_PROBE = ChunkKey(bytes(KEY_BYTES))


class FsspecBackend(AsyncStorage):
    """A root below which objects lie, behind one `Store`."""

    def __init__(
        self,
        store: Store,
        root: str,
        context: BuildContext,
        *,
        concurrency: int,
        timeout: float | None,
        secrets: frozenset[str],
        loop: object = None,
    ) -> None:
        """`secrets` are taken out of every message. With a capacity the core keeps the index, from `scan`.

        Raise `BackendUnavailable` when the store does not answer a question.
        """
        super().__init__(context, concurrency=concurrency, timeout=timeout, loop=loop)  # type: ignore[arg-type]
        self._store = store
        self._prefix = f"{root}/" if root else ""
        self._secrets = secrets
        try:
            patience = max(self.limit, _START_S)
            self.run(self.has(_PROBE), patience)
            self.run(self._reap(max(_OLD_S, 10 * context.deadline)), patience)
        except LMCacheError as error:
            self.close()
            raise BackendUnavailable(
                f"tier `{context.tier}`: {error}; check the url, the credentials and that the store is up"
            ) from error

    # -- per key -----------------------------------------------------------------------------------------------
    async def has(self, key: ChunkKey) -> bool:
        return await self._told(self._store.exists(self._path(key)))

    async def load(self, key: ChunkKey, buffer: memoryview) -> int | None:
        return await self._told(self._store.read(self._path(key), buffer))

    async def save(self, key: ChunkKey, buffer: memoryview) -> None:
        await self._told(self._store.write(self._path(key), buffer))

    async def drop(self, key: ChunkKey) -> None:
        await self._told(self._store.remove(self._path(key)))

    async def stored(self) -> list[Stored]:
        """In 16 listings, so that none of them is long."""
        works = [partial(self._listed, f"{self._prefix}{digit}") for digit in "0123456789abcdef"]
        found: list[Stored] = []
        for entries in await self.side_by_side("list", works):
            if isinstance(entries, BaseException):
                raise entries
            keys = ((key_of_path(entry.path), entry) for entry in entries)
            found += (Stored(key, entry.nbytes, entry.modified) for key, entry in keys if key is not None)
        return found

    # -- the contract ------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Remove temporary files as well."""
        super().clear()
        self.run(self._reap(0.0), self.limit)

    def footprint(self, nbytes: int) -> int:
        return self._store.footprint(nbytes)

    async def shut(self) -> None:
        await self._store.close()

    # -- inside ------------------------------------------------------------------------------------------------
    def _path(self, key: ChunkKey) -> str:
        return f"{self._prefix}{object_name(key)}"

    async def _told(self, work: Awaitable[_T]) -> _T:
        """Clients raise what they like, long texts and secrets in it: shorten and hide them."""
        try:
            return await work
        except LMCacheError:
            raise
        except Exception as error:
            raise BackendError(f"{type(error).__name__}: {scrub(first_line(error), self._secrets)}") from None

    async def _listed(self, directory: str) -> list[Entry]:
        """A listing, asked for again when it fails: one refusal must not stop a start."""
        for attempt in range(1, _TRIES):
            try:
                return await self._told(self._store.files(directory))
            except LMCacheError:
                await asyncio.sleep(_PAUSE_S * attempt)
        return await self._told(self._store.files(directory))

    async def _reap(self, older_than: float) -> None:
        """Remove what writers left behind under temporary names; one that still writes has not been at it for long."""
        now = time.time()
        for entry in await self._listed(f"{self._prefix}{TEMPORARY}"):
            if now - entry.modified > older_than and _TEMPORARY_NAME.fullmatch(entry.path.rpartition("/")[2]):
                await self._told(self._store.remove(entry.path))
