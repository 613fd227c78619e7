"""What is wrong with a configuration, as data: shared by the models, the readers and the messages."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Loc = tuple[str | int, ...]
"""Path of a setting: keys and list positions, from the top."""


class Code(enum.StrEnum):
    """Stable codes of configuration problems, explained one by one in docs/configuration.md."""

    READ = "LMC-1101"
    SYNTAX = "LMC-1102"
    DUPLICATE = "LMC-1103"
    UNKNOWN = "LMC-1104"
    MISSING = "LMC-1105"
    VALUE = "LMC-1106"
    PLUGIN = "LMC-1107"
    CONTRADICTION = "LMC-1108"
    MACHINE = "LMC-1109"
    ENVIRONMENT = "LMC-1110"
    CLASSIC = "LMC-1111"


def dotted(loc: Loc) -> str:
    """`("tiers", 1, "capacity")` as people write it: `tiers[1].capacity`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shorten(value: Any) -> str:
    """A value on one short line, as it would be written; containers only by their kind."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[...]" if value else "[]"
    if isinstance(value, str):
        text = value if value.isprintable() and value.strip() == value and value else repr(value)
    elif isinstance(value, (int, float)):
        text = repr(value)
    else:
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong that no single field shows by itself."""

    loc: Loc
    what: str
    why: str
    fix: str
    value: Any = None
    code: Code = Code.CONTRADICTION


def raise_findings(title: str, findings: Sequence[Finding]) -> None:
    """Raise one pydantic `ValidationError` with every finding in its place; nothing when there are none."""
    if findings:
        raise ValidationError.from_exception_data(
            title,
            [
                InitErrorDetails(
                    type=PydanticCustomError(
                        "finding", "{what}", {"what": f.what, "why": f.why, "fix": f.fix, "code": f.code.value}
                    ),
                    loc=f.loc,
                    input=f.value,
                )
                for f in findings
            ],
        )
