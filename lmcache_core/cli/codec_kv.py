"""Real KV for judging a codec: a causal language model reads a text, and later predicts its end from altered KV.

The model computes in float32; its KV, rounded to bfloat16, is the reference. The measure is what the model itself says:
the Kullback-Leibler divergence of its next-token distributions with altered KV from those with the reference, over
tokens that follow the context, with the text's own tokens as input.
"""

from __future__ import annotations

import argparse
import importlib
import math
import pydoc_data.topics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcache_core.cli.demo_common import document_text
from lmcache_core.errors import LMCacheError

Values = NDArray[np.float32]


def texts(file: Path | None) -> dict[str, str]:
    """Texts to read: the file, or prose, a reference manual and source code that are on every machine."""
    if file is not None:
        try:
            return {file.name: file.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise LMCacheError(f"--text {file} cannot be read as UTF-8 text: {error}") from error
    return {
        "constitution": document_text(None),
        "manual": manual(0),
        "source": Path(argparse.__file__).read_text(encoding="utf-8"),
    }


def manual(half: int) -> str:
    """One half of the long topics of Python's manual, by the alphabet: 0 or 1."""
    topics = pydoc_data.topics.topics
    return "\n\n".join([topics[name] for name in sorted(topics) if len(topics[name]) > 4000][half::2])


@dataclass(frozen=True, slots=True)
class Judgement:
    """What altered KV does to a model."""

    kl: float
    """Mean divergence from the reference, in nats per token."""
    top1: float
    """Percent of tokens with the same most likely token."""
    dppl_percent: float
    """Change of the text's perplexity."""
    dppl_error: float
    """Standard error of `dppl_percent`, from the differences of the tokens' losses taken as independent."""


def bfloat16(values: Values) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16 (ties to even) of finite numbers."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)


def float32(raw: NDArray[np.uint16]) -> Values:
    """The numbers that bfloat16 bits stand for."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


class Reader:
    """A Hugging Face causal language model with ordinary attention, in float32 on the CPU."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.transformers: Any = importlib.import_module("transformers")
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def open(cls, directory: Path) -> Reader:
        """The model in a directory. Raise `LMCacheError` where it cannot be had."""
        try:
            torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        except ImportError as error:
            raise LMCacheError(
                f"judging quality needs {error.name}: pip install 'lmcache-core[transformers]'"
            ) from error
        transformers.utils.logging.disable_progress_bar()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise LMCacheError(f"{directory}: not a causal language model that can be opened: {error}") from error
        return cls(model.eval(), tokenizer)

    @property
    def heads(self) -> int:
        """KV heads of a layer."""
        config = self.model.config
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def tokens(self, text: str, count: int, most: int = 0) -> list[int]:
        """The first token ids of a text: `count`, or up to `most`. Raise `LMCacheError` when there are not `count`."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])[: max(count, most)]
        if len(ids) < count:
            raise LMCacheError(f"the text has {len(ids)} tokens for this model, fewer than {count}: ask for fewer")
        return ids

    def read(self, ids: Sequence[int]) -> NDArray[np.uint16]:
        """KV of the tokens as bfloat16 bits, `[layer][2][token][head * dim]`. Raise `LMCacheError` for other KV."""
        cache = self.transformers.DynamicCache(config=self.model.config)
        with self.torch.no_grad():
            for at in range(0, len(ids), 512):
                part = self.torch.tensor([list(ids[at : at + 512])])
                self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        planes = []
        for layer in cache.layers:
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if tensor is None or tensor.shape[:3] != (1, self.heads, len(ids)):
                    raise LMCacheError("the layers of this model do not all keep plain K and V of every token")
                planes.append(bfloat16(tensor[0].transpose(0, 1).reshape(len(ids), -1).numpy()))
        return np.stack(planes).reshape(len(cache.layers), 2, len(ids), -1)

    def predict(self, kv: NDArray[np.uint16], ids: Sequence[int]) -> Any:
        """Log-probabilities `[token, vocabulary]` of what follows each of `ids`, which follow the tokens of `kv`."""
        layers, _, tokens, _ = kv.shape
        tensor = self.torch.from_numpy(float32(kv)).reshape(layers, 2, tokens, self.heads, -1).transpose(2, 3)
        past = [(layer[0][None].contiguous(), layer[1][None].contiguous()) for layer in tensor]
        cache = self.transformers.DynamicCache(past, config=self.model.config)
        with self.torch.no_grad():
            logits = self.model(self.torch.tensor([list(ids)]), past_key_values=cache, use_cache=True).logits[0]
            return self.torch.log_softmax(logits.float(), -1)

    def judge(self, reference: Any, altered: Any, ids: Sequence[int]) -> Judgement:
        """Compare predictions of what follows `ids`."""
        torch = self.torch
        agree = (reference.argmax(-1) == altered.argmax(-1)).float().mean()
        there, next_ids = torch.arange(len(ids) - 1), torch.tensor(list(ids[1:]))
        loss = reference[there, next_ids] - altered[there, next_ids]
        return Judgement(
            kl=float((reference.exp() * (reference - altered)).sum(-1).mean()),
            top1=100 * float(agree),
            dppl_percent=100 * (math.exp(float(loss.mean())) - 1),
            dppl_error=100 * float(loss.std(correction=0)) / math.sqrt(len(loss)),
        )


def chunked(kv: NDArray[np.uint16], chunk_tokens: int) -> list[NDArray[np.uint16]]:
    """Whole chunks of KV `[layer][plane][token][channel]`, in the order of the tokens, each contiguous."""
    return [
        np.ascontiguousarray(kv[:, :, at : at + chunk_tokens])
        for at in range(0, kv.shape[2] - chunk_tokens + 1, chunk_tokens)
    ]


def mean(judgements: Sequence[Judgement]) -> Mapping[str, float]:
    """Each measure's mean over several texts, and that mean's standard error for `dppl_error`."""
    names = ("kl", "top1", "dppl_percent")
    error = math.hypot(*(judgement.dppl_error for judgement in judgements)) / len(judgements)
    return {name: float(np.mean([getattr(judgement, name) for judgement in judgements])) for name in names} | {
        "dppl_error": error
    }
