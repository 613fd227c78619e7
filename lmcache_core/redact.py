"""What must never be shown: typed secrets, values under telling names, and passwords inside URLs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import SecretBytes, SecretStr

from lmcache_core.spelling import distance

HIDDEN = "***"

_NAME = re.compile(
    r"pass(?!ive)|pwd|secret|credential|private|auth|token$|key$|key_?id$|signature|connection_?string|conn_?str",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(?<=://)\S*@")  # to the last @: a password may hold a slash by mistake, or a quote
_WHOLE = re.compile(r"(?<=://).*@", re.DOTALL)
"""The same where the text is one value and nothing else: with blanks, too."""
_LOGIN = re.compile(r"(?<![\w/])[^\s\"'`/@:]+:(?!//)[^\s\"'`@]+@(?=[\w\[])")  # without `//`, too
_QUERY = re.compile(r"(?<=[?&])([^=&\s]*(?:pass|secret|token|key|sig|credential)[^=&\s]*=)([^&#\s]+)", re.IGNORECASE)


def telling(name: str) -> bool:
    """Whether a setting's name says that its value is a secret."""
    return _NAME.search(name) is not None and distance(name.lower(), "chunk_tokens") > 2


def hide_urls(text: str) -> str:
    """`text` with user names, passwords and tokens in URLs replaced."""
    return _QUERY.sub(rf"\1{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", _USERINFO.sub(f"{HIDDEN}@", text)))


def hide(value: Any, name: str = "") -> Any:
    """Plain data for people: no typed secrets, no values under telling names, no secret parts of URLs, at any depth."""
    if isinstance(value, (SecretStr, SecretBytes)):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: hide(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(hide(item, name) for item in value) if type(value) in (list, tuple) else value
    if isinstance(value, str):
        return HIDDEN if value and telling(name) else hide_urls(_WHOLE.sub(f"{HIDDEN}@", value))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return HIDDEN if number and telling(name) else value


def collect(value: Any, name: str = "") -> set[str]:
    """Every secret in plain data: strings under telling names, typed secrets, and the secret parts of URLs."""
    if isinstance(value, (SecretStr, SecretBytes)):
        raw = value.get_secret_value()
        return {raw if isinstance(raw, str) else raw.decode("utf-8", "replace")}
    if isinstance(value, Mapping):
        return set().union(*(collect(item, str(key)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return set().union(*(collect(item, name) for item in value))
    if not isinstance(value, str):
        return set()
    found = {value} if telling(name) else set()
    for userinfo in _WHOLE.findall(value):
        found.update({userinfo[:-1], userinfo[:-1].partition(":")[2]})
    found.update(match[1] for match in _QUERY.findall(value))
    return found


def scrub(text: str, secrets: Iterable[str]) -> str:
    """`text` without URL secrets and `secrets` (of three characters and more: shorter ones are in every text)."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= 3:
            text = text.replace(secret, HIDDEN)
    return hide_urls(text)
