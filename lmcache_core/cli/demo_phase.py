"""One phase of the Transformers demo, in its own process: `python -m lmcache_core.cli.demo_phase PHASE OPTIONS RESULT`.

    first     cache off: all questions recomputed, and the control; cache on: one cold run, all questions from DRAM
    restart   a new process that finds the document's KV on disk only

Lines on stdout are progress; the measurements are written to RESULT as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from lmcache_core.adapters.transformers import Handle, attach
from lmcache_core.cli.demo_common import DRAM, Answer, DemoOptions, build_prompts, drop_page_cache
from lmcache_core.config import load
from lmcache_core.errors import LMCacheError
from lmcache_core.types import COMPUTED


class _FirstToken:
    """A streamer that notes when the first new token arrives; the first thing a streamer gets is the prompt."""

    def __init__(self) -> None:
        self._puts = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:
            self.at = perf_counter()

    def end(self) -> None:
        """Nothing more comes."""


class Session:
    """A loaded model and the demo's prompts."""

    def __init__(self, options: DemoOptions) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "float32" if options.dtype == "auto" and self.device == "cpu" else options.dtype
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        self.model: Any = model.to(self.device).eval()
        prompts = build_prompts(self.tokenizer, options)
        self.prompts = [torch.tensor([ids], device=self.device) for ids in prompts]
        self.prefix_tokens = len(prompts.prefix)
        self.kept: Any = None
        """The engine's own cache of the call before."""
        self.ask(self.prompts[0][:, :64])  # the first call of a process pays for set-up that is nobody's prefill

    def ask(self, prompt: torch.Tensor, **more: Any) -> Answer:
        """Answer greedily and time the first token."""
        clock = _FirstToken()
        self.kept = None
        begun = perf_counter()
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=self.options.answer_tokens,
            return_dict_in_generate=True,
            streamer=clock,
            **more,
        )
        self.kept = out.past_key_values
        tokens = out.sequences[0, prompt.shape[1] :].tolist()
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        sources = [COMPUTED] * (prompt.shape[1] // self.options.chunk_tokens)
        return Answer(clock.at - begun, tokens, text, sources)

    def ask_cached(self, handle: Handle, prompt: torch.Tensor) -> Answer:
        """The same through the cache, with the sources of the prompt's chunks."""
        answer = self.ask(prompt)
        if handle.last.bypass is not None:
            raise LMCacheError(f"the call was passed through uncached: {handle.last.bypass}")
        answer.sources = list(handle.last.sources)
        answer.load_s = handle.last.load_s
        return answer

    def attach(self) -> Handle:
        """Connect the model to the demo's pipeline."""
        return attach(self.model, load(self.options.config_file, env={}).config, tokenizer=self.tokenizer)

    def device_name(self) -> str:
        """What the model runs on, in words."""
        if self.device == "cuda":
            return str(torch.cuda.get_device_name())
        return f"CPU, {torch.get_num_threads()} threads"


def _say(text: str) -> None:
    print(text, flush=True)


def _first(session: Session) -> dict[str, Any]:
    prompts = session.prompts
    recompute, kept = [], None
    for i, prompt in enumerate(prompts, 1):
        _say(f"cache off: computing all {prompt.shape[1]} tokens of question {i} of {len(prompts)}")
        recompute.append(session.ask(prompt))
        if kept is None:
            # What an engine that never restarts would have: the prefix's KV as the first question left it.
            kept = session.kept
            kept.crop(session.prefix_tokens - kept.get_seq_length())
    _say("control: the engine keeps the document's KV itself")
    control = [session.ask(prompt, past_key_values=copy.deepcopy(kept)).tokens for prompt in prompts]
    kept = None
    with session.attach() as handle:
        _say("cache on, nothing stored yet: computing and storing")
        cold = session.ask_cached(handle, prompts[0])
        stored = handle.last
        dram = []
        for i, prompt in enumerate(prompts, 1):
            _say(f"from DRAM: question {i} of {len(prompts)}")
            dram.append(session.ask_cached(handle, prompt))
        _say("finishing the writes to disk")
        complete = handle.pipeline.flush(60.0)
        chunk_bytes = handle.pipeline.layout.chunk_bytes
    handed = f"{stored.stored_chunks} chunks of {chunk_bytes / 2**20:.1f} MiB in {stored.store_s * 1e3:.0f} ms"
    notes = [f"the cold run took {cold.ttft_s:.3f} s to the first token, and handed over {handed} after its answer"]
    if not complete:
        notes.append("the disk needed more than a minute: some chunks were not written")
    return {
        "model": f"{session.options.model.name} ({type(session.model).__name__})",
        "device": session.device_name(),
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "prompt_tokens": [prompt.shape[1] for prompt in prompts],
        "recompute": [asdict(answer) for answer in recompute],
        "control": control,
        "cold": [asdict(cold)],
        "dram": [asdict(answer) for answer in dram],
        "notes": notes,
    }


def _restart(session: Session) -> dict[str, Any]:
    disk = []
    with session.attach() as handle:
        for i, prompt in enumerate(session.prompts, 1):
            _say(f"after the restart, from disk: question {i} of {len(session.prompts)}")
            handle.pipeline.clear(DRAM)  # what the question before brought up
            drop_page_cache(session.options.work / "kv")
            disk.append(session.ask_cached(handle, prompt))
    return {"disk": [asdict(answer) for answer in disk], "notes": []}


_PHASES: dict[str, Callable[[Session], dict[str, Any]]] = {"first": _first, "restart": _restart}


def main() -> None:
    """Run one phase."""
    parser = argparse.ArgumentParser(prog="demo_phase", description="one phase of the Transformers demo")
    parser.add_argument("phase", choices=_PHASES)
    parser.add_argument("options", type=Path)
    parser.add_argument("result", type=Path)
    args = parser.parse_args()
    _say("loading the model")
    try:
        record = _PHASES[args.phase](Session(DemoOptions.restore(args.options)))
    except LMCacheError as error:
        sys.exit(str(error))
    args.result.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
