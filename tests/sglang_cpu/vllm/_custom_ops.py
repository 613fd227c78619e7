"""The one name that SGLang imports from here; a model on the CPU never calls it."""

from typing import Any


def rotary_embedding(*_: Any, **__: Any) -> None:
    """Not called on a CPU."""
    raise NotImplementedError("this is a stand-in for vLLM")
