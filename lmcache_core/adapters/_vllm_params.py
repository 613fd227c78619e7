"""What a request may say to the cache, and what the cache answers: flat keys of `kv_transfer_params`.

A request that says anything under `lmcache.` gets an answer under the same prefix with its last output. Keys and values
that are not understood are refused by name in that answer; the request runs as if it had not said them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "lmcache."

TENANT = PREFIX + "tenant"
"""Under which the operator's gateway names the tenant of a request, and overwrites whatever the caller wrote there.
vLLM's own prefix cache knows no tenants: the gateway sets `cache_salt` as well."""

MAX_PIN_S = 3600.0
"""Longest pin, in seconds."""

_NOT_KEPT = {
    "ttl_s": "chunks have no time to live of their own: what is not used is evicted; see lmcache.pin_s",
    "hints": "no hint is known to this version",
}


@dataclass(slots=True)
class Wishes:
    """What one request asks of the cache."""

    skip_read: bool = False
    """Load nothing."""
    skip_write: bool = False
    """Save nothing."""
    pin_s: float = 0.0
    """How long the prompt's chunks stay in memory after the request ended, in seconds."""
    answer: bool = False
    """Whether the request said anything at all."""
    refused: dict[str, str] = field(default_factory=dict)
    """What it said and cannot have, with the reason."""


_NONE = Wishes()


def parse(params: Mapping[str, Any] | None) -> Wishes:
    """The wishes in a request's `kv_transfer_params`. Never raises: it is the caller's text."""
    if not params:
        return _NONE
    wishes = Wishes()
    for key, value in params.items():
        if not isinstance(key, str) or not key.startswith(PREFIX):
            continue
        wishes.answer = True
        name = key.removeprefix(PREFIX)
        if name in ("skip_read", "skip_write", "report"):
            if not isinstance(value, bool):
                wishes.refused[key] = "must be true or false"
            elif name != "report":
                setattr(wishes, name, value)
        elif name == "pin_s":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_PIN_S:
                wishes.refused[key] = f"must be seconds between 0 and {MAX_PIN_S:.0f}"
            else:
                wishes.pin_s = float(value)
        elif key != TENANT:
            wishes.refused[key] = _NOT_KEPT.get(name, "not known; known: tenant, skip_read, skip_write, pin_s, report")
    return wishes
