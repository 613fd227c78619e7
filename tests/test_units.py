"""Byte sizes, percentages and durations: exact, forgiving about spelling, strict about meaning."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lmcache_core.units import (
    MAX_BYTES,
    ByteSize,
    Percent,
    Seconds,
    Size,
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_seconds,
    parse_size,
)


class Sample(BaseModel):
    size: ByteSize = 1
    share: Size = Percent(5)
    wait: Seconds = 5.0


@pytest.mark.parametrize(
    "given_, expected",
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        (" 4Gi ", 4 << 30),
        ("200GB", 200 * 10**9),
        ("1.5KiB", 1536),
        ("1e9", 10**9),
        ("0.1KiB", 102),
        ("2TiB", 2 << 40),
        ("3kB", 3000),
        (2.0, 2),
        (MAX_BYTES, MAX_BYTES),
    ],
)
def test_bytes(given_: Any, expected: int) -> None:
    assert parse_bytes(given_) == expected


@pytest.mark.parametrize(
    "given_, says",
    [
        ("4G", "`GiB` counts in 1024s, `GB` in 1000s"),
        ("4k", "`KiB` counts in 1024s, `kB` in 1000s"),
        ("4GX", "unknown unit `GX`"),
        ("9EB", "unknown unit `EB`"),
        ("-3GiB", "not negative"),
        (-3, "not negative"),
        ("", "must be written like 4GiB"),
        ("lots", "must be written like 4GiB"),
        ("4GiB 5", "must be written like 4GiB"),
        ("٤GiB", "must be written like 4GiB"),
        ("1e999GiB", "must be written like 4GiB"),
        (True, "must be a number"),
        (None, "must be a number"),
        ([1], "must be a number"),
        (1.5, "whole number"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (MAX_BYTES + 1, "below 4 EiB"),
        ("5000000TiB", "below 4 EiB"),
    ],
)
def test_bytes_that_are_none(given_: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_bytes(given_)


@pytest.mark.parametrize(
    "given_, expected",
    [
        (5, 5.0),
        (0.25, 0.25),
        ("5", 5.0),
        ("2s", 2.0),
        ("500ms", 0.5),
        ("100 us", 1e-4),
        ("2 min", 120.0),
        ("1h", 3600.0),
    ],
)
def test_seconds(given_: Any, expected: float) -> None:
    assert parse_seconds(given_) == expected


@pytest.mark.parametrize(
    "given_, says",
    [("5 parsecs", "unknown unit `parsecs`"), ("-1s", "not negative"), ("12:30", "2s or 500ms"), (True, "number")],
)
def test_seconds_that_are_none(given_: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_seconds(given_)


def test_a_size_may_be_a_share() -> None:
    assert parse_size("30%") == Percent(30)
    assert parse_size(Percent(7)) == Percent(7)
    assert parse_size("1KiB") == 1024
    assert Percent(30).of(1000) == 300
    assert Percent(0.1).of(10**15) == 10**12
    assert str(Percent(12.5)) == "12.5%"
    for wrong in ("0%", "101%", "-5%", "%", "5%%"):
        with pytest.raises(ValueError, match="percentage"):
            parse_size(wrong)


def test_fields_hold_plain_numbers_and_survive_a_dump() -> None:
    sample = Sample.model_validate({"size": "4GiB", "share": "30%", "wait": "500ms"})
    assert (sample.size, sample.share, sample.wait) == (4 << 30, Percent(30), 0.5)
    assert sample.model_dump(mode="json") == {"size": 4 << 30, "share": "30%", "wait": 0.5}
    assert Sample.model_validate(sample.model_dump()) == sample
    assert Sample.model_validate_json(sample.model_dump_json()) == sample
    with pytest.raises(ValidationError, match="unknown unit"):
        Sample.model_validate({"size": "4X"})


@given(st.integers(0, MAX_BYTES))
def test_every_int_of_bytes_is_itself(nbytes: int) -> None:
    assert parse_bytes(nbytes) == parse_bytes(str(nbytes)) == parse_bytes(f"{nbytes}B") == nbytes


@given(st.integers(1, 1 << 20), st.sampled_from(["KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"]))
def test_units_scale_exactly(amount: int, unit: str) -> None:
    base, power = (1024 if "i" in unit else 1000), "KMGT".index(unit[0].upper()) + 1
    assert parse_bytes(f"{amount}{unit}") == amount * base**power


@given(st.one_of(st.none(), st.booleans(), st.text(max_size=12), st.floats(), st.binary(max_size=3), st.integers()))
def test_anything_else_is_a_value_or_a_value_error(value: Any) -> None:
    for parse in (parse_bytes, parse_size, parse_seconds):
        with contextlib.suppress(ValueError):  # any other exception fails the test
            assert parse(value) is not None


@pytest.mark.parametrize(
    "nbytes, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (4 << 30, "4 GiB"),
        ((1 << 30) - 1, "1 GiB"),
        (115 << 30, "115 GiB"),
    ],
)
def test_bytes_for_people(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(1, 1 << 55))
def test_bytes_for_people_are_near_the_truth(nbytes: int) -> None:
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= nbytes * 0.006


@pytest.mark.parametrize(
    "seconds, text",
    [(2.0, "2 s"), (0.5, "500 ms"), (12.5e-6, "12.5 us"), (0.0, "0 us"), (1234.0, "1234 s"), (90.0, "90 s")],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
