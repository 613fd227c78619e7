"""A stand-in for vLLM, which SGLang imports where its own kernels are missing."""

__version__ = "0.0"
