"""A stand-in for torchvision, enough to import SGLang for text models: every name is there, none does anything."""

from __future__ import annotations

import enum
import sys
import types
from typing import Any

__version__ = "0.28.0"


class Missing:
    """Whatever is asked for: may be named and subclassed, not called."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("this is a stand-in for torchvision: text models need none")


class InterpolationMode(enum.Enum):
    """The modes that image processors name when they are imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Module(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - makes it a package

    def __getattr__(self, name: str) -> type[Missing]:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing


def _submodule(name: str) -> None:
    module = sys.modules[f"{__name__}.{name}"] = _Module(f"{__name__}.{name}")
    module.InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
    parent, _, leaf = f"{__name__}.{name}".rpartition(".")
    setattr(sys.modules[parent], leaf, module)


for _name in ("io", "models", "ops", "ops.boxes", "transforms", "transforms.functional", "transforms.v2"):
    _submodule(_name)
_submodule("transforms.v2.functional")
