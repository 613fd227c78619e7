"""`fsspec`: sealed objects on whatever fsspec opens: memory, a directory, S3, Google Cloud Storage, Azure and others.

Object stores are written in one request per object, everything else under a temporary name that is then renamed. S3
goes through obstore where that is installed and knows the options; see `object_store`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from lmcache_backends.fsspec_store.backend import FsspecBackend
from lmcache_backends.fsspec_store.object_store import PROTOCOLS, Native, first_line, from_s3fs
from lmcache_backends.fsspec_store.stores import ATOMIC, Files, LocalFiles, Objects, Store
from lmcache_core.aio import WORK_SHARE
from lmcache_core.errors import BackendUnavailable
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, BuildContext
from lmcache_core.redact import collect, hide_urls, scrub, telling
from lmcache_core.units import Seconds

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)")
_SECRET_NAMES = frozenset({"connection_string", "sas_token"})


def _checked_url(url: str) -> str:
    if "::" in url:
        raise ValueError("chained URLs wrap a store in caches of fsspec's own; give the store's own URL")
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("must be a URL such as s3://bucket/prefix, file:///directory or memory://name")
    if not match[2].strip("/"):
        raise ValueError("must name a bucket or a directory: the tier's objects lie below it")
    return url


def _sealed_away(value: Any) -> Any:
    """Options with every value under a telling name as `SecretStr`, at any depth."""
    if not isinstance(value, Mapping):
        return value
    return {
        name: SecretStr(item)
        if isinstance(item, str) and (telling(str(name)) or name in _SECRET_NAMES)
        else _sealed_away(item)
        for name, item in value.items()
    }


def _opened(value: Any) -> Any:
    """Options as the client wants them."""
    if isinstance(value, Mapping):
        return {name: _opened(item) for name, item in value.items()}
    return value.get_secret_value() if isinstance(value, SecretStr) else value


class FsspecConfig(BackendConfig):
    """A place that fsspec can open."""

    type: Literal["fsspec"] = "fsspec"
    url: Annotated[str, AfterValidator(_checked_url)]
    """Where the tier's objects lie, e.g. `s3://bucket/kv`, `gs://bucket/kv`, `file:///mnt/share/kv`, `memory://kv`."""
    storage_options: Annotated[dict[str, Any], BeforeValidator(_sealed_away)] = Field(default_factory=dict)
    """The filesystem's own options, e.g. `{key: ..., secret: ..., endpoint_url: ...}` for S3; secrets are not shown."""
    client: Literal["auto", "fsspec", "obstore"] = "auto"
    """`fsspec` is fsspec's own filesystem. `obstore` is faster, for s3, gs and az; `storage_options` are its own then.
    `auto` is obstore for s3 when it is installed and understands the options, which remain s3fs's."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 32
    """Objects read at once, as many written, and as many asked for."""
    timeout: Annotated[Seconds, Field(gt=0)] | None = None
    """Longest a call may take, where that is to be less than the lane's deadline."""

    @property
    def protocol(self) -> str:
        """The URL's, e.g. `s3`."""
        return self.url.partition("://")[0]

    def local_directory(self) -> Path | None:
        return Path(self.url.removeprefix("file://")) if self.protocol == "file" else None

    def build(self, context: BuildContext) -> FsspecBackend:
        """Open the place. Raise `BackendUnavailable` when a package is missing or the place cannot be reached."""
        options: dict[str, Any] = _opened(self.storage_options)
        named = {value for name, value in options.items() if name in _SECRET_NAMES}
        secrets = frozenset(named | collect(options) | collect(self.url))
        store, root, loop = self._store(options, secrets, context)
        return FsspecBackend(
            store,
            root,
            context,
            concurrency=self.concurrency,
            timeout=self.timeout,
            secrets=secrets,
            loop=loop,
        )

    def _store(self, options: dict[str, Any], secrets: frozenset[str], context: BuildContext) -> tuple[Store, str, Any]:
        """The store, its root path, and the loop its coroutines must run on, if that is not ours."""
        native = options if self.client == "obstore" else self._native_options(options)
        if native is not None:
            if self.protocol not in PROTOCOLS:
                raise BackendUnavailable(f"tier `{context.tier}`: obstore is for s3, gs and az, not {self.protocol}")
            if find_spec("obstore") is None:
                raise _missing(context, "obstore", "lmcache-core[fsspec]")
            bucket, _, prefix = self.url.partition("://")[2].strip("/").partition("/")
            timeout = min(self.timeout or context.deadline, WORK_SHARE * context.deadline)
            try:
                store = Native(f"{self.protocol}://{bucket}", native, timeout, self.concurrency, context.tier)
                return store, prefix, None
            except BackendUnavailable as error:
                raise BackendUnavailable(f"tier `{context.tier}`: {scrub(str(error), secrets)}") from None
        return self._filesystem(options, secrets, context)

    def _native_options(self, options: dict[str, Any]) -> dict[str, Any] | None:
        """obstore's options, when it is to be used without having been asked for."""
        if self.client != "auto" or self.protocol not in ("s3", "s3a") or find_spec("obstore") is None:
            return None
        translated = from_s3fs(options)
        # Without a key in sight credentials come from files and programs that boto's chain knows and obstore does not.
        known = translated is not None and bool(
            translated.keys() & {"access_key_id", "skip_signature"} or "AWS_ACCESS_KEY_ID" in os.environ
        )
        return translated if known or (translated is not None and find_spec("s3fs") is None) else None

    def _filesystem(
        self, options: dict[str, Any], secrets: frozenset[str], context: BuildContext
    ) -> tuple[Store, str, Any]:
        if find_spec("fsspec") is None:
            raise _missing(context, "fsspec", "lmcache-core[fsspec]")
        import fsspec
        from fsspec.asyn import AsyncFileSystem
        from fsspec.implementations.local import LocalFileSystem

        if self.protocol in ATOMIC:
            options = {"use_listings_cache": False, **options}
        try:
            filesystem, path = fsspec.core.url_to_fs(self.url, **options, skip_instance_cache=True)
        except ImportError as error:
            raise BackendUnavailable(f"tier `{context.tier}`: {self.protocol}:// needs a package: {error}") from error
        except Exception as error:
            said = f"{type(error).__name__}: {scrub(first_line(error), secrets)}"
            raise BackendUnavailable(f"tier `{context.tier}`: {hide_urls(self.url)} cannot be opened: {said}") from None
        root = path.rstrip("/")
        if isinstance(filesystem, AsyncFileSystem) and self.protocol in ATOMIC:
            return Objects(filesystem), root, filesystem.loop
        kind = LocalFiles if isinstance(filesystem, LocalFileSystem) else Files
        atomic = self.protocol in ATOMIC
        return kind(filesystem, root, atomic=atomic, threads=self.concurrency, name=context.tier), root, None


def _missing(context: BuildContext, package: str, extra: str) -> BackendUnavailable:
    return BackendUnavailable(f"tier `{context.tier}`: {package} is not installed: `pip install {extra}`")


@hookimpl
def lmcache_backends() -> list[type[BackendConfig]]:
    return [FsspecConfig]
