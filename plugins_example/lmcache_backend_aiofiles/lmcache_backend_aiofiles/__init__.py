"""`aiofiles`: one file per object through an asynchronous client, in a screenful. The built-in disk tier is faster."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Literal

import aiofiles
import aiofiles.os

from lmcache_core.aio import AsyncStorage, Stored
from lmcache_core.errors import BackendUnavailable
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, BuildContext
from lmcache_core.types import ChunkKey

LMCACHE_API = 1


class AiofilesConfig(BackendConfig):
    """A local directory, written through aiofiles' threads."""

    type: Literal["aiofiles"] = "aiofiles"
    path: Path
    """Directory of this tier alone, made (0700) where missing."""

    def local_directory(self) -> Path:
        return self.path

    def build(self, context: BuildContext) -> AiofilesBackend:
        return AiofilesBackend(self.path.absolute(), context)


class AiofilesBackend(AsyncStorage):
    """Written under another name, then renamed: a reader sees the old object, none, or the new one."""

    def __init__(self, path: Path, context: BuildContext) -> None:
        """Raise `BackendUnavailable`."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for litter in path.glob("*.tmp"):
                litter.unlink(missing_ok=True)
        except OSError as error:
            raise BackendUnavailable(f"{path} cannot be used: {error.strerror}; choose another `path`") from error
        super().__init__(context, concurrency=context.threads)
        self._path = path

    async def has(self, key: ChunkKey) -> bool:
        return bool(await aiofiles.os.path.exists(self._path / key.hex()))

    async def load(self, key: ChunkKey, buffer: memoryview) -> int | None:
        at = 0
        with contextlib.suppress(FileNotFoundError):
            async with aiofiles.open(self._path / key.hex(), "rb", buffering=0) as file:
                while at < len(buffer) and (count := await file.readinto(buffer[at:])):
                    at += count
            return at
        return None

    async def save(self, key: ChunkKey, buffer: memoryview) -> None:
        temporary, at = self._path / f"{secrets.token_hex(16)}.tmp", 0
        try:
            async with aiofiles.open(temporary, "xb", buffering=0) as file:
                while at < len(buffer):
                    at += await file.write(buffer[at:])
            await aiofiles.os.replace(temporary, self._path / key.hex())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    async def drop(self, key: ChunkKey) -> None:
        with contextlib.suppress(FileNotFoundError):
            await aiofiles.os.unlink(self._path / key.hex())

    async def stored(self) -> list[Stored]:
        found = []
        for name in await aiofiles.os.listdir(self._path):
            with contextlib.suppress(FileNotFoundError, ValueError):  # deleted meanwhile; not ours
                info = await aiofiles.os.stat(self._path / name)
                found.append(Stored(ChunkKey(bytes.fromhex(name)), info.st_size, info.st_mtime))
        return found

    def footprint(self, nbytes: int) -> int:
        return -(-nbytes // 4096) * 4096


@hookimpl
def lmcache_backends() -> list[type[BackendConfig]]:
    return [AiofilesConfig]
