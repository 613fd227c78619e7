"""`redis`: sealed objects in Redis or Valkey, on one server, behind Sentinels, or in a cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from lmcache_backends.redis_store.backend import RedisBackend
from lmcache_backends.redis_store.servers import Mode, Target
from lmcache_backends.redis_store.transfer import PUT_LANES
from lmcache_backends.redis_store.wire import Address
from lmcache_core.errors import BackendError, BackendUnavailable
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, BuildContext, Frozen
from lmcache_core.units import ByteSize, Seconds

_PREFIX = re.compile(r"[A-Za-z0-9_./:=@+-]*")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/@]+)(?::([0-9]{1,5}))?")
_DEFAULT_PORT: dict[Mode, int] = {"single": 6379, "sentinel": 26379, "cluster": 6379}


class TlsConfig(Frozen):
    """How servers are known, and we to them; used with `rediss://`."""

    ca: Path | None = None
    """Certificates to trust instead of the system's."""
    cert: Path | None = None
    """Our own certificate, where servers ask for one."""
    key: Path | None = None
    """Its private key."""
    check_hostname: bool = True
    """Whether a server's certificate must name the host we connect to."""


class RedisConfig(BackendConfig):
    """A Redis (6.2 or newer) or Valkey server. Bound it with its own `maxmemory`: `capacity` has no effect on it."""

    type: Literal["redis"] = "redis"
    url: str = "redis://localhost:6379/0"
    """`redis://host:port/db`, `rediss://host:port/db` (TLS) or `unix:///path?db=0`. In modes `sentinel` and `cluster`
    it names one Sentinel or node."""
    mode: Mode = "single"
    """`single` server, the master that Sentinels name (`sentinel`), or all masters of a Redis Cluster (`cluster`)."""
    hosts: tuple[str, ...] = ()
    """More Sentinels or nodes (`host:port`) to ask when the one in `url` is down."""
    service: str = ""
    """Name of the master, for mode `sentinel`."""
    username: str = ""
    """ACL user; `default` where only a password is given."""
    password: SecretStr | None = None
    """Better here, or in the environment, than in `url`."""
    sentinel_username: str = ""
    """ACL user of the Sentinels, where they ask for one."""
    sentinel_password: SecretStr | None = None
    """Password of the Sentinels, where they ask for one."""
    tls: TlsConfig = TlsConfig()
    """Certificates, for `rediss://`."""
    prefix: Annotated[str, Field(min_length=1, max_length=200)] = "lmcache:"
    """What the name of every value begins with. Clearing the tier deletes all that begins so."""
    ttl: Annotated[Seconds, Field(gt=0)] | None = None
    """Time after which an object expires; by default it stays until the server evicts it."""
    part_bytes: Annotated[ByteSize, Field(ge=4096, le=256 << 20)] = 1 << 20
    """Objects are cut into values of about this size: servers are slower with larger ones."""
    connections: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Most connections to each server; by default one for every thread of the tier, and three that make puts faster."""
    timeout: Annotated[Seconds, Field(gt=0, le=3600)] | None = None
    """Longest wait for an answer, beside the time that bytes take at 64 MiB/s; by default a quarter of the
    tier's deadline. A call never takes longer than that deadline."""
    track: bool = True
    """Keep a copy of the list of stored keys up to date (RESP3 tracking), so that lookups ask nobody."""
    track_keys: Annotated[int, Field(ge=1)] = 2_000_000
    """Most keys in that list, about 130 bytes each; beyond it the server is asked."""

    @field_validator("prefix")
    @classmethod
    def _prefix_is_plain(cls, prefix: str) -> str:
        if not _PREFIX.fullmatch(prefix):
            raise ValueError("must consist of letters, digits and _ . / : = @ + - (others mean something to Redis)")
        return prefix

    @field_validator("hosts")
    @classmethod
    def _hosts_are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise ValueError("each must be written host:port")
        return hosts

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        url = self._url()
        database = self._database(url)
        if url.scheme == "unix" and (self.mode != "single" or not url.path):
            raise ValueError("a unix:// url needs a path, as unix:///run/redis.sock, and mode `single`")
        if self.mode == "sentinel" and not self.service:
            raise ValueError("mode `sentinel` needs service: the name that the Sentinels give the master")
        if self.mode != "sentinel" and (self.service or self.sentinel_username or self.sentinel_password):
            raise ValueError(f"service and sentinel_* have no meaning in mode `{self.mode}`: remove them")
        if self.mode == "single" and self.hosts:
            raise ValueError("hosts have no meaning in mode `single`: choose `sentinel` or `cluster`, or remove them")
        if url.scheme != "rediss" and self.tls != TlsConfig():
            raise ValueError("tls has no meaning without TLS: write rediss:// in url, or remove tls")
        if url.password and self.password:
            raise ValueError("a password is given twice: remove the one in url")
        if self.mode == "cluster" and database:
            raise ValueError("a cluster has database 0 only: remove the number from url")
        return self

    def build(self, context: BuildContext) -> RedisBackend:
        """Connect once, to tell what is wrong at start-up. Raise `BackendUnavailable`."""
        most = self.connections or context.threads + PUT_LANES - 1
        backend = RedisBackend(
            self.target(),
            prefix=self.prefix,
            ttl=self.ttl,
            part_bytes=self.part_bytes,
            connections=most,
            spare=min(max(0, most - context.threads), PUT_LANES - 1),
            timeout=self.timeout or context.deadline / 4,
            deadline=context.deadline,
            track_keys=self.track_keys if self.track else 0,
        )
        try:
            backend.check()
        except BackendError as error:
            backend.close()
            raise BackendUnavailable(
                f"tier `{context.tier}`: {error}. Is the server up, and are url, mode and password right?"
            ) from error
        return backend

    def target(self) -> Target:
        """Where the servers are and how to log in."""
        url = self._url()
        username = self.username or unquote(url.username or "")
        password = self.password.get_secret_value() if self.password else unquote(url.password or "")
        tls: dict[str, Any] | None = None
        if url.scheme == "rediss":
            files = {"ssl_ca_certs": self.tls.ca, "ssl_certfile": self.tls.cert, "ssl_keyfile": self.tls.key}
            tls = {name: str(path) for name, path in files.items() if path}
            tls |= {"ssl_cert_reqs": "required", "ssl_check_hostname": self.tls.check_hostname}
        secret = self.sentinel_password
        return Target(
            mode=self.mode,
            seeds=self._seeds(url),
            service=self.service,
            tls=tls,
            login=_login(username, password) | {"db": self._database(url)},
            sentinel_login=_login(self.sentinel_username, secret.get_secret_value() if secret else ""),
        )

    def _url(self) -> SplitResult:
        """Raise `ValueError`, which does not quote the url: it may hold a password."""
        url = urlsplit(self.url)
        if url.scheme not in ("redis", "rediss", "unix"):
            raise ValueError("url must begin with redis://, rediss:// or unix://")
        try:
            usable = url.scheme == "unix" or (url.hostname and url.port != 0)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("url must be written redis://host:port/db")
        return url

    def _database(self, url: SplitResult) -> int:
        text = url.path.strip("/") if url.scheme != "unix" else ""
        options = dict(part.partition("=")[::2] for part in url.query.split("&") if part)
        text = options.pop("db", text) or "0"
        if options:
            raise ValueError(f"url has unknown options {', '.join(sorted(options))}: they are settings of the backend")
        if not (text.isascii() and text.isdigit()):
            raise ValueError("the database in url must be a number, as in redis://host:6379/0")
        return int(text)

    def _seeds(self, url: SplitResult) -> tuple[Address, ...]:
        if url.scheme == "unix":
            return ((unquote(url.path), 0),)
        port = _DEFAULT_PORT[self.mode]
        seeds = [(url.hostname or "", url.port or port)]
        for host in self.hosts:
            match = _HOST.fullmatch(host)
            assert match is not None
            seeds.append((match[1].strip("[]"), int(match[2] or port)))
        return tuple(dict.fromkeys(seeds))


def _login(username: str, password: str) -> dict[str, Any]:
    login = {"username": username, "password": password}
    return {name: value for name, value in login.items() if value}


@hookimpl
def lmcache_backends() -> list[type[BackendConfig]]:
    return [RedisConfig]
