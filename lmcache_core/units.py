"""Quantities as people write them: byte sizes, shares of a whole, durations. Parsed once, exactly, into plain numbers.

Use the annotated types in pydantic models:

    capacity: ByteSize            # 4294967296, "4GiB", "200GB"             -> int, bytes
    floor: Size = Percent(5)      # the same, or "5%"                       -> int | Percent
    deadline: Seconds = 5.0       # 5, "2s", "500ms", "2 min"               -> float, seconds
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from lmcache_core.spelling import closest

_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50}
_DECIMAL = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_BYTES: dict[str, int] = {
    "": 1,
    "b": 1,
    **{unit.lower(): scale for unit, scale in (_BINARY | _DECIMAL).items()},
    **{unit[:2].lower(): scale for unit, scale in _BINARY.items()},
}
_SECONDS: dict[str, Decimal] = {
    "": Decimal(1),
    "us": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "sec": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*([A-Za-z]*)\s*", re.ASCII)
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", re.ASCII)

_SIZE_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?([eE]\+?[0-9]{1,2})?\s*([kKmMgGtTpP]([iI]?[bB]|[iI])|[bB])?\s*$"
_PERCENT_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*%\s*$"
_SECONDS_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?([eE]\+?[0-9]{1,2})?\s*(us|ms|s|sec|min|h)?\s*$"

MAX_BYTES = 1 << 62
"""Largest size accepted, so that sums of sizes stay within a signed 64-bit offset."""


@dataclass(frozen=True, slots=True)
class Percent:
    """A share of a whole that is known later, such as memory or a file system; `value` in (0, 100]."""

    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value <= 100:
            raise ValueError(f"a percentage must be above 0% and at most 100%, not {self.value:g}%")

    def of(self, total: int) -> int:
        """That share of `total`, rounded down."""
        return int(Decimal(repr(self.value)) * total / 100)

    @classmethod
    def parse(cls, value: Any) -> Percent:
        """From text such as `5%`. Raise `ValueError`."""
        if isinstance(value, Percent):
            return value
        match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError("a percentage must be written like 5%")
        return cls(float(match[1]))

    def __str__(self) -> str:
        return f"{self.value:g}%"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            json_schema_input_schema=core_schema.str_schema(pattern=_PERCENT_PATTERN),
            serialization=core_schema.to_string_ser_schema(),
        )


def parse_bytes(value: Any) -> int:
    """Bytes from an int or from text such as `4GiB` (2^30) or `200GB` (10^9). Raise `ValueError`."""
    number = _number(value, "a size", "4GiB or 200GB", _BYTES)
    if number > MAX_BYTES:
        raise ValueError("a size must be below 4 EiB")
    if isinstance(value, float) and number % 1:
        raise ValueError("a size in bytes must be a whole number; write a unit, e.g. 1.5GiB")
    return int(number)


def parse_size(value: Any) -> int | Percent:
    """Bytes as `parse_bytes`, or a `Percent` from text such as `30%`. Raise `ValueError`."""
    if isinstance(value, Percent) or (isinstance(value, str) and "%" in value):
        return Percent.parse(value)
    return parse_bytes(value)


def parse_seconds(value: Any) -> float:
    """Seconds from a number or from text such as `2s`, `500ms`, `2 min`. Raise `ValueError`."""
    return float(_number(value, "a duration", "2s or 500ms", _SECONDS))


def _number(value: Any, noun: str, example: str, units: dict[str, int] | dict[str, Decimal]) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{noun} must be a number or text such as {example}")
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        if match is None:
            negative = " and not negative" if value.strip().startswith("-") else ""
            raise ValueError(f"{noun} must be written like {example}{negative}")
        scale = units.get(match[2].lower())
        if scale is None:
            raise ValueError(
                f"unknown unit `{match[2]}`: {noun} must be written like {example}{_nearby(match[2], units)}"
            )
        return Decimal(match[1]) * scale
    number = Decimal(repr(value))
    if not number.is_finite() or number < 0:
        raise ValueError(f"{noun} must be finite and not negative")
    return number


def _nearby(unit: str, units: dict[str, int] | dict[str, Decimal]) -> str:
    """A hint for units that could mean two things, such as `G`."""
    if len(unit) == 1 and units is _BYTES and unit.upper() in "KMGTP":
        letter = unit.upper()
        return f" (`{letter}iB` counts in 1024s, `{'k' if letter == 'K' else letter}B` in 1000s)"
    words = [*_BINARY, *_DECIMAL] if units is _BYTES else [*_SECONDS][1:]
    if (near := closest(unit, words)) is not None:
        return f"; did you mean `{near}`?"
    return " (units: KiB, MiB, GiB, TiB, kB, MB, GB, TB)" if units is _BYTES else " (units: us, ms, s, min, h)"


def format_bytes(nbytes: int) -> str:
    """Short text for people, three significant digits at most: `4 GiB`, `1.5 MiB`, `12 B`."""
    for unit, scale in reversed(_BINARY.items()):
        if nbytes >= 0.9995 * scale:
            amount = nbytes / scale
            return f"{amount:.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"
    return f"{nbytes} B"


def format_seconds(seconds: float) -> str:
    """Short text for people, three significant digits: `2 s`, `500 ms`, `12.5 us`."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


SIZE_SCHEMA: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 0, "description": "bytes"},
    {"type": "string", "pattern": _SIZE_PATTERN, "examples": ["4GiB", "200GB"]},
]
PERCENT_SCHEMA: dict[str, Any] = {"type": "string", "pattern": _PERCENT_PATTERN, "examples": ["30%"]}

ByteSize = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema({"anyOf": SIZE_SCHEMA})]
"""Field type for a size: an int of bytes once validated."""

Size = Annotated[
    int | Percent,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [*SIZE_SCHEMA, PERCENT_SCHEMA]}),
]
"""Field type for a size that may be a share of a whole: int of bytes, or `Percent`."""

Seconds = Annotated[
    float,
    BeforeValidator(parse_seconds),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "description": "seconds"},
                {"type": "string", "pattern": _SECONDS_PATTERN, "examples": ["2s", "500ms"]},
            ]
        }
    ),
]
"""Field type for a duration: a float of seconds once validated."""
