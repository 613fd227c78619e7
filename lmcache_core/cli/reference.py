"""Tables of plugins' settings in Markdown, from their models: for the manual, and for plugins' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lmcache_core.config.convert import size
from lmcache_core.plugins import NOUNS
from lmcache_core.units import Percent


def markdown(models: Sequence[tuple[str, type[BaseModel]]]) -> str:
    """One section for each (group, model): what it is, then a row for each setting."""
    parts = []
    for group, model in models:
        kind = model.model_fields["type"].default
        parts.append(f"**{NOUNS[group].capitalize()} `{kind}`**: {_text(model.__doc__)}")
        parts += _tables(model, "")
    return "\n\n".join(parts) + "\n"


def _tables(model: type[BaseModel], path: str) -> Iterator[str]:
    fields = {name: field for name, field in model.model_fields.items() if path or name != "type"}
    if not fields:
        return
    rows = ["| key | default | meaning |", "|---|---|---|"]
    inner = {name: found for name, field in fields.items() if (found := _model(field)) is not None}
    for name, field in fields.items():
        default = "see below" if name in inner else _default(field)
        rows.append(f"| `{path}{name}` | {default} | {_text(field.description)} |")
    yield "\n".join(rows)
    for name, found in inner.items():
        yield from _tables(found, f"{path}{name}.")


def _model(field: FieldInfo) -> type[BaseModel] | None:
    """The model that stands in a setting."""
    parts = [field.annotation, *get_args(field.annotation)]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}, ""):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and value >= 1 << 20:
        return f"`{size(value)}`"
    return f"`{value}`" if isinstance(value, (str, int, float, Percent)) else "see its meaning"


def _text(text: str | None) -> str:
    """Prose on one line, as a table's cell has it."""
    return " ".join((text or "").split()).rstrip(".").replace("|", "\\|")
