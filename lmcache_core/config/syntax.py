"""Where a text that is not YAML goes wrong: the line to mend, which is often above the one where a parser gives up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

_OPENING = re.compile(r"(?:^|[\s\[{,:])$")


@dataclass(frozen=True, slots=True)
class Mistake:
    """A syntax error: its place (from 1), what is wrong there and how to mend it."""

    line: int
    column: int
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class _Open:
    sign: str
    line: int
    column: int


def mistake(text: str, error: yaml.MarkedYAMLError) -> Mistake | None:
    """What is most likely wrong; None when the parser gives no place."""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return None
    context, problem = error.context or "", error.problem or ""
    lines = text.splitlines()
    seen = mark.line + 1
    quote = next((found for found in _open(lines[:seen]) if found.sign in "\"'"), None)
    if quote is not None:
        return _at(quote, "a quote is opened and not closed in its line", f"write the closing {quote.sign}", seen)
    if context.startswith("while scanning a simple key") and error.context_mark is not None:
        line = error.context_mark.line + 1
        return Mistake(line, error.context_mark.column + 1, "a line without a colon", "write `key: value`")
    above = next((i for i in range(mark.line - 1, -1, -1) if _bare(lines[i])), None)
    if problem.startswith("mapping values are not allowed") and above is not None and ":" not in lines[above]:
        column = len(lines[above]) - len(lines[above].lstrip()) + 1
        return Mistake(above + 1, column, "a line without a colon", "write `key: value`")
    if "flow" in context:
        left = [found for found in _open(lines[:seen]) if found.line < seen]
        if left:
            other = {"{": "}", "[": "]"}[left[-1].sign]
            return _at(left[-1], f"`{left[-1].sign}` is opened and not closed", f"write the closing `{other}`", seen)
    if context.startswith("while parsing a block collection") and error.context_mark is not None:
        place = error.context_mark
        what = "a list item beside settings"
        return Mistake(place.line + 1, place.column + 1, what, "take the `- ` away, or start every item with it")
    what = ", ".join(part for part in (context, problem) if part)
    tab = " tab " in what or "'\\t'" in what or (mark.line < len(lines) and "\t" in lines[mark.line])
    fix = "indent with spaces" if tab else "check quotes, colons and indentation here"
    return Mistake(mark.line + 1, mark.column + 1, what, fix)


def _at(found: _Open, what: str, fix: str, seen: int) -> Mistake:
    noticed = f" (noticed in line {seen})" if seen != found.line else ""
    return Mistake(found.line, found.column, what + noticed, fix)


def _bare(line: str) -> bool:
    """Whether a line is neither empty nor a comment."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _open(lines: list[str]) -> Iterator[_Open]:
    """Quotes not closed in their line, and brackets never closed, in the order of the text."""
    brackets: list[_Open] = []
    for number, line in enumerate(lines, start=1):
        quote: _Open | None = None
        skip = False
        for at, sign in enumerate(line):
            if skip:
                skip = False
            elif quote is not None:
                skip = sign == "\\" and quote.sign == '"'
                if sign == quote.sign:
                    quote = None
            elif sign == "#" and (at == 0 or line[at - 1].isspace()):
                break
            elif sign in "\"'" and _OPENING.search(line[:at]):
                quote = _Open(sign, number, at + 1)
            elif sign in "[{":
                brackets.append(_Open(sign, number, at + 1))
            elif sign in "]}" and brackets:
                brackets.pop()
        if quote is not None:
            yield quote
    yield from brackets
