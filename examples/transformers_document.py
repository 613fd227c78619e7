"""Ask several questions about one document. Run it twice: the second run finds the document's KV on disk.

    python examples/transformers_document.py MODEL DOCUMENT "first question" "second question"

MODEL is a Hugging Face directory (`lmcachectl model` prints one), DOCUMENT a text file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcache_core.adapters.transformers import attach

CONFIG = {
    "chunk_tokens": 256,
    "tiers": [
        {"name": "dram", "capacity": "1GiB", "backend": {"type": "cpu"}},
        {"name": "disk", "capacity": "4GiB", "backend": {"type": "gds", "path": "~/.cache/lmcache-core/example"}},
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("document", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--config", help="a configuration file instead of the one above")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device).eval()
    document = args.document.read_text(encoding="utf-8")

    with attach(model, args.config or CONFIG, tokenizer=tokenizer) as cache:
        for question in args.questions:
            # The document comes first: prompts share what they begin with.
            inputs = tokenizer(f"{document}\n\nQuestion: {question}\nAnswer:", return_tensors="pt").to(device)
            begun = perf_counter()
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            took, reused = perf_counter() - begun, cache.last.reused_tokens
            print(f"{took:.2f} s, {reused} of {cache.last.prompt_tokens} tokens reused: {answer!r}")


if __name__ == "__main__":
    main()
