"""What the vLLM adapter reads of vLLM: API, pages, identity and requests; on the installed vLLM, without an engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import LOST, FakeCuda, installed

from lmcache_core.errors import ConfigError, Unsupported
from lmcache_core.layout import KVLayout

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM and what it imports
    import torch
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.core.sched.output import KVConnectorBlockState
    from vllm.v1.kv_cache_interface import CrossAttentionSpec, FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.outputs import KVConnectorOutput

    from lmcache_core.adapters import _vllm_compat as compat
    from lmcache_core.adapters import _weights
    from lmcache_core.adapters._vllm_telemetry import Stats
    from lmcache_core.adapters.vllm import LMCacheCoreConnector, PagesMetadata, _settings

BLOCKS, HEADS, BLOCK, DIM, LAYERS = 12, 2, 32, 32, 3


class Config(SimpleNamespace):
    """A stand-in for one of Hugging Face's configurations."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def engine_config(**changes: Any) -> Any:
    """What the adapter reads of `VllmConfig`; `changes` are dotted paths with `__` for the dots."""
    hf = Config(
        hidden_size=64, num_hidden_layers=LAYERS, rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        _name_or_path="x", transformers_version="5",
    )  # fmt: skip
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            world_size=1,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            is_producer=True,
        ),
        model_config=SimpleNamespace(
            runner_type="generate",
            is_diffusion=False,
            is_prefix_caching_supported=True,
            dtype=torch.float32,
            quantization=None,
            model="nowhere",
            served_model_name="demo",
            revision=None,
            seed=0,
            max_model_len=1024,
            hf_config=hf,
            hf_text_config=hf,
        ),
        cache_config=SimpleNamespace(kv_cache_layout="LBHNC", cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="dummy"),
        speculative_config=None,
        shutdown_timeout=0,
        kv_events_config=None,
        compilation_config=SimpleNamespace(
            static_forward_context={f"model.layers.{i}.attn": SimpleNamespace(isa="vec") for i in range(LAYERS)}
        ),
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config={}, is_kv_producer=True, kv_load_failure_policy="recompute"
        ),
    )
    for path, value in changes.items():
        *parents, last = path.split("__")
        target: Any = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    return config


def spec(**changes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **{"block_size": BLOCK, "num_kv_heads": HEADS, "head_size": DIM, "dtype": torch.float32, **changes}
    )


def cache_config(*specs: Any) -> Any:
    specs = specs or (spec(),)
    names = [f"model.layers.{i}.attn" for i in range(LAYERS)]
    groups = [SimpleNamespace(kv_cache_spec=s, layer_names=names[i :: len(specs)]) for i, s in enumerate(specs)]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=BLOCKS)


def memory(*, block_major: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """KV of three layers as vLLM allocates it: one allocation, a view for each layer."""
    shape = (BLOCKS, LAYERS, HEADS, BLOCK, 2 * DIM) if block_major else (LAYERS, BLOCKS, HEADS, BLOCK, 2 * DIM)
    whole = torch.arange(BLOCKS * LAYERS * HEADS * BLOCK * 2 * DIM, dtype=torch.float32).reshape(shape).to(dtype)
    # A dictionary in another order than the layers: order must come from the names.
    return {f"model.layers.{i}.attn": whole[:, i] if block_major else whole[i] for i in reversed(range(LAYERS))}


# -- API ---------------------------------------------------------------------------------------------------------
def test_installed_vllm_is_known() -> None:
    compat.check_api()


RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "vllm_api.json").read_text())


@pytest.mark.parametrize("version", RECORDED)
def test_every_supported_vllm_is_known(version: str) -> None:
    """On what was read from each release's sources, so that none has to be installed; see `make vllm-versions`."""
    assert compat.differences(RECORDED[version]) == []


def test_what_was_recorded_is_what_is_installed() -> None:
    recorded, installed = RECORDED[vllm.__version__.partition("+")[0]], compat.installed_api()
    assert recorded["abstract"] == installed["abstract"]
    for name, parameters in installed["methods"].items():
        assert recorded["methods"][name] == parameters
    for kind, fields in installed["fields"].items():
        assert set(recorded["fields"][kind]) == set(fields)
    assert recorded["request"] == [name for name in installed["request"] if name != "self"]


def test_every_difference_in_the_api_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, request: Any, tokens: int) -> None: ...

    monkeypatch.setattr(KVConnectorBase_V1, "get_num_new_matched_tokens", changed)
    monkeypatch.delattr(KVConnectorBase_V1, "build_connector_worker_meta")
    abstract = KVConnectorBase_V1.__abstractmethods__ | {"brand_new"}
    monkeypatch.setattr(KVConnectorBase_V1, "__abstractmethods__", abstract)
    monkeypatch.setattr(compat, "_REQUEST", ("cache_salt", "no_such_field"))
    with pytest.raises(Unsupported) as error:
        compat.check_api()
    text = str(error.value)
    assert "get_num_new_matched_tokens takes (request, tokens), expected (request, num_computed_tokens)" in text
    assert "build_connector_worker_meta is missing" in text
    assert "brand_new is a new abstract method" in text
    assert "Request has no no_such_field" in text
    assert compat.TESTED in text


# -- pages -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_are_described_by_their_strides(block_major: bool, dtype: torch.dtype) -> None:
    kv = memory(block_major=block_major, dtype=dtype)
    config = engine_config(model_config__dtype=dtype)
    (pages,) = compat.describe_pages(config, cache_config(spec(dtype=dtype)), kv)
    assert pages.bases == tuple(kv[f"model.layers.{i}.attn"].data_ptr() for i in range(LAYERS))
    page = HEADS * BLOCK * 2 * DIM * dtype.itemsize
    assert pages.block_stride == page * (LAYERS if block_major else 1)
    assert (pages.layout.block_bytes, pages.layout.blocks, pages.layout.num_layers) == (page, 1, LAYERS)
    assert pages.layout.packing.startswith("vllm-cpu/1/LBHNC/vec/")
    before = {name: tensor.clone() for name, tensor in kv.items()}
    compat.prove_copies(pages)
    assert all(torch.equal(tensor, before[name]) for name, tensor in kv.items())


def test_packing_is_told_by_what_the_kernel_writes() -> None:
    def packing(isa: str, **changes: Any) -> str:
        layers = {f"model.layers.{i}.attn": SimpleNamespace(isa=isa) for i in range(LAYERS)}
        config = engine_config(compilation_config__static_forward_context=layers)
        return compat.describe_pages(config, cache_config(spec(**changes)), memory())[0].layout.packing

    assert packing("vec") == packing("vec")
    assert packing("vec") != packing("vec16")
    with pytest.raises(Unsupported, match="cannot be asked"):
        packing("no such instructions")


@pytest.mark.parametrize(
    "field, value",
    [("bases", lambda p: p.bases[::-1]), ("block_stride", lambda p: p.block_stride * 2), ("num_blocks", lambda p: 6)],
)
def test_a_wrong_description_is_found_by_copying(field: str, value: Callable[[compat.Pages], Any]) -> None:
    (pages,) = compat.describe_pages(engine_config(), cache_config(), memory())
    wrong = dataclasses.replace(pages, **{field: value(pages)})
    if field == "block_stride":
        wrong = dataclasses.replace(wrong, num_blocks=BLOCKS // 2)
    if field == "num_blocks":
        compat.prove_copies(wrong)  # fewer blocks than there are is safe
        return
    with pytest.raises(Unsupported, match="did not give the bytes"):
        compat.prove_copies(wrong)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallel"),
        ({"model_config__runner_type": "pooling"}, "later tokens"),
        ({"model_config__is_diffusion": True}, "later tokens"),
        ({"model_config__is_prefix_caching_supported": False}, "later tokens"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "eagle3"),
        (
            {"speculative_config": SimpleNamespace(method="ngram"), "parallel_config__pipeline_parallel_size": 2},
            "several pipeline ranks",
        ),
        ({"cache_config__calculate_kv_scales": True}, "calculate_kv_scales"),
        ({"compilation_config__static_forward_context": {}}, "page format"),
    ],
)
def test_engines_that_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        compat.describe_pages(engine_config(**changes), cache_config(), memory())


def test_ngram_drafts_keep_no_kv() -> None:
    compat.describe_pages(engine_config(speculative_config=SimpleNamespace(method="ngram")), cache_config(), memory())


def _strided(kv: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in kv.items()}


@pytest.mark.parametrize(
    "specs, change, why",
    [
        ((spec(), spec(block_size=16)), dict, r"blocks of \[16, 32\] tokens"),
        ((CrossAttentionSpec(BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32),), dict, "CrossAttention"),
        ((), lambda kv: kv | {"draft.attn": kv["model.layers.0.attn"]}, "draft.attn"),
        ((spec(non_causal=True),), dict, "non-causal"),
        ((spec(head_size_v=16),), dict, "packed in a way"),
        ((spec(num_kv_heads=4),), dict, "has KV of shape"),
        ((), lambda kv: dict.fromkeys(kv, kv["model.layers.0.attn"]), "share their KV"),
        ((), lambda kv: kv | {"model.layers.1.attn": kv["model.layers.1.attn"].double()}, "layers.1"),
        ((), lambda kv: {name: tensor.double() for name, tensor in kv.items()}, "float64"),
        ((), lambda kv: {name: tensor.to("meta") for name, tensor in kv.items()}, "meta memory"),
        ((), _strided, "not of the layout LBHNC"),
        ((), lambda kv: {n: t[:, :, : BLOCK - 1] for n, t in kv.items()}, "of shape"),
        ((), lambda kv: {n: torch.cat([t, t], 3)[..., : 2 * DIM] for n, t in kv.items()}, "one run of memory"),
    ],
)  # fmt: skip
def test_pages_that_are_refused(specs: tuple[Any, ...], change: Callable[[Any], Any], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        compat.describe_pages(engine_config(), cache_config(*specs), change(memory()))


# -- pages on a GPU ----------------------------------------------------------------------------------------------
class OnGpu(torch.Tensor):
    """Host memory that says it is a GPU's."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


LAYOUTS = ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "LHBNC", "BHLNC"]


def gpu_memory(layout: str = "LBNHC", dtype: torch.dtype = torch.bfloat16, split: int = 1) -> dict[str, torch.Tensor]:
    """KV of three layers in one allocation, nested as the layout's name says."""
    sizes = {"L": LAYERS, "B": BLOCKS * split, "H": HEADS, "N": BLOCK // split, "C": 2 * DIM}
    shape = [sizes[letter] for letter in layout]
    whole = (torch.arange(LAYERS * BLOCKS * HEADS * BLOCK * 2 * DIM) % 251).to(dtype).reshape(shape)
    logical = whole.permute(*(layout.index(letter) for letter in "LBHNC"))
    return {f"model.layers.{i}.attn": logical[i].as_subclass(OnGpu) for i in range(LAYERS)}


def gpu_config(layout: str = "LBNHC", backends: tuple[str, ...] = ("FLASH_ATTN",), **changes: Any) -> Any:
    kinds = [SimpleNamespace(get_name=partial(str, name)) for name in backends]
    layers = {
        f"model.layers.{i}.attn": SimpleNamespace(get_attn_backend=partial(kinds.__getitem__, i % len(kinds)))
        for i in range(LAYERS)
    }
    return engine_config(
        compilation_config__static_forward_context=layers,
        cache_config__kv_cache_layout=layout,
        model_config__dtype=torch.bfloat16,
        **changes,
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The fake CUDA library, and torch as far as the adapter asks it for streams and pinned memory."""
    with installed() as fake:
        plain = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **more: plain(*size, **more))
        stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        yield fake


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_gpu_is_copied_by_its_name(gpu: FakeCuda, layout: str) -> None:
    kv = gpu_memory(layout)
    (pages,) = compat.describe_pages(gpu_config(layout), cache_config(spec(dtype=torch.bfloat16)), kv)
    assert pages.device == 0
    assert pages.layout.packing == f"vllm-cuda/1/{layout}/FLASH_ATTN"
    before = {name: tensor.clone() for name, tensor in kv.items()}
    compat.prove_copies(pages)
    assert all(torch.equal(tensor, before[name]) for name, tensor in kv.items())
    # A slot has a page in the order of memory: [H, N, C] or [N, H, C].
    slot = np.zeros(pages.layout.chunk_bytes, np.uint8)
    compat.paged_kv(pages, pages.layout).gather([5], [slot.ctypes.data])
    own = [tensor[5] if layout.index("H") < layout.index("N") else tensor[5].transpose(0, 1) for tensor in kv.values()]
    assert np.array_equal(slot, torch.stack(own).contiguous().reshape(-1).view(torch.uint8).numpy())


def test_blocks_that_the_kernels_split_are_put_together(gpu: FakeCuda) -> None:
    (pages,) = compat.describe_pages(gpu_config(), cache_config(spec(dtype=torch.bfloat16)), gpu_memory(split=2))
    assert (pages.num_blocks, pages.layout.block_tokens, pages.split) == (BLOCKS, BLOCK, 2)
    assert pages.layout.packing.endswith("/split2")
    compat.prove_copies(pages)


def test_mla_on_a_gpu_is_named_by_its_backend(gpu: FakeCuda) -> None:
    mla = MLAAttentionSpec(BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    kv = {
        f"model.layers.{i}.attn": torch.ones(BLOCKS, 1, BLOCK, 64, dtype=torch.bfloat16).as_subclass(OnGpu)
        for i in range(LAYERS)
    }
    (pages,) = compat.describe_pages(gpu_config(backends=("FLASHMLA",)), cache_config(mla), kv)
    assert (pages.layout.planes, pages.layout.packing) == (1, "vllm-cuda/1/LBNHC/FLASHMLA")
    compat.prove_copies(pages)


@pytest.mark.parametrize(
    "config, kv, why",
    [
        (gpu_config("LBHNC"), gpu_memory("LBNHC"), "not of the layout LBHNC"),
        (gpu_config("NHD"), gpu_memory(), "'NHD' is not known"),
        (gpu_config(backends=("FLASH_ATTN", "FLASHINFER")), gpu_memory(), "several attention backends"),
        (gpu_config("BLNHC"), gpu_memory("BLNHC", split=2), "one run of memory"),
        (engine_config(cache_config__kv_cache_layout="LBNHC"), gpu_memory(), "do not name their backend"),
    ],
)
def test_pages_of_a_gpu_that_are_refused(gpu: FakeCuda, config: Any, kv: dict[str, torch.Tensor], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        compat.describe_pages(config, cache_config(spec(dtype=torch.bfloat16)), kv)


def test_a_gpu_without_the_library_is_refused() -> None:
    with pytest.raises(Unsupported, match="cannot copy"):
        compat.describe_pages(gpu_config(), cache_config(spec(dtype=torch.bfloat16)), gpu_memory())


def test_a_wrong_description_of_a_gpu_is_found_by_copying(gpu: FakeCuda) -> None:
    (pages,) = compat.describe_pages(gpu_config(), cache_config(spec(dtype=torch.bfloat16)), gpu_memory())
    with pytest.raises(Unsupported, match="did not give the bytes"):
        compat.prove_copies(dataclasses.replace(pages, bases=pages.bases[::-1]))
    gpu.fail["copy_pages"] = LOST
    with pytest.raises(Unsupported, match="on GPU 0 cannot be copied"):
        compat.prove_copies(pages)


# -- identity ----------------------------------------------------------------------------------------------------
LAYOUT = KVLayout("pages", "float32", LAYERS, 2, HEADS, DIM, BLOCK, BLOCK, packing="p")


def _digest(weights: str = "", **changes: Any) -> bytes:
    return compat.model_identity(engine_config(**changes), LAYOUT, weights).digest


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config__served_model_name": "other"},
        {"model_config__revision": "main"},
        {"model_config__dtype": torch.bfloat16},
        {"model_config__quantization": "fp8"},
        {"model_config__quantization_config": {"linear": {"weight": "mxfp4"}}},
        {"model_config__model_impl": "transformers"},
        {"model_config__model_class_overrides": {"LlamaForCausalLM": "my:Model"}},
        {"model_config__multimodal_config": SimpleNamespace(mm_processor_kwargs={"do_normalize": False})},
        {"model_config__multimodal_config": SimpleNamespace(mm_encoder_attn_dtype="fp8")},
        {"model_config__seed": 1},
        {"cache_config__cache_dtype": "fp8"},
        {"model_config__hf_text_config": Config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})},
        {"model_config__hf_config": Config(hidden_size=65)},
        {"weights": "named by the operator"},
    ],
)
def test_every_field_changes_the_identity(changes: dict[str, Any]) -> None:
    assert _digest(**changes) != _digest()


def test_identity_ignores_what_does_not_change_kv() -> None:
    assert _digest(model_config__max_model_len=4096) == _digest()
    yarn = Config(rope_parameters={"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0})
    lengths = {_digest(model_config__hf_text_config=yarn, model_config__max_model_len=n) for n in (1024, 4096)}
    assert len(lengths) == 2


def test_settings_at_their_defaults_leave_the_identity_as_it_was() -> None:
    plain = SimpleNamespace(mm_processor_kwargs=None, mm_encoder_attn_backend=None, video_pruning_rate=None)
    left = {"quantization_config": None, "model_impl": "auto", "model_class_overrides": {}, "multimodal_config": plain}
    assert _digest(**{f"model_config__{name}": value for name, value in left.items()}) == _digest()


def test_identity_of_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Unsupported, match=r"cannot be found.*\"weights\""):
        _digest(load_config__load_format="auto", model_config__model=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = _digest(load_config__load_format="auto", model_config__model=str(tmp_path))
    assert first == _digest(load_config__load_format="auto", model_config__model=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert first != _digest(load_config__load_format="auto", model_config__model=str(tmp_path))


def test_identity_of_a_repository_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def find(name: str, file: str, revision: str | None) -> str | None:
        return str(tmp_path / file) if (name, file, revision) == ("org/model", "config.json", "v1") else None

    monkeypatch.setattr(_weights, "try_to_load_from_cache", find)
    options: dict[str, Any] = {"load_config__load_format": "auto", "model_config__model": "org/model"}
    _digest(**options, model_config__revision="v1")
    with pytest.raises(Unsupported, match="org/model"):
        _digest(**options, model_config__revision="v2")


def test_adapters_are_told_by_content(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    lora = SimpleNamespace(lora_int_id=1, lora_name="a", lora_path=str(tmp_path), load_inplace=False)
    adapters = compat.Adapters()
    assert adapters.describe(None) == ""
    first = adapters.describe(lora)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    # vLLM goes on using what it loaded for this id, unless it is told to load it again.
    assert adapters.describe(lora) == first
    lora.load_inplace = True
    assert adapters.describe(lora) != first
    lora.lora_path, lora.lora_int_id = str(tmp_path / "nowhere"), 2
    with pytest.raises(Unsupported, match="nowhere"):
        adapters.describe(lora)


# -- requests ----------------------------------------------------------------------------------------------------
def request(**changes: Any) -> Any:
    plain: dict[str, Any] = {
        "request_id": "r", "mm_features": [], "prompt_embeds": None, "resumable": False, "pooling_params": None,
        "lora_request": None, "cache_salt": None, "skip_reading_prefix_cache": False, "num_computed_tokens": 0,
        "kv_transfer_params": None, "all_token_ids": list(range(100)), "num_tokens": 100, "num_prompt_tokens": 100,
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, ""),
        ({"mm_features": [SimpleNamespace(identifier="sha")]}, ""),
        ({"mm_features": [SimpleNamespace(identifier="")]}, "multimodal"),
        ({"prompt_embeds": object()}, "prompt_embeds"),
        ({"resumable": True}, "streaming_input"),
        ({"pooling_params": object()}, "pooling"),
    ],
)
def test_requests_that_token_ids_do_not_name(changes: dict[str, Any], reason: str) -> None:
    assert compat.refuse_request(request(**changes)) == reason


@pytest.mark.parametrize("gigabytes, prefixes, named", [(4, False, True), (0, True, True), (0, False, False)])
def test_images_that_vllm_only_counts_are_not_told_apart(gigabytes: float, prefixes: bool, named: bool) -> None:
    """Without a cache for them their names are numbers, which mean other images in another process."""
    config = engine_config(
        model_config__multimodal_config=SimpleNamespace(mm_processor_cache_gb=gigabytes),
        cache_config__enable_prefix_caching=prefixes,
    )
    assert compat.names_inputs(config) is named
    asked = request(mm_features=[SimpleNamespace(identifier="renderer0-mm-1-image-0")])
    assert compat.refuse_request(asked, named=named) == ("" if named else "multimodal")
    assert compat.refuse_request(request(), named=named) == ""


def image(identifier: str, offset: int, length: int, modality: str = "image") -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, modality, identifier, PlaceholderRange(offset=offset, length=length))


def test_multimodal_inputs_are_part_of_the_keys() -> None:
    """Every chunk that holds any of an input's placeholders says which input, where it begins and how long it is."""
    assert compat.multimodal(request()) is None

    def said(*features: MultiModalFeatureSpec) -> list[bytes]:
        extra = compat.multimodal(request(mm_features=list(features)))
        assert extra is not None
        return [extra(at, at + 10) for at in range(0, 40, 10)]

    one = said(image("a", 8, 14))
    assert one[3] == b"" and all(one[:3])
    others = [
        said(image("b", 8, 14)), said(image("a", 9, 14)), said(image("a", 8, 15)), said(image("a", 8, 14, "audio")),
    ]  # fmt: skip
    for other in others:
        assert all(other[i] != one[i] for i in range(3))
    assert said(image("a", 8, 2), image("b", 30, 2))[3] != said(image("a", 8, 2), image("c", 30, 2))[3]


def test_requests_with_different_images_do_not_share(tmp_path: Path) -> None:
    worker, scheduler = connector(KVConnectorRole.WORKER, tmp_path), connector(KVConnectorRole.SCHEDULER, tmp_path)
    worker.register_kv_caches(memory())
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})

    def ask(name: str, *features: MultiModalFeatureSpec) -> int | None:
        asked = request(request_id=name, mm_features=list(features))
        found, _ = scheduler.get_num_new_matched_tokens(asked, 0)
        scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],)), found)
        step(scheduler, worker, {name: 100 - found}, [1, 2, 3, 4])
        scheduler.request_finished(asked, [])
        return found

    assert ask("text") == 0 and ask("text again") == 64
    assert ask("cat", image("cat", 10, 20)) == 0 and ask("dog", image("dog", 10, 20)) == 0
    assert ask("cat again", image("cat", 10, 20)) == 64 and ask("moved", image("cat", 11, 20)) == 0
    # Behind the only whole chunk: nothing that is stored depends on it.
    assert ask("late", image("cat", 64, 20)) == 64
    scheduler.shutdown()
    worker.shutdown()


def window(tokens: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32, sliding_window=tokens)


def test_groups_with_windows(tmp_path: Path) -> None:
    """A chunk holds the pages of all groups; those that left a window are not loaded."""
    config, groups = engine_config(), cache_config(spec(), window(64))
    tiers = [{"name": "dram", "capacity": "8MiB", "backend": {"type": "cpu"}}]
    config.kv_transfer_config.kv_connector_extra_config = {"config": {"chunk_tokens": 64, "tiers": tiers}}
    kv = memory()
    worker, scheduler = (
        LMCacheCoreConnector(config, role, groups) for role in (KVConnectorRole.WORKER, KVConnectorRole.SCHEDULER)
    )
    worker.register_kv_caches(kv)
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})
    first = request(request_id="first", all_token_ids=list(range(140)), num_tokens=140, num_prompt_tokens=140)
    tables = ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    assert scheduler.get_num_new_matched_tokens(first, 0) == (0, False)
    step(scheduler, worker, {"first": 140}, *tables)
    scheduler.request_finished_all_groups(first, tables)
    again = request(request_id="again", all_token_ids=list(range(140)), num_tokens=140, num_prompt_tokens=140)
    assert scheduler.get_num_new_matched_tokens(again, 0) == (128, False)
    before = {name: tensor.clone() for name, tensor in kv.items()}
    tables = ([5, 4, 3, 2, 11], [0, 0, 9, 8, 10])
    scheduler.update_state_after_alloc(again, SimpleNamespace(get_block_ids=lambda: tables), 128)
    step(scheduler, worker, {"again": 12}, *tables)
    full, swa = (group.layer_names for group in groups.kv_cache_groups)
    moved = {**{name: {5: 1, 4: 2, 3: 3, 2: 4} for name in full}, **{name: {9: 8, 8: 9} for name in swa}}
    for name, tensor in kv.items():
        for block in range(BLOCKS):
            assert torch.equal(tensor[block], before[name][moved[name].get(block, block)]), (name, block)
    scheduler.request_finished_all_groups(again, tables)
    pipeline = scheduler._scheduler.pipeline
    scheduler.shutdown()
    worker.shutdown()
    pipeline.check(idle=True)


@pytest.mark.parametrize(
    "changes, world, why",
    [
        ({"load": "async"}, 1, "load: async with several KV cache groups"),
        ({"config": {"chunk_tokens": 128, "tiers": []}}, 1, "at most 64"),
        ({}, 2, "1 of 2 workers"),
    ],
)
def test_arrangements_that_run_without_caching(
    changes: dict[str, Any], world: int, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config, groups = engine_config(parallel_config__world_size=world), cache_config(spec(), window(64))
    tiers = [{"name": "dram", "capacity": "8MiB", "backend": {"type": "cpu"}}]
    changes.get("config", {})["tiers"] = tiers
    extra = {"config": {"chunk_tokens": 64, "tiers": tiers}, **changes}
    config.kv_transfer_config.kv_connector_extra_config = extra
    worker, scheduler = (
        LMCacheCoreConnector(config, role, groups) for role in (KVConnectorRole.WORKER, KVConnectorRole.SCHEDULER)
    )
    worker.register_kv_caches(memory())
    scheduler.set_xfer_handshake_metadata({0: worker.get_handshake_metadata()})
    assert why in caplog.text
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (0, False)
    worker.shutdown()


def test_windows_shorter_than_a_chunk_are_refused() -> None:
    compat.refuse_chunk(cache_config(spec(), window(64)), 64)
    with pytest.raises(Unsupported, match=r"chunk_tokens to at most 64.*--disable-hybrid-kv-cache-manager"):
        compat.refuse_chunk(cache_config(spec(), window(64)), 128)


def test_mla_pages_are_told_by_what_the_backend_writes() -> None:
    latent, rope = 48, 16

    class Backend:
        def __init__(self, shift: int) -> None:
            self.shift = shift

        def do_kv_cache_update(self, c: Any, pe: Any, page: Any, slots: Any, dtype: str, scale: Any) -> None:
            page.view(-1, latent + rope)[slots] = torch.cat([c, pe.squeeze(1)], 1).roll(self.shift, 1)

    def describe(shift: int = 0, impl: Any = None) -> compat.Pages:
        mla = MLAAttentionSpec(BLOCK, num_kv_heads=1, head_size=latent + rope, dtype=torch.float32)
        layers = {f"model.layers.{i}.attn": SimpleNamespace(impl=impl or Backend(shift)) for i in range(LAYERS)}
        text = Config(kv_lora_rank=latent, qk_rope_head_dim=rope)
        config = engine_config(compilation_config__static_forward_context=layers, model_config__hf_text_config=text)
        kv = {name: torch.zeros(BLOCKS, 1, BLOCK, latent + rope) for name in layers}
        return compat.describe_pages(config, cache_config(mla), kv)[0]

    pages = describe()
    assert (pages.layout.planes, pages.layout.kv_heads, pages.layout.head_dim) == (1, 1, latent + rope)
    assert pages.layout.packing == describe().layout.packing != describe(1).layout.packing
    assert "/mla.Backend/" in pages.layout.packing
    compat.prove_copies(pages)
    with pytest.raises(Unsupported, match="one page format"):
        describe(impl=object())


def test_what_the_metrics_are_made_of() -> None:
    stats = Stats.between(
        {"hit.dram": 2, "stored": 1}, {"hit.dram": 5, "stored": 9, "miss.corrupt": 1, "loaded_tokens": 0}
    )
    assert stats.data == {"hit.dram": 3, "miss.corrupt": 1} and not stats.is_empty()
    assert stats.aggregate(Stats({"hit.dram": 1})).reduce() == {"hit.dram": 4, "miss.corrupt": 1}
    stats.reset()
    assert stats.is_empty()


def test_hit_sources() -> None:
    found = compat.hit_sources({"dram": 32, "nvme": 64, "cold": 32}, "dram")
    assert found == {CacheHitSource.HOST: 32, CacheHitSource.DISK: 96}


# -- the connector, both roles, without an engine ----------------------------------------------------------------
def connector(role: KVConnectorRole, tmp_path: Path, *, on_gpu: bool = False, **extra: Any) -> LMCacheCoreConnector:
    tiers = [{"name": "dram", "capacity": "8MiB", "backend": {"type": "cpu"}}]
    extra = {"config": {"chunk_tokens": 64, "tiers": tiers}, **extra}
    config = (gpu_config if on_gpu else engine_config)(kv_transfer_config__kv_connector_extra_config=extra)
    return LMCacheCoreConnector(config, role, cache_config(spec(dtype=torch.bfloat16)) if on_gpu else cache_config())


def step(
    scheduler: LMCacheCoreConnector, worker: LMCacheCoreConnector, tokens: dict[str, int], *tables: list[int]
) -> Any:
    """One step of an engine, in vLLM's order; all requests are new."""
    output = SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        kv_connector_block_state=KVConnectorBlockState(set(tokens), lambda _: tables, {}),
        scheduled_new_reqs=[SimpleNamespace(block_ids=tables, num_computed_tokens=0) for _ in tokens],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[None, ([9], [10])]),
        kv_cache_block_copies=[SimpleNamespace(src_block_id=9, dst_block_id=11)],
    )
    worker.bind_connector_metadata(scheduler.build_connector_meta(output))
    worker.start_load_kv(None)
    worker.wait_for_save()
    results = worker.get_transfer_results(set())
    found = KVConnectorOutput(
        finished_recving=results.finished_recving,
        invalid_block_ids=worker.get_block_ids_with_load_errors(),
        kv_connector_worker_meta=worker.build_connector_worker_meta(),
    )
    worker.clear_connector_metadata()
    scheduler.update_connector_output(found)
    return found


def test_both_roles_save_and_load(tmp_path: Path) -> None:
    kv = memory()
    worker, scheduler = connector(KVConnectorRole.WORKER, tmp_path), connector(KVConnectorRole.SCHEDULER, tmp_path)
    assert not scheduler.requires_kv_delivery
    worker.register_kv_caches(kv)
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})
    first = request(request_id="first")
    assert scheduler.get_num_new_matched_tokens(first, 0) == (0, False)
    scheduler.update_state_after_alloc(first, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],)), 0)
    step(scheduler, worker, {"first": 100}, [1, 2, 3, 4])
    assert scheduler.request_finished_all_groups(first, ([1, 2, 3, 4],)) == (False, None)
    again = request(request_id="again")
    assert scheduler.get_num_new_matched_tokens(again, 0) == (64, False)
    scheduler.update_state_after_alloc(again, SimpleNamespace(get_block_ids=lambda: ([7, 5, 6, 8],)), 64)
    assert scheduler.get_external_cache_hit_sources(again, 64) == {CacheHitSource.HOST: 64}
    step(scheduler, worker, {"again": 36}, [7, 5, 6, 8])
    for tensor in kv.values():
        assert torch.equal(tensor[7], tensor[1])
        assert torch.equal(tensor[5], tensor[2])
        assert not torch.equal(tensor[6], tensor[3])
    # An empty step moves nothing, and tells nothing.
    assert step(scheduler, worker, {}, []).is_empty()
    scheduler.request_finished(again, [])
    assert scheduler.reset_cache() is True
    assert scheduler.get_num_new_matched_tokens(request(request_id="late"), 0) == (0, False)
    pipeline = scheduler._scheduler.pipeline
    scheduler.shutdown()
    worker.shutdown()
    scheduler.shutdown()
    pipeline.check(idle=True)


def finish(gpu: FakeCuda) -> None:
    for stream in list(gpu._streams):
        gpu._run(stream)


def test_both_roles_on_a_gpu(gpu: FakeCuda, tmp_path: Path) -> None:
    kv = gpu_memory()
    worker = connector(KVConnectorRole.WORKER, tmp_path, on_gpu=True)
    scheduler = connector(KVConnectorRole.SCHEDULER, tmp_path, on_gpu=True)
    worker.register_kv_caches(kv)
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})
    first = request(request_id="first")
    assert scheduler.get_num_new_matched_tokens(first, 0) == (0, False)
    scheduler.update_state_after_alloc(first, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],)), 0)
    # The copies of a step outlast it, and are asked about in steps that have nothing else to do.
    assert step(scheduler, worker, {"first": 100}, [1, 2, 3, 4]).kv_connector_worker_meta is None
    assert scheduler.has_pending_push_work()
    scheduler.request_finished_all_groups(first, ([1, 2, 3, 4],))
    finish(gpu)
    step(scheduler, worker, {}, [])
    assert not scheduler.has_pending_push_work()
    again = request(request_id="again")
    assert scheduler.get_num_new_matched_tokens(again, 0) == (64, False)
    scheduler.update_state_after_alloc(again, SimpleNamespace(get_block_ids=lambda: ([7, 5, 6, 8],)), 64)
    step(scheduler, worker, {"again": 36}, [7, 5, 6, 8])
    finish(gpu)
    for tensor in kv.values():
        assert torch.equal(tensor[7], tensor[1])
        assert torch.equal(tensor[5], tensor[2])
        assert not torch.equal(tensor[6], tensor[3])
    step(scheduler, worker, {}, [])
    pipeline = scheduler._scheduler.pipeline
    scheduler.request_finished(again, [])
    scheduler.shutdown()
    worker.shutdown()
    pipeline.check(idle=True)


def test_blocks_a_step_may_write() -> None:
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=([1, 2, 3], [4, 5, 6]), num_computed_tokens=70)],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[None, ([9], [10])]),
    )
    assert list(compat.blocks_written(output, 32)) == [3, 6, 9, 10]


def test_a_tenants_requests_are_found_by_that_tenant_only(tmp_path: Path) -> None:
    """The tenant is what the gateway says; a caller's salt separates within it, and no tenant is no cache."""
    kv = memory()
    tiers = [{"name": "dram", "capacity": "8MiB", "backend": {"type": "cpu"}}]
    extra = {"chunk_tokens": 64, "tiers": tiers, "tenancy": {"secret": "sixteen letters!", "quota": "50%"}}
    worker, scheduler = (
        connector(role, tmp_path, config=extra) for role in (KVConnectorRole.WORKER, KVConnectorRole.SCHEDULER)
    )
    worker.register_kv_caches(kv)
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})

    def ask(name: str, tenant: Any, salt: str | None = None) -> int | None:
        params = None if tenant is None else {"lmcache.tenant": tenant}
        asked = request(request_id=name, kv_transfer_params=params, cache_salt=salt)
        found, _ = scheduler.get_num_new_matched_tokens(asked, 0)
        scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],)), 0)
        step(scheduler, worker, {name: 100}, [1, 2, 3, 4])
        scheduler.request_finished(asked, [])
        return found

    assert ask("1", "acme") == 0 and ask("2", "acme") == 64
    assert [ask(str(3 + i), tenant) for i, tenant in enumerate(("other", None, "", 7))] == [0, 0, 0, 0]
    assert ask("7", "acme", "salt") == 0 and ask("8", "acme", "salt") == 64 and ask("9", "other", "salt") == 0
    held = scheduler._scheduler
    assert held.counts["bypass.tenant"] == 3 and set(held.pipeline.stats()["tiers"]["dram"]["tenants"]) == {
        "acme",
        "other",
    }
    scheduler.shutdown()
    worker.shutdown()


def test_a_refused_engine_runs_without_caching(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker, scheduler = connector(KVConnectorRole.WORKER, tmp_path), connector(KVConnectorRole.SCHEDULER, tmp_path)
    worker.register_kv_caches({name: tensor.double() for name, tensor in memory().items()})
    metadata = worker.get_handshake_metadata()
    assert isinstance(metadata, PagesMetadata)
    assert "float64" in metadata.refusal
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): metadata})
    r = request()
    assert scheduler.get_num_new_matched_tokens(r, 0) == (0, False)
    scheduler.update_state_after_alloc(r, SimpleNamespace(get_block_ids=lambda: ([1],)), 0)
    assert step(scheduler, worker, {"r": 100}, [1, 2, 3, 4]).is_empty()
    assert scheduler.request_finished(r, []) == (False, None)
    assert scheduler.reset_cache() is None
    scheduler.shutdown()
    worker.shutdown()


@pytest.mark.parametrize("timeout, warned", [(0, True), (30, False)])
def test_write_back_needs_time_to_end(
    timeout: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    worker = connector(KVConnectorRole.WORKER, tmp_path)
    worker.register_kv_caches(memory())
    disk = {
        "name": "disk",
        "capacity": "16MiB",
        "write": "back",
        "backend": {"type": "gds", "path": str(tmp_path / "kv")},
    }
    tiers = [{"name": "dram", "capacity": "8MiB", "backend": {"type": "cpu"}}, disk]
    scheduler = connector(KVConnectorRole.SCHEDULER, tmp_path, config={"chunk_tokens": 64, "tiers": tiers})
    scheduler._vllm_config.shutdown_timeout = timeout
    scheduler.set_xfer_handshake_metadata({0: worker.get_handshake_metadata()})
    assert ("--shutdown-timeout 30" in caplog.text) is warned
    scheduler.shutdown()


def test_settings_are_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        connector(KVConnectorRole.SCHEDULER, tmp_path, load="sometimes", savedecode=True)
    text = str(error.value)
    assert "2 configuration errors" in text
    assert all(name in text for name in ("kv_connector_extra_config", "'sometimes'", "savedecode"))
    assert "known settings: config, load, layerwise, save_decode, weights" in text


def test_chunks_must_be_whole_blocks(tmp_path: Path) -> None:
    worker = connector(KVConnectorRole.WORKER, tmp_path)
    worker.register_kv_caches(memory())
    tiers = [{"name": "dram", "capacity": "8MiB", "backend": {"type": "cpu"}}]
    scheduler = connector(KVConnectorRole.SCHEDULER, tmp_path, config={"chunk_tokens": 48, "tiers": tiers})
    with pytest.raises(ConfigError, match=r"48 is not a multiple of vLLM's block of 32.*\n.*\n.*chunk_tokens: 64"):
        scheduler.set_xfer_handshake_metadata({0: worker.get_handshake_metadata()})


def test_configuration_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lmcache.json"
    path.write_text(json.dumps({"chunk_tokens": 7, "tiers": []}))
    with pytest.raises(ConfigError, match="tiers"):
        connector(KVConnectorRole.SCHEDULER, tmp_path, config=str(path))


@pytest.mark.parametrize(
    "extra",
    [
        {"config": "/x.yaml", "redis_password": "hunter2-and-more"},
        {"tiers": [{"name": "r", "backend": {"type": "redis", "url": "redis://u:hunter2-and-more@h/0"}}]},
        {"config": ["redis://u:hunter2-and-more@h/0"]},
        {"config": "/x", "weights": {"password": "hunter2-and-more"}},
    ],
)
def test_mistakes_in_an_engines_settings_show_no_secret(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        _settings(extra)
    assert "hunter2" not in str(caught.value)
