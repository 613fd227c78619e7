"""A small text-generation server: OpenAI's /v1/completions over a Transformers model that prefills no prompt twice.

    python examples/transformers_server.py MODEL --config examples/lmcache.yaml
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "Once upon a time", "max_tokens": 16}'

MODEL is a Hugging Face directory (`lmcachectl model` prints one). `prompt` is a text, or a list of texts that are
generated as one batch. `usage.prompt_tokens_details.cached_tokens` tells how much was not computed again. One request
is generated at a time, and there is no authentication: an example, for the loopback interface.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcache_core.adapters.transformers import Handle, attach

MAX_BODY = 8 << 20


class BadRequest(ValueError):
    """What the client sent cannot be served; the text says why."""


class Completions:
    """Prompts in, texts out."""

    def __init__(self, name: str, tokenizer: Any, cache: Handle) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._cache = cache
        self._lock = threading.Lock()

    def __call__(self, request: Any) -> dict[str, Any]:
        """Answer one request; raise `BadRequest` for one that is not understood."""
        if not isinstance(request, dict):
            raise BadRequest("the body must be a JSON object")
        prompt, most, heat = request.get("prompt"), request.get("max_tokens", 16), request.get("temperature", 0.0)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p for p in prompts):
            raise BadRequest("prompt must be a text or a list of texts")
        if type(most) is not int or not 0 < most <= 4096:
            raise BadRequest("max_tokens must be an integer from 1 to 4096")
        if type(heat) not in (int, float) or not 0 <= heat <= 2:
            raise BadRequest("temperature must be a number from 0 to 2")
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1).to(self._cache.model.device)
        sampling = {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
        with self._lock:
            output = self._cache.model.generate(
                **inputs, max_new_tokens=most, pad_token_id=self._tokenizer.pad_token_id, **sampling
            )
            used = self._cache.last
        answers = output[:, inputs.input_ids.shape[1] :].tolist()
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        prompt_tokens = int(inputs.attention_mask.sum())
        tokens = sum(token != self._tokenizer.pad_token_id for answer in answers for token in answer)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [
                {"index": i, "text": text, "logprobs": None, "finish_reason": self._finish(answer)}
                for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": tokens,
                "total_tokens": prompt_tokens + tokens,
                "prompt_tokens_details": {"cached_tokens": used.reused_tokens},
            },
        }

    def _finish(self, answer: list[int]) -> str:
        return "stop" if answer[-1] in (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id) else "length"


def handler(completions: Completions) -> type[BaseHTTPRequestHandler]:
    """The HTTP side."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._send(200, {"object": "list", "data": [{"id": completions.name, "object": "model"}]})
            else:
                self._send(404, {"error": {"message": "there are /v1/completions and /v1/models"}})

        def do_POST(self) -> None:
            self.close_connection = True  # so that a body that was not read is no next request
            if self.path != "/v1/completions":
                self._send(404, {"error": {"message": "there are /v1/completions and /v1/models"}})
                return
            try:
                length = int(self.headers.get("Content-Length", ""))
                if not 0 < length <= MAX_BODY:
                    raise BadRequest(f"the body must have 1 to {MAX_BODY} bytes")
                self._send(200, completions(json.loads(self.rfile.read(length))))
            except ValueError as error:
                self._send(400, {"error": {"message": str(error), "type": "invalid_request_error"}})

        def _send(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--config", help="a configuration file; without one, 1 GiB of host memory")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Padding goes in front, so that every row ends where the answer begins.
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device).eval()
    with attach(model, args.config, tokenizer=tokenizer) as cache:
        completions = Completions(args.model, tokenizer, cache)
        with ThreadingHTTPServer((args.host, args.port), handler(completions)) as server:
            print(f"http://{args.host}:{server.server_address[1]}", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("writing down what is still to be written", flush=True)


if __name__ == "__main__":
    main()
