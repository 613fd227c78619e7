"""What engine and I/O worker say to each other: one JSON object per message, behind its length.

Only names, keys, sizes and outcomes cross the socket; the bytes of objects lie in memory that both map. Nothing is
executed: an unknown kind of error becomes a `BackendError` with its text.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretBytes, SecretStr

from lmcache_core.errors import BackendError, BackendUnavailable, Closed, ConfigError, CorruptChunk, NoSpace, Problem

Message = dict[str, Any]

_LENGTH = struct.Struct("<I")
_LARGEST = 64 << 20


def send(sock: socket.socket, message: Message) -> None:
    """Write one message. Raise `OSError`."""
    body = json.dumps(message, separators=(",", ":")).encode()
    sock.sendall(_LENGTH.pack(len(body)) + body)


def receive(sock: socket.socket) -> Message | None:
    """Read one message; None when the other side has gone.

    Raise `TimeoutError` when nothing has come, and `ConnectionError` when half a message has: then the rest is lost.
    """
    head = sock.recv(_LENGTH.size)
    if not head:
        return None
    try:
        (length,) = _LENGTH.unpack(head + _exactly(sock, _LENGTH.size - len(head)))
        if length > _LARGEST:
            raise ConnectionError(f"a message of {length} bytes")
        message: Message = json.loads(_exactly(sock, length))
    except TimeoutError:
        raise ConnectionError("half a message") from None
    return message


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        some = sock.recv(count - len(data))
        if not some:
            raise ConnectionError("half a message")
        data += some
    return bytes(data)


def plain(value: Any) -> Any:
    """Settings as JSON can carry them, secrets in the clear: for the worker's socket, never for a log."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, (SecretStr, SecretBytes)):
        secret = value.get_secret_value()
        return secret.decode() if isinstance(secret, bytes) else secret
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value) if isinstance(value, (str, Path)) else f"{value}"


def from_error(error: BaseException) -> Message:
    """An exception as plain data."""
    if isinstance(error, CorruptChunk):
        return {"kind": "CorruptChunk", "reason": str(error.reason), "text": str(error)}
    if isinstance(error, ConfigError):
        return {"kind": "ConfigError", "problems": [asdict(problem) for problem in error.problems]}
    if isinstance(error, OSError):
        return {"kind": "OSError", "errno": error.errno, "text": error.strerror or str(error)}
    known = next((kind for kind in _KINDS if isinstance(error, _KINDS[kind])), "")
    return {"kind": known, "text": str(error) if known else f"{type(error).__name__}: {error}"}


def to_error(message: Message) -> Exception:
    """The exception a message describes."""
    kind, text = message["kind"], message.get("text", "")
    if kind == "CorruptChunk":
        error = CorruptChunk(message["reason"])
        error.args = (text,)
        return error
    if kind == "ConfigError":
        return ConfigError([Problem(**problem) for problem in message["problems"]])
    if kind == "OSError":
        return OSError(message["errno"], text)
    return _KINDS.get(kind, BackendError)(text)


_KINDS: dict[str, type[Exception]] = {
    "NoSpace": NoSpace,
    "BackendUnavailable": BackendUnavailable,
    "Closed": Closed,
    "BackendError": BackendError,
}
