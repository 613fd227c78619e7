"""Master keys, and the keys derived from them.

Each identity (the first half of a chunk key: model, layout and tenant) is sealed under keys of its own,

    HKDF-SHA256(master, salt = 16 random bytes, info = label + identity)

(RFC 5869). The salt stands in each object. It is drawn anew by each process and after `OBJECTS_PER_KEY` objects, so
that random 96-bit nonces never get near the 2^32 messages that NIST SP 800-38D allows under one key.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_K = TypeVar("_K")
_V = TypeVar("_V")

SALT_BYTES = 16
OBJECTS_PER_KEY = 1 << 31
"""Objects sealed under one derived key: half of what is allowed."""

_INFO = b"lmcache-wrapper-seal/1 AES-256-GCM "
_LINE = re.compile(r"([A-Za-z0-9._-]{1,16})\s+([0-9A-Fa-f]{64})")
_REMEMBERED = 1024
"""Derived keys kept at hand; deriving one takes microseconds."""


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEX = re.compile(r"[0-9A-Fa-f]{16,}")


def told(source: str) -> str:
    """A file's or variable's name for messages: without what may be a key that was put in its place."""
    return _HEX.sub("***", source)


def variable(name: str) -> str:
    """What to call an environment variable in messages; what cannot be a name may be the key itself."""
    plain = _NAME.fullmatch(name) and not _HEX.search(name)
    return f"environment variable {name}" if plain else "the environment variable that `keys_env` is to name"


class BadKeys(Exception):
    """Master keys that cannot be used. Its text never shows any part of a line."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def read_private(path: Path) -> str:
    """The text of a file that nobody but its owner, this user or root, can read or write. Raise `BadKeys`."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadKeys(f"{path} is not a file", "name the file with the master keys")
            if status.st_mode & 0o077:
                raise BadKeys(f"{path} can be used by others, mode {status.st_mode & 0o777:04o}", f"chmod 600 {path}")
            if status.st_uid not in (0, os.geteuid()):
                raise BadKeys(f"{path} belongs to user {status.st_uid}", f"chown it to {os.geteuid()} or root")
            return file.read().decode("ascii")
    except OSError as error:
        # Without a cause, which names the path: a key may stand there by mistake.
        what = f"{told(str(path))} cannot be read: {error.strerror}"
        raise BadKeys(what, "make it: see the README, `Keys`") from None
    except UnicodeDecodeError:
        raise BadKeys(f"{path} is not ASCII text", "write a line `ID 64-HEX-DIGITS` for each key") from None


@dataclass(frozen=True, slots=True, repr=False)
class Masters:
    """Master keys by id; the first one seals."""

    by_id: Mapping[str, bytes]

    @property
    def current(self) -> str:
        """Id of the key that new objects are sealed under."""
        return next(iter(self.by_id))

    @classmethod
    def parse(cls, text: str, source: str) -> Masters:
        """Keys from lines `ID 64-HEX-DIGITS`; empty lines and `#` comments are skipped. Raise `BadKeys`."""
        found: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), 1):
            line = line.partition("#")[0].strip()
            if not line:
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                what = f"{source}, line {number}: is not an id of 1 to 16 letters, digits or `._-`, and 64 hex digits"
                raise BadKeys(what, 'make a key with: echo "key-1 $(openssl rand -hex 32)"')
            if match[1] in found:
                raise BadKeys(f"{source}, line {number}: key id {match[1]} is there twice", "give each key its own id")
            found[match[1]] = bytes.fromhex(match[2])
        if not found:
            raise BadKeys(f"{source} holds no key", 'make one with: echo "key-1 $(openssl rand -hex 32)"')
        return cls(found)


@dataclass(slots=True)
class _InUse:
    """The key an identity is sealed under now."""

    salt: bytes
    cipher: AESGCM
    left: int


class Keyring:
    """Derived keys at hand, by identity. Thread-safe."""

    def __init__(self, masters: Masters, objects_per_key: int = OBJECTS_PER_KEY) -> None:
        self._masters = masters
        self._objects_per_key = objects_per_key
        self._lock = threading.Lock()
        self._sealing: OrderedDict[bytes, _InUse] = OrderedDict()
        self._opening: OrderedDict[tuple[str, bytes, bytes], AESGCM] = OrderedDict()

    def to_seal(self, identity: bytes) -> tuple[str, bytes, AESGCM]:
        """Master id, salt and cipher for one object more of `identity`."""
        with self._lock:
            use = self._sealing.get(identity)
            if use is None or not use.left:
                salt = os.urandom(SALT_BYTES)
                use = _InUse(salt, self._derive(self._masters.current, salt, identity), self._objects_per_key)
                _remember(self._sealing, identity, use)
            use.left -= 1
            return self._masters.current, use.salt, use.cipher

    def to_open(self, master: str, salt: bytes, identity: bytes) -> AESGCM | None:
        """The cipher an object was sealed with; None when its master key is not known."""
        if master not in self._masters.by_id:
            return None
        with self._lock:
            cipher = self._opening.get((master, salt, identity))
            if cipher is None:
                cipher = self._derive(master, salt, identity)
                _remember(self._opening, (master, salt, identity), cipher)
            return cipher

    def _derive(self, master: str, salt: bytes, identity: bytes) -> AESGCM:
        hkdf = HKDF(SHA256(), 32, salt, _INFO + identity)
        return AESGCM(hkdf.derive(self._masters.by_id[master]))


def _remember(known: OrderedDict[_K, _V], key: _K, value: _V) -> None:
    known[key] = value
    if len(known) > _REMEMBERED:
        known.popitem(last=False)
