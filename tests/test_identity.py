"""Identity: one injective encoding, every field in the digest, equal on every machine."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import struct
import unicodedata
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmcache_core import canonical
from lmcache_core.identity import Identity, fingerprint_weights, tenant_salt
from lmcache_core.keys import chunk_keys
from lmcache_core.layout import KVLayout

LAYOUT = KVLayout("pages", "bfloat16", 4, 2, 2, 64, chunk_tokens=256, block_tokens=16, packing="vllm-cpu/1/amx")
BASE = Identity(
    model="org/model", weights="00ff", layout=LAYOUT, revision="main", lora="l:1", rope="theta=1e4", tokenizer="aa",
    tp_rank=0, tp_size=2, pp_rank=0, pp_size=2, kv_group=0, engine="vllm", salt="s",
)  # fmt: skip

OTHER_LAYOUT: dict[str, list[Any]] = {
    "order": ["lknhd"],
    "dtype": ["float16", "float32", "float8_e4m3fn", "float8_e5m2", "uint8", "int8"],
    "num_layers": [3, 5],
    "planes": [1],
    "kv_heads": [1, 4],
    "head_dim": [32, 128],
    "chunk_tokens": [128, 512],
    "block_tokens": [8, 32, 256],
    "packing": ["vllm-cpu/1/vec", "vllm-cpu/2/amx"],
    "page_bytes": [1 << 16],
    "version": [0, 2],
}
"""For each field of KVLayout other values than the base's. A field that is missing here fails a test."""

OTHER: dict[str, list[Any]] = {
    "model": ["org/model2", "org-SEP-model", "", "ORG/model", "org/model\0", "org//model"],
    "weights": ["00fe", "", "00FF"],
    "layout": [replace(LAYOUT, **{name: value}) for name, values in OTHER_LAYOUT.items() for value in values],
    "revision": ["", "v2"],
    "lora": ["", "l:2"],
    "rope": ["", "theta=1e5"],
    "tokenizer": ["", "ab"],
    "tp_rank": [1],
    "tp_size": [1, 4],
    "pp_rank": [1],
    "pp_size": [1, 4],
    "kv_group": [1, 10],
    "engine": ["", "vllm-cpu"],
    "salt": [None, "", "S", "None", "s\0"],
    "fidelity": ["half-1", "HALF-1"],
}
"""For each field of Identity other values than the base's."""

VARIANTS = [
    pytest.param(replace(BASE, **{name: value}), id=f"{name}-{i}")
    for name, values in OTHER.items()
    for i, value in enumerate(values)
]


def test_every_field_is_covered() -> None:
    """A new field must get other values above, so that the tests below see that it counts."""
    assert {field.name for field in fields(Identity)} == OTHER.keys()
    assert {field.name for field in fields(KVLayout)} == OTHER_LAYOUT.keys()
    assert all(value != getattr(BASE, name) for name, values in OTHER.items() for value in values)
    assert all(value != getattr(LAYOUT, name) for name, values in OTHER_LAYOUT.items() for value in values)


@pytest.mark.parametrize("other", VARIANTS)
def test_a_difference_in_one_field_changes_digest_and_both_halves_of_every_key(other: Identity) -> None:
    assert other.digest != BASE.digest
    assert other.prefix != BASE.prefix
    tokens = range(1024)
    ours, theirs = chunk_keys(BASE, tokens), chunk_keys(other, tokens)
    halves = {key[:16] for key in (*ours, *theirs)} | {key[16:] for key in (*ours, *theirs)}
    assert len(halves) == 2 + len(ours) + len(theirs)


def test_all_variants_differ_from_each_other() -> None:
    identities = [BASE, *(param.values[0] for param in VARIANTS)]
    assert len({identity.digest for identity in identities}) == len(identities)
    layouts = [LAYOUT, *OTHER["layout"]]
    assert len({layout.id for layout in layouts}) == len(layouts)


def test_equal_fields_give_equal_digests() -> None:
    copy = replace(BASE, layout=replace(LAYOUT))
    assert copy is not BASE and copy.digest == BASE.digest and copy.layout.id == LAYOUT.id
    assert len(BASE.digest) == 32 and BASE.prefix == BASE.digest[:16] and len(LAYOUT.id) == 16


def test_known_answers() -> None:
    """The same on every machine and in every version: a change here makes every stored object unreachable."""
    layout = KVLayout("lknhd", "bfloat16", 2, 2, 1, 8, chunk_tokens=16, block_tokens=4)
    identity = Identity(model="org/model", weights="00ff", layout=layout)
    assert canonical.encode(("a", 1, None)).hex() == (
        "6c1d0000000000000073010000000000000061690100000000000000316e0000000000000000"
    )
    assert layout.id.hex() == "c80354396aac710cba966c32c233e365"
    assert identity.digest.hex() == "c147f97112f54fbdcfb64aad9b768569b2ff04f6b47750b1287331ad8da980d8"
    assert BASE.digest.hex() == "2f718c840812f7eb3ae3a60dd76606661f1bf3aa7b09869a5dbb0295e5fbef75"


def test_a_request_keeps_what_it_does_not_replace() -> None:
    base = replace(BASE, lora="", salt="tenant")
    assert base.with_request() == base
    assert base.with_request(lora="x") == replace(base, lora="x")
    assert base.with_request(salt="other") == replace(base, salt="other")
    assert base.with_request(salt="").salt == ""


# -- the encoding ------------------------------------------------------------------------------------------------


def decode(data: bytes) -> Any:
    """The inverse of `canonical.encode`: if it exists, no two values share an encoding."""
    value, rest = _decode(data)
    assert not rest
    return value


def _decode(data: bytes) -> tuple[Any, bytes]:
    tag, size = data[:1], struct.unpack("<Q", data[1:9])[0]
    body, rest = data[9 : 9 + size], data[9 + size :]
    assert len(body) == size
    simple = {
        b"n": lambda: None,
        b"t": lambda: body == b"\1",
        b"i": lambda: int(body),
        b"s": lambda: body.decode("utf-8", "surrogatepass"),
        b"b": lambda: body,
    }
    if tag in simple:
        return simple[tag](), rest
    items = []
    while body:
        item, body = _decode(body)
        items.append(item)
    return (tuple(items) if tag == b"l" else dict(zip(items[::2], items[1::2], strict=True))), rest


text = st.text(st.characters(exclude_categories=()), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | text | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


def exactly(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down (1, True and 1.0 are equal in Python)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(exactly, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(exactly(a[key], b[key]) for key in a)
    return bool(a == b)


@settings(max_examples=300)
@given(values)
def test_the_encoding_can_be_inverted(value: Any) -> None:
    assert exactly(decode(canonical.encode(value)), value)


@settings(max_examples=300)
@given(values, values)
def test_different_values_have_different_encodings(a: Any, b: Any) -> None:
    assume(not exactly(a, b))
    assert canonical.encode(a) != canonical.encode(b)
    assert canonical.digest(a) != canonical.digest(b)


@given(st.dictionaries(text, values, max_size=5), st.randoms())
def test_the_order_of_a_mapping_does_not_count(mapping: dict[str, Any], rng: Any) -> None:
    items = list(mapping.items())
    rng.shuffle(items)
    assert canonical.encode(dict(items)) == canonical.encode(mapping)


ADVERSARIAL = [
    "a/b", "a-SEP-b", "a_b", "a\\b", "a", "b", "", " ", "..", "../..", "./a/b", "a/./b", "a//b", "a/b/", "\0", "a\0b",
    "a\0", "None", "null", "0", "1", "True", "é", unicodedata.normalize("NFD", "é"), "ﬁ", "fi", "\uff21", "A",
    "a\u200bb", "ab", "\ud800", "\udfff", "𐏿", "s" * 300, "s" * 301, "\n", "\r\n", "%2F", "a%2Fb", "a:b", "a|b",
    "('a', 'b')",
]  # fmt: skip


def test_adversarial_names_never_meet() -> None:
    """As model, and spread over two neighbouring fields: separators, Unicode forms, NUL, empty and absent."""
    assert len(set(ADVERSARIAL)) == len(ADVERSARIAL)
    digests = {replace(BASE, model=name).digest for name in ADVERSARIAL}
    assert len(digests) == len(ADVERSARIAL)
    pairs = list(itertools.product(ADVERSARIAL, repeat=2))
    digests = {replace(BASE, model=a, weights=b).digest for a, b in pairs}
    assert len(digests) == len(pairs)
    salts = [None, *ADVERSARIAL]
    assert len({replace(BASE, salt=salt).digest for salt in salts}) == len(salts)


def test_containers_cannot_be_confused() -> None:
    values_ = [
        (), ((),), ((), ()), {}, ({},), {"a": None}, {"a": ()}, ("a", None), ("a",), "a", b"a", ("a", "b"), ("ab",),
        (("a",), "b"), ("a", ("b",)), {"a": "b"}, {"a": "b", "c": "d"}, ("a", "b", "c", "d"), 0, False, None, "", b"",
        "0", 1, True, -1, "-1", 10, "10", (1, 0), (10,),
    ]  # fmt: skip
    encodings = {canonical.encode(value) for value in values_}
    assert len(encodings) == len(values_)


@pytest.mark.parametrize("value", [1.0, float("nan"), object(), [1], {1, 2}, bytearray(b"a"), ("a", 0.5), {"a": [1]}])
def test_what_has_no_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="no canonical encoding"):
        canonical.encode(value)


@pytest.mark.parametrize("field", ["tp_rank", "tp_size", "pp_rank", "pp_size", "kv_group"])
@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_ranks_are_integers(field: str, value: Any) -> None:
    """True == 1 in Python, but not in the encoding: what a digest is remembered under must not be ambiguous."""
    with pytest.raises(TypeError, match=field):
        replace(BASE, **{field: value})


@pytest.mark.parametrize("field", [f.name for f in fields(KVLayout) if f.type == "int"])
@pytest.mark.parametrize("value", [True, 256.0])
def test_sizes_are_integers(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=field):
        replace(LAYOUT, **{field: value})


# -- weights and tenants ---------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model-1.safetensors").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "model-2.safetensors").write_bytes(b"second" * 1000)
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "README.md").write_text("hello")
    return tmp_path


def test_fingerprint_sees_what_the_weights_are(model: Path) -> None:
    seen = [fingerprint_weights(model)]
    assert fingerprint_weights(model) == seen[0]
    (model / "README.md").write_text("changed")
    assert fingerprint_weights(model) == seen[0]

    def changed() -> None:
        seen.append(fingerprint_weights(model))
        assert len(set(seen)) == len(seen)

    first = model / "model-1.safetensors"
    data = bytearray(first.read_bytes())
    for at in (0, len(data) // 2, len(data) - 1):
        data[at] ^= 1
        first.write_bytes(data)
        changed()
    first.write_bytes(data + b"\0")
    changed()
    (model / "config.json").write_text('{"a": 2}')
    changed()
    (model / "adapter_config.json").write_text("{}")
    changed()
    first.rename(model / "model-3.safetensors")
    changed()
    (model / "config.json").unlink()
    changed()


def test_fingerprint_of_one_file(model: Path) -> None:
    file = model / "model-1.safetensors"
    before = fingerprint_weights(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert fingerprint_weights(file) != before


def test_fingerprint_samples_large_files(tmp_path: Path) -> None:
    file = tmp_path / "w.bin"
    data = bytearray(1 << 20)
    file.write_bytes(data)
    before = fingerprint_weights(file, sample_bytes=4096)
    for i in range(1, 17):
        data[len(data) * i // 17 + 100] = 1
        file.write_bytes(data)
        assert fingerprint_weights(file, sample_bytes=4096) != before
        data[len(data) * i // 17 + 100] = 0


@pytest.mark.parametrize("name", ["", "missing"])
def test_no_weights_are_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no weight files"):
        fingerprint_weights(tmp_path / name)


def test_tenant_salt_is_hmac_and_separates_tenants() -> None:
    salt = tenant_salt(b"master", "acme")
    message = b"s" + struct.pack("<Q", 4) + b"acme"
    assert salt == hmac.new(b"master", message, hashlib.sha256).hexdigest()
    assert len({tenant_salt(b"master", name) for name in ADVERSARIAL}) == len(ADVERSARIAL)
    assert tenant_salt(b"other", "acme") != salt
    assert replace(BASE, salt=salt).digest != replace(BASE, salt="acme").digest
