"""What the demos of all engines share: the options, the prompts, and the shape of the result.

The story is the same everywhere. A long document is the common prefix of several questions. Each question is answered
with the cache off, then with the document's KV in DRAM, then by a new process that finds it on disk only. A demo
module provides `run(options, report) -> DemoResult`; everything printed is made here from that result.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from lmcache_core.errors import LMCacheError
from lmcache_core.types import COMPUTED

RECOMPUTE, DRAM, DISK = "recompute", "dram", "disk"
"""Names of the phases every demo measures."""

QUESTIONS = (
    "How old must a person be to become President?",
    "Who is Commander in Chief of the Army and Navy?",
    "What does the President say in the oath?",
)


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Everything a demo needs to know."""

    model: Path
    """Directory of a Hugging Face model."""
    document: str
    questions: tuple[str, ...]
    tokens: int
    """Tokens of the common prefix, a multiple of `chunk_tokens`."""
    work: Path
    """Directory of this run: the configuration, the disk tier and what the phases hand over."""
    chunk_tokens: int = 256
    answer_tokens: int = 24
    dtype: str = "auto"
    """`float32`, `bfloat16`, `float16`, or `auto`: float32 on a CPU, the checkpoint's own on a GPU."""

    @property
    def config_file(self) -> Path:
        """The pipeline configuration that `write_config` makes."""
        return self.work / "demo.yaml"

    def save(self) -> Path:
        """Write the options below `work`, for the processes of the demo, and return the file."""
        path = self.work / "options.json"
        path.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")
        return path

    @classmethod
    def restore(cls, path: Path) -> DemoOptions:
        """Read what `save` wrote."""
        record = json.loads(path.read_text(encoding="utf-8"))
        for name in ("model", "work"):
            record[name] = Path(record[name])
        return cls(**{**record, "questions": tuple(record["questions"])})

    def write_config(self, dram: str, disk: str) -> Path:
        """Write the pipeline of the demo, a DRAM tier over a disk tier below `work`, and return its path."""
        tiers = [
            {"name": DRAM, "capacity": dram, "backend": {"type": "cpu"}},
            {
                "name": DISK,
                "capacity": disk,
                "write": "through",
                "backend": {"type": "gds", "path": str(self.work / "kv")},
            },
        ]
        document = {"chunk_tokens": self.chunk_tokens, "tiers": tiers}
        self.config_file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        return self.config_file


@dataclass(slots=True)
class Answer:
    """One question, asked once."""

    ttft_s: float
    """Seconds from the call to the first new token."""
    tokens: list[int]
    """Ids of the new tokens."""
    text: str
    sources: list[str] = field(default_factory=list)
    """For each whole chunk of the prompt, the tier that served it, or `COMPUTED`."""
    load_s: float = 0.0
    """Seconds of `ttft_s` spent looking up, reading and placing KV; 0 where the engine does not say."""


@dataclass(slots=True)
class DemoResult:
    """What a demo measured. `phases` maps a phase's name to one answer per question."""

    engine: str
    model: str
    device: str
    dtype: str
    prompt_tokens: list[int]
    phases: dict[str, list[Answer]]
    control: list[list[int]]
    """New token ids per question of the cache-off run that the answers must equal, at equal computation."""
    control_is: str
    """What the control is, in words."""
    notes: list[str] = field(default_factory=list)

    def ttft(self, phase: str) -> float:
        """Median time to first token of a phase, in seconds."""
        return statistics.median(answer.ttft_s for answer in self.phases[phase])

    @property
    def outputs_equal(self) -> bool:
        """Whether DRAM and disk answers have exactly the control's token ids."""
        return all([answer.tokens for answer in self.phases[phase]] == self.control for phase in (DRAM, DISK))

    @property
    def equal_to_recompute(self) -> bool:
        """Whether they also equal the full recompute, token by token (no promise in 16-bit types: see docs/demo.md)."""
        return self.control == [answer.tokens for answer in self.phases[RECOMPUTE]] and self.outputs_equal

    def figures(self) -> dict[str, float | bool]:
        """The figures of the demo."""
        recompute, dram, disk = (self.ttft(phase) for phase in (RECOMPUTE, DRAM, DISK))
        return {
            "ttft_recompute_s": round(recompute, 4),
            "ttft_dram_s": round(dram, 4),
            "ttft_disk_s": round(disk, 4),
            "speedup_dram": round(recompute / dram, 2),
            "speedup_disk": round(recompute / disk, 2),
            "outputs_equal": self.outputs_equal,
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data; the key `figures` holds the figures."""
        return {"figures": self.figures(), "equal_to_recompute": self.equal_to_recompute, **asdict(self)}


class Report:
    """Progress for people, on stderr."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def step(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show `text` with a spinner until the block ends; call the yielded function to change the text."""
        if self.console.is_terminal:
            with self.console.status(escape(text)) as status:
                yield lambda new: status.update(escape(new))
        else:
            self.console.print(text, markup=False)
            yield lambda new: self.console.print(new, markup=False)

    def note(self, text: str) -> None:
        """Show one line."""
        self.console.print(text, markup=False)


Run = Callable[[DemoOptions, Report], DemoResult]
"""What every engine's demo module provides as `run`."""


def document_text(path: Path | None) -> str:
    """The file's text, or the one shipped with the package: the Constitution of the United States, in English."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LMCacheError(f"--document {path} cannot be read as UTF-8 text: {error}") from error
    return resources.files("lmcache_core.cli").joinpath("constitution.txt").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids: prompt `i` is `prefix + tails[i]`."""

    prefix: list[int]
    tails: list[list[int]]

    def __iter__(self) -> Iterator[list[int]]:
        for tail in self.tails:
            yield self.prefix + tail


def build_prompts(tokenizer: Any, options: DemoOptions) -> Prompts:
    """Cut the document so that the common prefix has exactly `options.tokens` tokens, and append each question.

    The pieces are tokenised one by one, so the prefix is the same ids for every question. Raise `LMCacheError` when
    the document is too short.
    """
    content = "\x00\n\nQuestion about the text above: \x01"
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    else:
        text = f"{tokenizer.bos_token or ''}{content}\nAnswer:"
    head, rest = text.split("\x00")
    middle, end = rest.split("\x01")

    def encode(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])

    prefix = encode(head) + encode(options.document)
    if len(prefix) < options.tokens:
        raise LMCacheError(
            f"the document has {len(prefix)} tokens for this model, fewer than --tokens {options.tokens}; "
            "ask for fewer, or pass a longer text with --document FILE"
        )
    tails = [encode(middle + question + end) for question in options.questions]
    return Prompts(prefix[: options.tokens], tails)


def drop_page_cache(directory: Path) -> None:
    """Ask the kernel to forget the pages of every file below, so that the next read is the medium's, not memory's."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


_SHADES = {DRAM: "█", DISK: "▓", COMPUTED: "░"}


def picture(sources: Sequence[str]) -> str:
    """One character per chunk by the tier that served it, e.g. `████████░`."""
    return "".join(_SHADES.get(source, "?") for source in sources)


def runs(sources: Sequence[str]) -> str:
    """The same in words, e.g. `16 dram, 1 computed`."""
    return ", ".join(f"{len(list(group))} {source}" for source, group in groupby(sources))
