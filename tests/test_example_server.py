"""The example server, as its own words say to start it: the second time a prompt comes, it is not computed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).parent.parent
WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(126))]
CONFIG = """
chunk_tokens: 16
tiers:
  - {name: dram, capacity: 16MiB, backend: {type: cpu}}
"""


def make_model(path: Path) -> None:
    """A tiny random Llama and a tokenizer of words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), max_position_embeddings=512, pad_token_id=0, eos_token_id=None, bos_token_id=None,
        initializer_range=0.3, **sizes,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("server")
    make_model(place / "model")
    (place / "cache.yaml").write_text(CONFIG)
    command = [sys.executable, str(ROOT / "examples/transformers_server.py"), str(place / "model")]
    command += ["--config", str(place / "cache.yaml"), "--port", "0"]
    with (place / "log").open("w+") as log:
        # A test run in the background of a shell ignores SIGINT, and so would the server.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=place)
        signal.signal(signal.SIGINT, before)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), (place / "log").read_text()
            yield url
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            assert process.returncode == 0, (place / "log").read_text()
        finally:
            process.kill()
            process.wait()


def ask(url: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def text(start: int, count: int) -> str:
    return " ".join(f"w{(start + 7 * i) % 126}" for i in range(count))


@pytest.mark.timeout(180)
def test_the_second_answer_is_the_same_and_its_prompt_is_not_computed(server: str) -> None:
    url = server + "/v1/completions"
    request = {"prompt": text(1, 70), "max_tokens": 8}
    answers = [ask(url, request) for _ in range(2)]
    assert [status for status, _ in answers] == [200, 200]
    first, second = (answer for _, answer in answers)
    assert first["choices"][0]["text"].startswith("w")
    assert second["choices"] == first["choices"]
    assert [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (first, second)] == [0, 64]
    assert second["usage"]["prompt_tokens"] == 70 and second["usage"]["completion_tokens"] == 8

    status, both = ask(url, {"prompt": [text(1, 70), text(1, 64) + " " + text(5, 20)], "max_tokens": 8})
    assert status == 200 and both["usage"]["prompt_tokens_details"]["cached_tokens"] == 64 - 0 + 64 - 14
    assert both["choices"][0]["text"] == first["choices"][0]["text"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "Expecting"),
        (b"[]", "JSON object"),
        (b"", "1 to"),
        ({"max_tokens": 3}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [1]}, "prompt must be"),
        ({"prompt": "w1", "max_tokens": 0}, "max_tokens must be"),
        ({"prompt": "w1", "temperature": 3}, "temperature must be"),
    ],
)
def test_bad_requests_are_told_why(body: Any, message: str, server: str) -> None:
    status, answer = ask(server + "/v1/completions", body)
    assert status == 400 and message in answer["error"]["message"]
    assert ask(server + "/v2", {"prompt": "w1"})[0] == 404
