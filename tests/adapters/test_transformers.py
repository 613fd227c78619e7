"""Transformers: reuse is exact (tokens, logits, bytes); what cannot be exact is refused or passed through."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda, installed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lmcache_core.adapters.transformers import Bypass, Handle, attach, probe  # noqa: E402
from lmcache_core.cli.model import NAME, default_directory  # noqa: E402
from lmcache_core.errors import ConfigError, Unsupported  # noqa: E402
from lmcache_core.types import COMPUTED  # noqa: E402

CHUNK = 16
VOCAB = 257
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    # Wide enough that a wrong byte of KV changes the logits visibly.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(kind: str = "Llama", seed: int = 0, dtype: Any = torch.float32, **changes: Any) -> Any:
    """A tiny random decoder of an architecture, made by hand."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.generation_config.eos_token_id = None  # every answer has the length asked for
    model.generation_config.pad_token_id = None
    return model


def prompt(length: int, seed: int = 1) -> Any:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def answer(model: Any, ids: Any, new: int = 6, **more: Any) -> tuple[list[int], Any]:
    """New greedy tokens and the logits they were chosen from."""
    out = model.generate(
        ids, do_sample=False, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **more
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.stack(out.logits)


def config(tmp_path: Path | None = None, dram: str = "8MiB") -> dict[str, Any]:
    tiers: list[dict[str, Any]] = [{"name": "dram", "capacity": dram, "backend": {"type": "cpu"}}]
    if tmp_path is not None:
        tiers.append({"name": "disk", "capacity": "64MiB", "backend": {"type": "gds", "path": str(tmp_path / "kv")}})
    return {"chunk_tokens": CHUNK, "tiers": tiers}


@pytest.fixture
def model() -> Any:
    return tiny()


@pytest.fixture
def handle(model: Any) -> Iterator[Handle]:
    with attach(model, config()) as attached:
        yield attached
        attached.pipeline.check()


# -- exactness -----------------------------------------------------------------------------------------------------
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Phi3": {"rope_theta": 10000.0},
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
    "GPT2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024},
    "GPTNeoX": {},
    # Windows shorter than the document, in every layer or in some of them.
    "Mistral": {"sliding_window": 24},
    "Gemma2": {"sliding_window": 24},
    "Gemma3Text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    # Latent attention: Transformers keeps K and V of every head, in two sizes.
    "DeepseekV3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
        "num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cold_warm_and_partial_hits_equal_no_cache(kind: str) -> None:
    model = tiny(kind, **ARCHITECTURES[kind])
    document, questions = prompt(5 * CHUNK), [prompt(n, seed=n) for n in (3, 7, 20)]
    prompts = [torch.cat([document, question], dim=1) for question in questions]
    plain = [answer(model, ids) for ids in prompts]
    with attach(model, config()) as handle:
        for round_ in ("cold", "warm"):
            for i, ids in enumerate(prompts):
                tokens, logits = answer(model, ids)
                assert tokens == plain[i][0]
                torch.testing.assert_close(logits, plain[i][1], rtol=1e-4, atol=1e-4)
                reused = 0 if (round_, i) == ("cold", 0) else (ids.shape[1] - 1) // CHUNK if round_ == "warm" else 5
                assert handle.last.reused_tokens == reused * CHUNK
                assert handle.last.sources == ("dram",) * reused + (COMPUTED,) * (ids.shape[1] // CHUNK - reused)
        handle.pipeline.check()
        assert handle.counts["errors"] == 0


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The CPU plays the GPU; torch's stream is the one that runs at once."""
    cache = "lmcache_core.adapters._transformers_cache"
    monkeypatch.setattr("lmcache_core.adapters.transformers.is_gpu", lambda device, number: True)
    monkeypatch.setattr(f"{cache}.stream_of", lambda device: 0)
    with installed() as cuda:
        yield cuda


@pytest.mark.parametrize("places, batch", [(64, 1), (3, 1), (64, 2)], ids=["all fit", "three fit", "batch"])
def test_a_gpu_tier_serves_what_it_holds_and_the_host_the_rest(on_gpu: FakeCuda, places: int, batch: int) -> None:
    model = tiny()
    layout = probe(model).layout(CHUNK)
    hbm = {"name": "hbm", "capacity": places * layout.chunk_bytes, "backend": {"type": "gpu", "spare": 0}}
    settings = config()
    settings["tiers"].insert(0, hbm)
    ids = torch.cat([prompt(5 * CHUNK + 3, seed=n) for n in range(batch)])
    plain = model.generate(ids, do_sample=False, max_new_tokens=4)
    with attach(model, settings) as handle:
        for sources in (COMPUTED, "hbm", "dram", "hbm"):
            assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4), plain)
            assert handle.pipeline.flush(10) and handle.counts["errors"] == 0
            few = min(places, 5) if sources == "hbm" else 5
            assert handle.last.sources == (sources,) * few * batch + ("dram",) * (5 - few) * batch
            if sources == "hbm":
                handle.pipeline.clear("hbm")
        handle.pipeline.check(idle=True)


def test_a_gpu_tier_is_for_the_model_s_own_gpu() -> None:
    model = tiny()
    hbm = {"name": "hbm", "capacity": "1MiB", "backend": {"type": "gpu", "spare": 0}}
    settings = config()
    settings["tiers"].insert(0, hbm)
    with installed(), pytest.raises(Unsupported, match="tier hbm is on GPU 0, the model on cpu"):
        attach(model, settings)


def test_a_gpu_tier_is_refused_where_it_would_not_be_used(on_gpu: FakeCuda) -> None:
    model = tiny("DeepseekV3", **ARCHITECTURES["DeepseekV3"])
    settings = config()
    settings["tiers"].insert(0, {"name": "hbm", "capacity": "1MiB", "backend": {"type": "gpu", "spare": 0}})
    with pytest.raises(Unsupported, match="K and V of this model differ in size"):
        attach(model, settings)


@pytest.mark.parametrize("save_paged", [True, False])
@pytest.mark.parametrize("load_paged", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_bytes_are_the_stored_bytes(dtype: Any, load_paged: bool, save_paged: bool) -> None:
    """Also across the two ways to copy: pages on the host, and tensors a chunk at a time, which a GPU takes."""
    model = tiny(dtype=dtype)
    ids = prompt(4 * CHUNK + 5)
    with attach(model, config()) as handle:
        handle.mover.paged = save_paged
        cold = model.generate(ids, do_sample=False, max_new_tokens=2, return_dict_in_generate=True).past_key_values
        handle.mover.paged = load_paged
        warm = model.generate(ids, do_sample=False, max_new_tokens=2, return_dict_in_generate=True).past_key_values
        assert handle.last.reused_tokens == 4 * CHUNK
    for a, b in zip(cold.layers, warm.layers, strict=True):
        for plane in ("keys", "values"):
            assert torch.equal(getattr(a, plane)[:, :, : 4 * CHUNK], getattr(b, plane)[:, :, : 4 * CHUNK])


def test_a_wrong_byte_of_kv_would_be_seen(model: Any, handle: Handle) -> None:
    """The comparisons above can fail: damage what memory serves, and the answer changes."""
    ids = prompt(4 * CHUNK + 5)
    _, logits = answer(model, ids)
    chain_keys = list(handle.pipeline.slots.index)
    with handle.pipeline.retrieve(chain_keys[:1]) as lease:
        torch.frombuffer(lease.view(0), dtype=torch.float32)[:64].neg_()
    _, damaged = answer(model, ids)
    assert not torch.allclose(logits, damaged, rtol=1e-4, atol=1e-4)


def test_at_least_one_token_is_computed(model: Any, handle: Handle) -> None:
    ids = prompt(3 * CHUNK)
    plain = handle.original(ids, do_sample=False, max_new_tokens=4)
    for _ in range(2):
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4), plain)
    assert handle.last.reused_tokens == 2 * CHUNK
    assert handle.last.sources == ("dram", "dram", COMPUTED)


def test_short_prompts_work_and_store_nothing(model: Any, handle: Handle) -> None:
    ids = prompt(CHUNK - 8)
    assert torch.equal(
        model.generate(ids, do_sample=False, max_new_tokens=4), handle.original(ids, do_sample=False, max_new_tokens=4)
    )
    assert handle.last.stored_chunks == 0
    assert handle.last.sources == ()


def test_answers_are_reused_by_the_next_turn(model: Any, handle: Handle) -> None:
    ids = prompt(2 * CHUNK + 3)
    first = model.generate(ids, do_sample=False, max_new_tokens=CHUNK + 8)
    assert handle.last.stored_chunks == (first.shape[1] - 1) // CHUNK
    turn = torch.cat([first, prompt(5, seed=9)], dim=1)
    tokens, _ = answer(model, turn)
    assert handle.last.reused_tokens == (first.shape[1] - 1) // CHUNK * CHUNK
    handle.detach()
    assert tokens == answer(model, turn)[0]


def test_sampling_draws_the_same_tokens(model: Any, handle: Handle) -> None:
    ids = prompt(3 * CHUNK + 2)
    drawn = []
    for generate in (handle.original, model.generate, model.generate):
        torch.manual_seed(5)
        drawn.append(generate(ids, do_sample=True, max_new_tokens=8).tolist())
    assert drawn[0] == drawn[1] == drawn[2]
    assert handle.last.reused_tokens == 3 * CHUNK


def test_eviction_shortens_the_hit_and_changes_nothing(model: Any) -> None:
    prompts = [prompt(6 * CHUNK + 1, seed=seed) for seed in range(4)]
    plain = [answer(model, ids)[0] for ids in prompts]
    with attach(model, config(dram="240KiB")) as handle:  # about eight chunks of 28 KiB
        for _ in range(3):
            for ids, tokens in zip(prompts, plain, strict=True):
                assert answer(model, ids)[0] == tokens
                handle.pipeline.check()
        assert handle.pipeline.stats()["tiers"]["dram"]["evicted"] > 0


def test_a_call_says_in_words_what_happened(model: Any, handle: Handle) -> None:
    said = []
    for ids, options in ((prompt(40), {}), (prompt(40), {}), (prompt(5), {}), (prompt(40), {"num_beams": 2})):
        model.generate(ids, max_new_tokens=1, do_sample=False, **options)
        said.append(str(handle.last))
    assert said[0].startswith("0 of 40 prompt tokens reused; chunks of 16: 2 computed (not_stored); ")
    assert said[0].endswith(" ms to store 2")
    assert said[1].startswith("32 of 40 prompt tokens reused; chunks of 16: 2 dram; ")
    assert said[2:] == ["nothing to reuse: 5 tokens are less than a chunk of 16", "passed through uncached: decoding"]


# -- the caller's side ---------------------------------------------------------------------------------------------
class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Any) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def test_what_the_caller_gets_is_unchanged(model: Any, handle: Handle) -> None:
    ids = prompt(3 * CHUNK + 2)
    mask = torch.ones_like(ids)
    settings = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, return_dict_in_generate=True)

    def calls(generate: Any) -> list[Any]:
        recorder = Recorder()
        full = generate(inputs=ids, attention_mask=mask, generation_config=settings)
        return [
            generate(ids, max_new_tokens=5, do_sample=False).tolist(),
            generate(input_ids=ids, attention_mask=mask, max_length=ids.shape[1] + 5, do_sample=False).tolist(),
            type(full).__name__,
            sorted(full.keys()),
            full.sequences.tolist(),
            type(full.past_key_values).__name__,
            full.past_key_values.get_seq_length(),
            generate(ids, settings, streamer=recorder).sequences.tolist(),
            recorder.seen,
        ]

    plain = calls(handle.original)
    assert calls(model.generate) == plain
    assert calls(model.generate) == plain
    assert handle.last.reused_tokens == 3 * CHUNK
    assert handle.counts["errors"] == 0
    assert not [name for name in handle.counts if name.startswith("bypass")]


def test_a_returned_cache_continues_as_usual(model: Any, handle: Handle) -> None:
    ids = prompt(3 * CHUNK + 2)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    out = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([out.sequences, prompt(4, seed=3)], dim=1)
    tokens = model.generate(longer, past_key_values=out.past_key_values, max_new_tokens=4, do_sample=False)
    assert handle.last.bypass is Bypass.OWN_CACHE
    assert torch.equal(tokens, handle.original(longer, max_new_tokens=4, do_sample=False))


def test_errors_of_generate_reach_the_caller(model: Any, handle: Handle) -> None:
    with pytest.raises(ValueError, match="not_an_option"):
        model.generate(prompt(CHUNK), not_an_option=torch.ones(1))
    with pytest.raises(TypeError):
        model.generate(prompt(CHUNK), None, None, None, None, None, None, None, None, None, None, "too many", 1)


BYPASSES: dict[str, tuple[Bypass, dict[str, Any]]] = {
    "beams": (Bypass.DECODING, {"num_beams": 2}),
    "several answers": (Bypass.DECODING, {"num_return_sequences": 2, "do_sample": True}),
    "prompt lookup": (Bypass.DECODING, {"prompt_lookup_num_tokens": 2, "eos_token_id": 2}),
    "chunked prefill": (Bypass.DECODING, {"prefill_chunk_size": 8}),
    "no cache": (Bypass.CACHE_KIND, {"use_cache": False}),
    "hidden states": (Bypass.OUTPUTS, {"output_hidden_states": True, "return_dict_in_generate": True}),
    "a masked token": (Bypass.PADDING, {"attention_mask": None}),
    "unknown inputs": (Bypass.INPUTS, {"position_ids": torch.arange(3 * CHUNK + 2)[None]}),
}


@pytest.mark.parametrize("case", BYPASSES)
def test_calls_that_cannot_be_served_exactly_pass_through(case: str, model: Any, handle: Handle) -> None:
    reason, options = BYPASSES[case]
    ids = prompt(3 * CHUNK + 2)
    options = {"do_sample": False, "max_new_tokens": 3, **options}
    if case == "a masked token":
        mask = torch.ones_like(ids)
        mask[0, 4] = 0
        options["attention_mask"] = mask
    model.generate(ids, max_new_tokens=1, do_sample=False)
    stored = handle.counts["stored_chunks"]

    def sequences(generate: Any) -> Any:
        torch.manual_seed(3)
        out = generate(ids, **options)
        return out if isinstance(out, torch.Tensor) else out.sequences

    assert torch.equal(sequences(model.generate), sequences(handle.original))
    assert handle.last.bypass is reason
    assert handle.counts[f"bypass.{reason}"] == 1
    assert handle.counts["stored_chunks"] == stored


def test_embeddings_pass_through(model: Any, handle: Handle) -> None:
    embeds = model.get_input_embeddings()(prompt(2 * CHUNK))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    out = model.generate(inputs_embeds=embeds, **options)
    assert handle.last.bypass is Bypass.INPUTS
    assert torch.equal(out, handle.original(inputs_embeds=embeds, **options))


def test_defaults_of_the_model_count(model: Any, handle: Handle) -> None:
    model.generation_config.num_beams = 2
    model.generate(prompt(2 * CHUNK), max_new_tokens=2)
    assert handle.last.bypass is Bypass.DECODING
    model.generate(prompt(2 * CHUNK), max_new_tokens=2, num_beams=1)
    assert handle.last.bypass is None


def test_a_model_in_training_mode_passes_through(model: Any, handle: Handle) -> None:
    model.model.layers[1].train()
    model.generate(prompt(2 * CHUNK), max_new_tokens=2, do_sample=False)
    assert handle.last.bypass is Bypass.TRAINING


def test_foreign_hooks_pass_through(model: Any, handle: Handle) -> None:
    hook = model.model.layers[0].register_forward_hook(lambda module, inputs, output: output)
    model.generate(prompt(2 * CHUNK), max_new_tokens=2, do_sample=False)
    assert handle.last.bypass is Bypass.HOOKS
    hook.remove()
    model.generate(prompt(2 * CHUNK), max_new_tokens=2, do_sample=False)
    assert handle.last.bypass is None


def test_autocast_passes_through(model: Any, handle: Handle) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(prompt(2 * CHUNK), max_new_tokens=2, do_sample=False)
    assert handle.last.bypass is Bypass.AUTOCAST


def test_a_model_converted_later_passes_through(model: Any, handle: Handle) -> None:
    ids = prompt(3 * CHUNK + 2)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model.to(torch.float64)
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert handle.last.bypass is Bypass.MOVED
    assert torch.equal(out, handle.original(ids, max_new_tokens=4, do_sample=False))


class FakeTuner(torch.nn.Module):
    """What a PEFT layer looks like from outside."""

    active_adapters = ("default",)

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Any) -> Any:
        return self.base_layer(x) * 1.5


def test_an_adapter_added_later_passes_through(model: Any, handle: Handle) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj = FakeTuner(attention.k_proj).eval()
    model.generate(prompt(2 * CHUNK), max_new_tokens=2, do_sample=False)
    assert handle.last.bypass is Bypass.ADAPTER


# -- identity ------------------------------------------------------------------------------------------------------
def test_salts_never_share(tmp_path: Path) -> None:
    model, ids = tiny(), prompt(3 * CHUNK + 2)
    for salt in (None, "", "a", "b"):
        with attach(model, config(tmp_path), salt=salt) as handle:
            model.generate(ids, max_new_tokens=1, do_sample=False)
            assert handle.last.reused_tokens == 0
            assert handle.last.miss == "not_stored"
    with attach(model, config(tmp_path), salt="a") as handle:
        model.generate(ids, max_new_tokens=1, do_sample=False)
        assert handle.last.reused_tokens == 3 * CHUNK


def _optimizer_step(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.add_(0.25)


def _write_through_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.01)


def _replace_parameter(model: Any) -> None:
    projection = model.model.layers[2].self_attn.v_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach() * 2)


def _one_element(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1


def _attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def _rope(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


@pytest.mark.parametrize(
    "change", [_optimizer_step, _write_through_data, _replace_parameter, _one_element, _attention, _rope]
)
def test_a_changed_model_never_sees_old_kv(change: Any, model: Any, handle: Handle) -> None:
    ids = prompt(3 * CHUNK + 2)
    model.generate(ids, max_new_tokens=1, do_sample=False)
    change(model)
    tokens, logits = answer(model, ids)
    assert handle.last.reused_tokens == 0
    handle.detach()
    plain, plain_logits = answer(model, ids)
    assert tokens == plain
    torch.testing.assert_close(logits, plain_logits, rtol=1e-5, atol=1e-5)


def test_weights_that_change_during_a_call_are_not_stored(model: Any, handle: Handle) -> None:
    class Update(transformers.LogitsProcessor):  # type: ignore[misc]
        def __call__(self, ids: Any, scores: Any) -> Any:
            _optimizer_step(model)
            return scores

    processors = transformers.LogitsProcessorList([Update()])
    model.generate(prompt(3 * CHUNK), max_new_tokens=2, do_sample=False, logits_processor=processors)
    assert handle.counts["stored_chunks"] == 0
    assert handle.counts["errors"] == 1


def test_other_weights_and_settings_have_other_identities() -> None:
    seen = set()
    models = [tiny(), tiny(seed=1), tiny(rms_norm_eps=1e-3), tiny(dtype=torch.bfloat16), tiny("Qwen2")]
    for model in models:
        with attach(model, config()) as handle:
            seen.add(handle.identity().digest)
    with attach(tiny(), config()) as handle:
        assert handle.identity().digest in seen
    assert len(seen) == len(models)


def test_the_path_of_a_model_is_not_its_identity(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "here")
    digests = set()
    for path in ("here", "there"):
        copy_ = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "here")
        copy_.config._name_or_path = str(tmp_path / path)
        with attach(copy_, config()) as handle:
            digests.add(handle.identity().digest)
    assert len(digests) == 1


def test_a_tokenizer_takes_part_in_the_identity(model: Any) -> None:
    class Tokenizer:
        def __init__(self, words: dict[str, int]) -> None:
            self._words = words

        def get_vocab(self) -> dict[str, int]:
            return self._words

    digests = []
    for tokenizer in (None, Tokenizer({"a": 1, "b": 2}), Tokenizer({"b": 2, "a": 1}), Tokenizer({"a": 2, "b": 1})):
        with attach(model, config(), tokenizer=tokenizer) as handle:
            digests.append(handle.identity().digest)
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3


# -- what is refused -----------------------------------------------------------------------------------------------
def _encoder_decoder() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def _mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    )


def _multimodal() -> Any:
    text = transformers.LlamaConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))


def _adapted() -> Any:
    model = tiny()
    model.model.layers[0].self_attn.q_proj = FakeTuner(model.model.layers[0].self_attn.q_proj)
    return model


def _looks_ahead() -> Any:
    class LooksAhead(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **more: Any) -> Any:
            embeds = self.get_input_embeddings()(input_ids)
            return super().forward(inputs_embeds=embeds + embeds.mean(dim=1, keepdim=True), **more)

    torch.manual_seed(0)
    return LooksAhead(transformers.LlamaConfig(**SIZES)).eval()


class OwnGenerate(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)


def _linear() -> Any:
    return tiny(
        "Qwen3Next", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip


REFUSED: dict[str, tuple[Any, str]] = {
    "linear attention": (_linear, "layers of kind LinearAttentionLayer"),
    "sparse attention": (lambda: tiny("DeepseekV32", **ARCHITECTURES["DeepseekV3"]), "DynamicIndexedLayer"),
    "encoder-decoder": (_encoder_decoder, "encoder-decoder"),
    "state space": (_mamba, "layers of kind|DynamicCache"),
    "multimodal": (_multimodal, "multimodal"),
    "dynamic rope": (
        lambda: tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        "rope type 'dynamic'",
    ),
    "own generate": (lambda: OwnGenerate(transformers.LlamaConfig(**SIZES)), "its own `generate`"),
    "adapter": (_adapted, "merge_and_unload"),
    "not causal": (_looks_ahead, "not causal"),
    "meta device": (lambda: tiny().to("meta"), "one CUDA device"),
    "not a model": (lambda: torch.nn.Linear(2, 2), "not a Transformers model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_refused_with_the_reason(case: str) -> None:
    make, reason = REFUSED[case]
    model = make()
    with pytest.raises(Unsupported, match=reason):
        attach(model, config())
    assert "generate" not in model.__dict__


def test_probe_measures_the_geometry(model: Any) -> None:
    geometry = probe(model)
    assert (geometry.num_layers, geometry.kv_heads, geometry.head_dim) == (3, 2, 16)
    assert geometry.dtype == torch.float32
    assert geometry.layout(CHUNK).chunk_bytes == 3 * 2 * CHUNK * 2 * 16 * 4
    model.train()
    probe(model)
    assert model.training


def test_attaching_twice_is_refused(model: Any, handle: Handle) -> None:
    with pytest.raises(Unsupported, match="wrapped already"):
        attach(model, config())
    assert model.generate.handle is handle


def test_a_bad_configuration_leaves_the_model_alone(model: Any) -> None:
    with pytest.raises(ConfigError):
        attach(model, config(dram="1KiB"))
    assert "generate" not in model.__dict__


# -- life ----------------------------------------------------------------------------------------------------------
def test_detach_restores_generate_and_attach_works_again(model: Any) -> None:
    own = type(model).generate
    handle = attach(model, config())
    assert model.generate.__wrapped__.__func__ is own
    handle.detach()
    handle.detach()
    assert model.generate.__func__ is own
    handle.close()
    handle.close()
    with attach(model, config()):
        pass
    assert "generate" not in model.__dict__


def test_a_copied_model_starts_without_a_handle(model: Any, handle: Handle) -> None:
    twin = copy.deepcopy(model)
    calls = handle.counts["calls"]
    with torch.no_grad():
        twin.lm_head.weight.mul_(-1)
    ids = prompt(2 * CHUNK)
    out = twin.generate(ids, max_new_tokens=3, do_sample=False)
    assert handle.counts["calls"] == calls
    assert not torch.equal(out, model.generate(ids, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("method", ["fetch", "store", "close"])
def test_a_failing_cache_only_costs_recomputation(
    method: str, model: Any, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(3 * CHUNK + 2)
    plain = handle.original(ids, max_new_tokens=3, do_sample=False)
    if method == "close":
        handle.pipeline.close()
    else:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(handle.pipeline, method, fail)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), plain)
    assert handle.counts["errors"] == 1
    assert handle.last.bypass is (None if method == "store" else Bypass.ERROR)


# -- batches -------------------------------------------------------------------------------------------------------
def batch(*rows: Any) -> dict[str, Any]:
    """Left-padded rows and their mask."""
    width = max(row.shape[1] for row in rows)
    pads = [width - row.shape[1] for row in rows]
    ids = torch.cat([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.cat([torch.cat((torch.zeros(1, p), torch.ones(1, width - p)), dim=1) for p in pads]).long()
    return {"input_ids": ids, "attention_mask": mask}


def answers(generate: Any, inputs: dict[str, Any], new: int = 6, **more: Any) -> list[list[int]]:
    out = generate(**inputs, do_sample=False, max_new_tokens=new, **{"pad_token_id": 0, **more})
    tokens: list[list[int]] = out[:, inputs["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mistral", "Gemma2", "DeepseekV3"])
@pytest.mark.parametrize("paged", [True, False])
def test_batches_reuse_what_every_row_has(kind: str, paged: bool) -> None:
    model = tiny(kind, **ARCHITECTURES[kind])
    document = prompt(4 * CHUNK)
    a, b = (torch.cat([document, prompt(n, seed=n)], dim=1) for n in (9, 21))
    short, other = prompt(CHUNK + 4, seed=5), prompt(3 * CHUNK + 7, seed=6)
    with attach(model, config()) as handle:
        if not paged:
            handle.mover.paged = False

        def ask(*rows: Any) -> tuple[int, tuple[str, ...]]:
            inputs = batch(*rows)
            assert answers(model.generate, inputs) == answers(handle.original, inputs)
            assert handle.last.bypass is None and handle.counts["errors"] == 0
            assert handle.last.prompt_tokens == sum(row.shape[1] for row in rows)
            return handle.last.reused_tokens, handle.last.sources

        assert ask(a, b)[0] == 0
        # `b` is 12 longer than `a`, whose 12 columns of padding come first: 64 + 12 columns, of `b` 76 tokens.
        reused, sources = ask(a, b)
        assert reused == 4 * CHUNK + 4 * CHUNK + 12
        assert sources == ("dram",) * 4 + ("dram",) * 5
        # What the batch stored serves single prompts, and the other way round.
        assert ask(b) == (5 * CHUNK, ("dram",) * 5)
        # Nothing of `other` is stored: only its padding is there for `a` to use.
        assert ask(a, other) == (18, ("dram",) * 2 + (COMPUTED,) * (2 + 3))
        assert ask(other)[0] == 3 * CHUNK
        # `short` ends its padding after the last column that `a` has stored: it is computed whole.
        assert ask(a, b, other, short)[0] > 0
        assert ask(short, short, short)[0] == 3 * CHUNK
        handle.pipeline.check()


def test_rows_that_end_early_are_stored_to_their_end(model: Any, handle: Handle) -> None:
    """What `generate` fills up with is no part of an answer."""
    rows = [prompt(2 * CHUNK + 2, seed=seed) for seed in (1, 2)]
    plain = answers(handle.original, batch(*rows), new=40)
    stop = plain[0][3]
    inputs = batch(*rows)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=40, eos_token_id=stop, pad_token_id=0)
    assert out[0, 2 * CHUNK + 2 :].tolist()[:5] == [*plain[0][:4], 0]
    lengths = [int((row != 0).sum()) if 0 in row else len(row) - 1 for row in out]
    assert handle.last.stored_chunks == sum(length // CHUNK for length in lengths)
    for row, length in zip(out, lengths, strict=True):
        longer = torch.cat([row[None, :length], prompt(CHUNK, seed=8)], dim=1)
        assert torch.equal(
            model.generate(longer, do_sample=False, max_new_tokens=4),
            handle.original(longer, do_sample=False, max_new_tokens=4),
        )
        assert handle.last.reused_tokens == length // CHUNK * CHUNK


def test_a_prompt_with_padding_in_front_is_the_prompt(model: Any, handle: Handle) -> None:
    ids = prompt(3 * CHUNK + 5)
    model.generate(ids, do_sample=False, max_new_tokens=1)
    padded = batch(ids, prompt(3 * CHUNK + 12))
    one = {name: tensor[:1] for name, tensor in padded.items()}
    assert answers(model.generate, one) == answers(handle.original, one)
    assert handle.last.reused_tokens == 3 * CHUNK
    # The mask that `generate` infers from the padding token.
    inferred = {"input_ids": one["input_ids"]}
    assert answers(model.generate, inferred) == answers(handle.original, inferred)
    assert handle.last.reused_tokens == 3 * CHUNK


def test_padding_behind_or_between_passes_through(model: Any, handle: Handle) -> None:
    ids = prompt(2 * CHUNK)
    for masked in (slice(-3, None), slice(5, 7), slice(None)):
        mask = torch.ones_like(ids)
        mask[0, masked] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert answers(model.generate, inputs) == answers(handle.original, inputs)
        assert handle.last.bypass is Bypass.PADDING
    assert handle.counts["stored_chunks"] == 0


def test_padding_of_a_model_that_counts_columns_passes_through() -> None:
    model = tiny("Bloom", n_layer=2, n_head=4)
    with attach(model, config()) as handle:
        rows = [prompt(2 * CHUNK + 2), prompt(2 * CHUNK + 2, seed=2)]
        for reused in (0, 4 * CHUNK):
            assert answers(model.generate, batch(*rows)) == answers(handle.original, batch(*rows))
            assert (handle.last.bypass, handle.last.reused_tokens) == (None, reused)
        model.generate(**batch(*rows, prompt(3 * CHUNK)), max_new_tokens=1)
        assert handle.last.bypass is Bypass.PADDING


def test_a_batch_that_memory_cannot_hold_is_computed(model: Any) -> None:
    rows = [prompt(4 * CHUNK + 1, seed=seed) for seed in range(4)]
    with attach(model, config(dram="240KiB")) as handle:
        for _ in range(3):
            assert answers(model.generate, batch(*rows)) == answers(handle.original, batch(*rows))
            handle.pipeline.check(idle=True)
        assert handle.counts["errors"] == 0


# -- other caches --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Llama", "DeepseekV3"])
def test_static_caches_are_filled_and_stored(kind: str) -> None:
    model = tiny(kind, **ARCHITECTURES[kind])
    with attach(model, config()) as handle:
        check_static(model, handle)


def check_static(model: Any, handle: Handle) -> None:
    ids = prompt(3 * CHUNK + 2)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
    plain = handle.original(ids, cache_implementation="static", **options)
    for reused in (0, 3 * CHUNK):
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), plain)
        assert (handle.last.bypass, handle.last.reused_tokens) == (None, reused)
    assert torch.equal(model.generate(ids, cache_implementation="dynamic", **options), plain)
    assert handle.last.reused_tokens == 3 * CHUNK, "one store for both kinds"

    own = transformers.StaticCache(config=model.config, max_cache_len=80)
    for _ in range(2):
        assert torch.equal(model.generate(ids, past_key_values=own, **options), plain)
        assert (handle.last.bypass, handle.last.reused_tokens) == (None, 3 * CHUNK)
        assert int(own.get_seq_length()) == ids.shape[1] + 4
        own.reset()
    rows = batch(ids, prompt(2 * CHUNK + 7, seed=3))
    for _ in range(2):
        static = answers(model.generate, rows, cache_implementation="static")
        assert static == answers(handle.original, rows, cache_implementation="static")
        assert handle.last.bypass is None
    assert handle.last.reused_tokens > 4 * CHUNK
    assert handle.counts["errors"] == 0


def test_a_callers_empty_cache_is_filled_and_a_used_one_is_not(model: Any, handle: Handle) -> None:
    ids = prompt(3 * CHUNK + 2)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}
    plain = handle.original(ids, **options)
    model.generate(ids, **options)
    own = transformers.DynamicCache(config=model.config)
    assert torch.equal(model.generate(ids, past_key_values=own, **options), plain)
    assert handle.last.reused_tokens == 3 * CHUNK
    longer = torch.cat([plain, prompt(4, seed=3)], dim=1)
    assert torch.equal(model.generate(longer, past_key_values=own, **options), handle.original(longer, **options))
    assert handle.last.bypass is Bypass.OWN_CACHE
    too_small = transformers.StaticCache(config=model.config, max_cache_len=10)
    with pytest.raises(IndexError):
        model.generate(ids, past_key_values=too_small, **options)
    assert handle.last.bypass is Bypass.OWN_CACHE


@pytest.mark.parametrize("static", [True, False])
def test_a_callers_cache_is_left_empty_when_reading_fails(
    static: bool, model: Any, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(3 * CHUNK + 2)
    plain = handle.original(ids, do_sample=False, max_new_tokens=3)
    model.generate(ids, do_sample=False, max_new_tokens=3)
    own = (
        transformers.StaticCache(config=model.config, max_cache_len=80)
        if static
        else transformers.DynamicCache(config=model.config)
    )
    last = own.layers[-1]
    initialize = last.lazy_initialization

    def fail(*args: Any) -> None:
        monkeypatch.setattr(last, "lazy_initialization", initialize)
        raise MemoryError

    monkeypatch.setattr(last, "lazy_initialization", fail)
    assert torch.equal(model.generate(ids, past_key_values=own, do_sample=False, max_new_tokens=3), plain)
    assert handle.last.bypass is Bypass.ERROR


def test_static_sliding_windows_pass_through() -> None:
    model = tiny("Mistral", sliding_window=24)
    ids = prompt(3 * CHUNK)
    with attach(model, config()) as handle:
        out = model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
        assert handle.last.bypass is Bypass.CACHE_KIND
        assert torch.equal(out, handle.original(ids, max_new_tokens=3, do_sample=False, cache_implementation="static"))


def test_a_sliding_window_is_left_as_generate_leaves_it() -> None:
    model = tiny("Mistral", sliding_window=24)
    ids = prompt(3 * CHUNK)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with attach(model, config()) as handle:
        plain = handle.original(ids, **options).past_key_values
        for _ in range(2):
            cache = model.generate(ids, **options).past_key_values
            for a, b in zip(cache.layers, plain.layers, strict=True):
                torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)
                assert (a.cumulative_length, a.record_past) == (b.cumulative_length, b.record_past)
        assert handle.last.reused_tokens == 2 * CHUNK


def test_a_default_of_hybrid_is_none(model: Any, handle: Handle) -> None:
    """What Gemma's checkpoints say, and `generate` ignores."""
    model.generation_config.cache_implementation = "hybrid"
    model.generate(prompt(2 * CHUNK), max_new_tokens=2)
    assert handle.last.bypass is None
    model.generation_config.cache_implementation = "static"
    model.generate(prompt(2 * CHUNK), max_new_tokens=2)
    assert handle.last.bypass is Bypass.CACHE_KIND


# -- the cost rule -------------------------------------------------------------------------------------------------
def test_prefill_is_measured_where_the_cost_rule_wants_it(model: Any) -> None:
    with attach(model, {**config(), "recompute": {"tokens_per_s": "measure"}}) as handle:
        recompute = handle.pipeline.recompute
        model.generate(prompt(100, seed=2), max_new_tokens=2, do_sample=False)
        assert recompute.seconds_per_token is None, "too short to say anything"
        model.generate(prompt(300), max_new_tokens=30, do_sample=False)
        first = recompute.seconds_per_token
        assert first is not None and first > 0
        assert not model._forward_hooks
        model.generate(prompt(300), max_new_tokens=2, do_sample=False)
        assert handle.last.reused_tokens == 288
        assert recompute.seconds_per_token == first, "a call with reuse is not measured"
    with attach(model, config()) as handle:
        model.generate(prompt(300), max_new_tokens=2, do_sample=False)
        assert handle.pipeline.recompute.seconds_per_token is None


def test_a_tier_slower_than_computing_is_left_out(model: Any, tmp_path: Path) -> None:
    ids = prompt(20 * CHUNK)
    with attach(model, config(tmp_path)) as handle:
        model.generate(ids, max_new_tokens=1)
    with attach(model, {**config(tmp_path), "recompute": {"tokens_per_s": 1e12}}) as handle:
        model.generate(ids, max_new_tokens=1)
        assert (handle.last.reused_tokens, handle.last.miss) == (0, "cost")


# -- disk and restart ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", ["none", "flip", "truncate", "zero"])
def test_a_damaged_disk_is_recomputed(damage: str, tmp_path: Path) -> None:
    model, ids = tiny(), prompt(5 * CHUNK + 3)
    plain = answer(model, ids)
    with attach(model, config(tmp_path)) as handle:
        answer(model, ids)
        assert handle.pipeline.flush(10.0)
    touched = 0
    for path in (tmp_path / "kv").rglob("*"):
        if path.is_file() and path.stat().st_size > 28_000 and damage != "none":
            data = bytearray(path.read_bytes())
            # A chunk has 24 KiB of payload: every chunk is hit somewhere.
            if damage == "flip":
                data[5000::8192] = bytes(b ^ 0xFF for b in data[5000::8192])
            path.write_bytes({"flip": data, "truncate": data[: len(data) // 2], "zero": bytes(len(data))}[damage])
            touched += 1
    assert bool(touched) is (damage != "none")
    with attach(model, config(tmp_path)) as handle:
        tokens, logits = answer(model, ids)
        assert tokens == plain[0]
        torch.testing.assert_close(logits, plain[1], rtol=1e-4, atol=1e-4)
        if damage == "none":
            assert handle.last.sources == ("disk",) * 5
        elif damage in ("flip", "zero"):
            assert handle.last.sources == (COMPUTED,) * 5
            assert handle.last.miss is not None
        handle.pipeline.check()


PROCESS = """
import json, sys
import torch, transformers
from test_transformers import answer, attach, config, prompt, tiny
from pathlib import Path
model = tiny()
result = []
with attach(model, config(Path(sys.argv[1]))) as handle:
    for seed in json.loads(sys.argv[2]):
        ids = torch.cat([prompt(64), prompt(5, seed=seed)], dim=1)
        result.append([answer(model, ids)[0], list(handle.last.sources)])
print(json.dumps(result))
"""


def test_three_processes_share_one_disk(tmp_path: Path) -> None:
    def process(*seeds: int) -> list[list[Any]]:
        command = [sys.executable, "-c", PROCESS, str(tmp_path), json.dumps(seeds)]
        # The child finds this file and what it imports where pytest found them.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        result: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
        return result

    model = tiny()
    plain = [answer(model, torch.cat([prompt(64), prompt(5, seed=seed)], dim=1))[0] for seed in (2, 3)]
    assert process(2) == [[plain[0], [COMPUTED] * 4]]
    assert process(2, 3) == [[plain[0], ["disk"] * 4], [plain[1], ["dram"] * 4]]
    assert process(3) == [[plain[1], ["disk"] * 4]]


# -- a real model --------------------------------------------------------------------------------------------------
def real_model() -> Path | None:
    candidates = (Path(__file__).parents[2] / ".models" / NAME, default_directory() / NAME)
    return next((path for path in candidates if path.is_dir()), None)


def quiet() -> AbstractContextManager[Any]:
    transformers.utils.logging.disable_progress_bar()
    return nullcontext()


@pytest.mark.skipif(real_model() is None, reason="no model here: run `lmcachectl model --to .models`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_model_answers_the_same_off_cold_warm_and_after_restart(dtype: Any, tmp_path: Path) -> None:
    path = real_model()
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "The cache keeps what the model has read. It must give back exactly that, or nothing. " * 24
    ids = tokenizer(text + "In short: the cache", return_tensors="pt").input_ids
    settings = {**config(tmp_path, dram="256MiB"), "chunk_tokens": 128}
    settings["tiers"][1]["capacity"] = "512MiB"
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    chunks = (ids.shape[1] - 1) // 128
    assert chunks >= 3
    # 16-bit arithmetic may break ties differently when a prompt is computed in two parts, with or without a cache:
    # the control keeps the prefix in the engine's own cache.
    kept = model.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True).past_key_values
    kept.crop(chunks * 128 - kept.get_seq_length())
    control = model.generate(ids, past_key_values=kept, max_new_tokens=12, do_sample=False)
    with attach(model, settings, tokenizer=tokenizer) as handle:
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), plain)
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), control)
        assert handle.last.sources[:chunks] == ("dram",) * chunks
        assert handle.pipeline.flush(30.0)
    with attach(model, settings, tokenizer=tokenizer) as handle:
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), control)
        assert handle.last.sources[:chunks] == ("disk",) * chunks
    if dtype == torch.float32:
        assert torch.equal(plain, control)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: Any, tmp_path: Path) -> None:
    model = tiny(dtype=dtype).to("cuda")
    ids = prompt(5 * CHUNK + 3).to("cuda")
    kept = model.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True).past_key_values
    kept.crop(5 * CHUNK - kept.get_seq_length())
    stored = [(layer.keys.clone(), layer.values.clone()) for layer in kept.layers]
    control = model.generate(ids, past_key_values=kept, max_new_tokens=6, do_sample=False)
    for source in ("computed", "disk"):
        with attach(model, config(tmp_path)) as handle:
            model.generate(ids, max_new_tokens=6, do_sample=False)
            assert handle.last.sources == (source,) * 5
            out = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
            assert handle.last.sources == ("dram",) * 5
            assert torch.equal(out.sequences, control)
            for layer, (keys, values) in zip(out.past_key_values.layers, stored, strict=True):
                assert torch.equal(layer.keys[:, :, : 5 * CHUNK], keys)
                assert torch.equal(layer.values[:, :, : 5 * CHUNK], values)
            assert handle.counts["errors"] == 0


# -- tenants -------------------------------------------------------------------------------------------------------
def test_tenants_of_one_model_never_share_and_no_tenant_is_not_cached(model: Any) -> None:
    tenancy = {"secret": "sixteen letters!", "quota": "50%"}
    ids = prompt(3 * CHUNK + 5)
    plain = answer(model, ids)[0]
    with attach(model, {**config(), "tenancy": tenancy}, tenant="acme") as handle:
        found = []
        for tenant in ("acme", "acme", "other", "other", None, "acme"):
            handle.tenant = tenant
            assert answer(model, ids)[0] == plain
            found.append((handle.last.bypass, handle.last.reused_tokens // CHUNK))
        assert found == [(None, 0), (None, 3), (None, 0), (None, 3), (Bypass.TENANT, 0), (None, 3)]
        assert set(handle.pipeline.stats()["tiers"]["dram"]["tenants"]) == {"acme", "other"}
