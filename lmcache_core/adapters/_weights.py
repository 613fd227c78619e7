"""Fingerprints of models and adapters by the name an engine knows them by."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from lmcache_core.errors import Unsupported
from lmcache_core.identity import fingerprint_weights


def fingerprint(name: str, revision: str | None, fix: str) -> str:
    """Fingerprint of a model or adapter: a directory, a file, or a repository in the Hugging Face cache, hex.

    Raise `Unsupported` with `fix` when there are no weights.
    """
    path = Path(name)
    try:
        if not path.exists():
            for file in ("config.json", "adapter_config.json"):
                found = try_to_load_from_cache(name, file, revision=revision)
                if isinstance(found, str):
                    path = Path(found).parent
                    break
        return fingerprint_weights(path)
    except (OSError, HFValidationError) as error:
        raise Unsupported(f"the weights of {name!r} cannot be found to fingerprint them ({error}); {fix}") from error
