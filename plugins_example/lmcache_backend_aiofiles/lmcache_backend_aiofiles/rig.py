"""What `lmcachectl plugin test aiofiles` and `bench backend aiofiles` work on: a directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmcache_backend_aiofiles import AiofilesConfig
from lmcache_core.testing.rig import Medium, Rig


class AiofilesRig(Rig):
    """A directory of the one that is given."""

    @contextmanager
    def start(self, directory: Path) -> Iterator[Medium]:
        yield Medium(AiofilesConfig(path=directory / "kv"))
