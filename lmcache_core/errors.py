"""The exceptions of lmcache-core.

Assembly (configuration, plugins, build) always raises, with every problem at once. At run time no
backend error reaches the engine: the affected keys become misses with a reason and a counter.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

BAD_BLOCKS = (errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO)
"""What a read of bad blocks ends with: EIO through the page cache; direct I/O passes on what the block layer says,
ENODATA for a medium error, EILSEQ for a failed protection check, EREMOTEIO for a failed target."""


class LMCacheError(Exception):
    """Base of every exception this project raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration: where it is, what it is, why it stops, how to mend it."""

    where: str
    """`file:line:column` when read from text, else the origin (`environment`, `python`)."""
    path: str
    """Dotted path of the setting, e.g. `tiers[1].capacity`."""
    what: str
    """What is wrong."""
    why: str = ""
    """What would happen if it were ignored."""
    fix: str = ""
    """The likely mend, one line."""
    value: str = ""
    """The value as it was given (secrets redacted), where there is one to show."""
    code: str = ""
    """Stable code to look the problem up by, e.g. `LMC-1104`."""

    def __str__(self) -> str:
        lines = [f"{self.code}  {self.where}" if self.code else self.where]
        if self.path:
            lines.append(f"   {self.path}: {self.value}" if self.value else f"   {self.path}")
            start = self.path.rfind(".") + 1
            lines.append(f"   {' ' * start}{'^' * (len(self.path) - start)} {self.what}")
        else:
            lines.append(f"   {self.what}")
        if self.why:
            lines.append(f"   why it stops: {self.why}")
        if self.fix:
            lines.append(f"   fix: {self.fix}")
        return "\n".join(lines)


class ConfigError(LMCacheError, ValueError):
    """A configuration that cannot be used; `problems` holds all of them."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        if isinstance(problems, str):
            problems = [Problem(where="python", path="", what=problems)]
        self.problems: tuple[Problem, ...] = tuple(problems)
        count = len(self.problems)
        head = "1 configuration error" if count == 1 else f"{count} configuration errors"
        super().__init__("\n".join([head, *map(str, self.problems)]))


class PluginError(LMCacheError):
    """A named plugin that is missing, broken or in conflict."""


class UnknownPlugin(PluginError):
    """No installed distribution provides a plugin of that name."""


class PluginConflict(PluginError):
    """Two distributions provide a plugin of the same name."""


class BackendError(LMCacheError):
    """A storage or memory backend could not do what it was asked."""


class BackendUnavailable(BackendError):
    """The medium cannot be reached or used at all (missing directory, dead server, no driver)."""


class NoSpace(BackendError):
    """The medium has no room for the object; evicting something may make room."""


class CorruptChunk(BackendError):
    """Stored bytes that are not the object they claim to be; `reason` is a `MissReason` value."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Unsupported(LMCacheError):
    """An engine, model or layout that this version refuses, with the reason."""


class Closed(LMCacheError):
    """The object was used after `close()`."""
