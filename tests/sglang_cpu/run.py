"""The adapter in the real SGLang engine, several processes on one store: `make test-sglang`.

    control   SGLang's own `file` backend: one process stores a prompt, another loads it
    A, B      ours, alive at the same time on one directory: B loads what A stored; A has `page_first_direct` pages and
              the v1 interface, B `layer_first` and the legacy one
    linker    without a host pool: store, forget, load again; then another process. Its control is the engine's own
              prefix cache

Every answer from loaded pages must be its control's, token for token and bit for bit in its log probabilities.
Prints the result as Markdown for docs/sglang.md, or why it cannot run here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROMPT = 513  # eight pages and a token; SGLang asks its storage about 256 tokens or more
LOADED = 512


class Process:
    """One engine."""

    def __init__(self, python: Path, model: str, kind: str, work: Path, layout: str, v1: bool, log: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE))),
            "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(work / "file"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # more threads than cores wait for each other
            "OMP_WAIT_POLICY": "passive",
            "TORCHDYNAMO_DISABLE": "1",
        }
        command = [str(python), str(HERE / "worker.py"), model, kind, str(work / "store"), layout, str(int(v1))]
        self.log = log
        self._stderr = log.open("w")
        self._child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
            start_new_session=True,
        )  # fmt: skip

    def answer(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-30:])
            raise SystemExit(f"the engine ended with status {self._child.wait(60)}:\n{tail}")
        return json.loads(line)

    def ask(self, order: Any) -> Any:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(order) + "\n")
        self._child.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self._child.stdin is not None
        if self._child.stdin.closed:
            return
        self._child.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(60)
        # SGLang's children are in the process group that was made for them.
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._stderr.close()


def loaded(answer: Any) -> int:
    """Tokens that came from storage."""
    return int((answer["details"] or {}).get("storage", 0))


def same(answer: Any, control: Any) -> bool:
    return bool(answer["tokens"] == control["tokens"] and answer["logprobs"] == control["logprobs"])


def started(
    args: argparse.Namespace, work: Path, stack: ExitStack, name: str, kind: str, layout: str = "page_first_direct",
    v1: bool = True,
) -> Process:  # fmt: skip
    """An engine that is up; it is closed with `stack`."""
    process = Process(args.python, args.model, kind, work, layout, v1, work / f"{name}.log")
    stack.callback(process.close)
    if process.answer() != "up":
        raise SystemExit(f"{name} did not start")
    return process


def main() -> int:
    """Run everything; 0 when all of it holds, 77 when nothing can run here."""
    parser = argparse.ArgumentParser(description="the real SGLang engine over one store")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-sglang/bin/python")
    parser.add_argument("--model", default=str(ROOT / ".models/smollm2-135m-instruct"))
    parser.add_argument("--only", choices=["storage", "linker"])
    args = parser.parse_args()
    missing = [str(path) for path in (args.python, Path(args.model, "config.json")) if not path.exists()]
    if missing:
        print(f"not run: {' and '.join(missing)} missing; `make sglang` and `make model` bring them")
        return 77
    begun = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE)))}
    subprocess.run([str(args.python), str(HERE / "facts.py")], env=environment, check=True)
    rows: list[tuple[str, bool, str]] = []

    def check(what: str, holds: bool, detail: object = "") -> None:
        rows.append((what, holds, str(detail)))
        print("ok    " if holds else "WRONG ", what, detail, flush=True)

    prompt = [(i * 104729 + i * i * 31) % 40000 + 1000 for i in range(PROMPT)]

    def storage(start: Callable[..., Process]) -> None:
        first = start("control 1", "file")
        cold = first.ask(prompt)
        first.close()
        second = start("control 2", "file")
        control = second.ask(prompt)
        second.close()
        check("control: `file` loads it in another process", loaded(control) == LOADED, f"{loaded(control)} tokens")
        a = start("a", "storage")
        check("A computes the prompt as the control did", same(a.ask(prompt), cold))
        b = start("b", "storage", layout="layer_first", v1=False)
        answer = b.ask(prompt)
        check("B loads the prompt from A's store", loaded(answer) == LOADED, f"{loaded(answer)} tokens")
        check("B's answer is the control's, bit for bit", same(answer, control))
        a.close()
        b.close()

    def linker(start: Callable[..., Process]) -> None:
        link = start("linker 1", "linker")
        link.ask(prompt)
        control = link.ask(prompt)
        check(
            "linker control: the engine's own prefix cache", control["cached"] == LOADED, f"{control['cached']} tokens"
        )
        link.ask("flush")
        answer = link.ask(prompt)
        check("linker: the prompt is loaded after a flush", answer["cached"] == LOADED, f"{answer['cached']} tokens")
        check("linker: the answer is the control's, bit for bit", same(answer, control))
        link.close()
        link = start("linker 2", "linker")
        answer = link.ask(prompt)
        check("linker: another process loads it", answer["cached"] == LOADED, f"{answer['cached']} tokens")
        check("linker: its answer is the control's, bit for bit", same(answer, control))
        link.close()

    parts = {"storage": storage, "linker": linker}
    for part in parts.values() if args.only is None else [parts[args.only]]:
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            work = Path(directory)
            (work / "file").mkdir()
            part(partial(started, args, work, stack))
            if not all(holds for _, holds, _ in rows):
                for log in sorted(work.glob("*.log")):
                    print(f"---- {log.name}\n" + "\n".join(log.read_text().splitlines()[-25:]))
    print(f"\n{time.strftime('%Y-%m-%d')}, {time.monotonic() - begun:.0f} s:\n")
    for what, holds, detail in rows:
        print(f"* {'' if holds else 'WRONG: '}{what}" + (f" ({detail})" if detail else ""))
    return 0 if all(holds for _, holds, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
