"""Named places where a test can end the process as `kill -9` would. No-ops unless `LMCACHE_KILLPOINT` names one."""

from __future__ import annotations

import os
import signal

ENVIRONMENT = "LMCACHE_KILLPOINT"

_armed: dict[str, int] = {}


def arm(text: str) -> None:
    """Die at the point `name`, or with `name:3` the third time it is reached; an empty text disarms."""
    _armed.clear()
    if text:
        name, _, count = text.partition(":")
        _armed[name] = int(count or 1)


def killpoint(name: str) -> None:
    """End the process here when the point is armed."""
    if _armed and name in _armed:
        _armed[name] -= 1
        if _armed[name] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get(ENVIRONMENT, ""))
