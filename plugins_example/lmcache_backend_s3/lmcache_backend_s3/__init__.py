"""`s3`: chunks as objects of a bucket, through obstore. Bodies are streamed into the slots chunks are to live in."""

from contextlib import suppress
from typing import Literal, Self

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store
from pydantic import Field, SecretStr, model_validator

from lmcache_core.aio import AsyncStorage, Stored, key_of_path, object_name
from lmcache_core.errors import BackendError, BackendUnavailable, CorruptChunk
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, BuildContext
from lmcache_core.types import ChunkKey
from lmcache_core.units import Seconds

ACCOUNT = {"endpoint", "region", "access_key_id", "secret_access_key", "session_token"}


class S3Config(BackendConfig):
    """A bucket. Without keys the environment is asked: AWS_* variables, then the machine's or container's role."""

    type: Literal["s3"] = "s3"
    url: str = Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]+(/.*)?$")
    """`s3://bucket/prefix`; the prefix is this tier's alone."""
    endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """Of a store that is not Amazon's."""
    region: str | None = None
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None
    allow_http: bool = False
    """Use an `http://` endpoint: everybody on the way reads and changes the chunks. Fine on loopback."""
    connect_timeout: Seconds = 2.0
    timeout: Seconds | None = None
    """Longest a call may take, where that is to be less than the lane's deadline."""
    max_retries: int = Field(default=0, ge=0)  # a retry competes with computing the chunk, and rarely wins
    concurrency: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _http_is_meant(self) -> Self:
        if (self.endpoint or "").startswith("http:") and not self.allow_http:
            raise ValueError("an http:// endpoint needs `allow_http: true`: nothing protects the chunks on the way")
        return self

    def build(self, context: BuildContext) -> "S3Backend":
        return S3Backend(self, context)


class S3Backend(AsyncStorage):
    def __init__(self, config: S3Config, context: BuildContext) -> None:
        super().__init__(context, concurrency=config.concurrency, timeout=config.timeout)
        given = config.model_dump(include=ACCOUNT, exclude_none=True)
        account = {name: v.get_secret_value() if isinstance(v, SecretStr) else v for name, v in given.items()}
        times = {"timeout": f"{self.limit * 1e6:.0f}us", "connect_timeout": f"{config.connect_timeout * 1e6:.0f}us"}
        try:  # hashing bodies costs most of a put's CPU time; what signs them instead is TLS
            self.store = S3Store.from_url(config.url, **account, unsigned_payload=True, disable_bulk_delete=True,
                                          client_options={"allow_http": config.allow_http, **times},
                                          retry_config={"max_retries": config.max_retries})  # fmt: skip
            self.run(self.has(ChunkKey(bytes(32))), self.limit)
        except (BaseError, BackendError) as error:
            self.close()
            raise BackendUnavailable(f"tier `{context.tier}`: {config.url}: {str(error)[:300]}") from None

    async def has(self, key: ChunkKey) -> bool:
        with suppress(FileNotFoundError):
            return bool(await obstore.head_async(self.store, object_name(key)))
        return False

    def load(self, key: ChunkKey, buffer: memoryview) -> int | None:
        try:
            got = obstore.get(self.store, object_name(key))
        except FileNotFoundError:
            return None
        if got.meta["size"] > len(buffer):
            raise CorruptChunk("corrupt", f"{got.meta['size']} bytes, more than any object of this tier")
        filled = 0
        for piece in got.stream(min_chunk_size=1 << 20):
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled

    async def save(self, key: ChunkKey, buffer: memoryview) -> None:
        await obstore.put_async(self.store, object_name(key), buffer, use_multipart=False)

    async def drop(self, key: ChunkKey) -> None:
        await obstore.delete_async(self.store, object_name(key))

    async def stored(self) -> list[Stored]:
        found = await obstore.list(self.store).collect_async()
        keys = ((key_of_path(meta["path"]), meta) for meta in found)
        return [Stored(key, meta["size"], meta["last_modified"].timestamp()) for key, meta in keys if key is not None]


@hookimpl
def lmcache_backends() -> list[type[BackendConfig]]:
    return [S3Config]
