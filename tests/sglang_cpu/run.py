"""The adapter in the real SGLang engine, several processes on one store: `make test-sglang`.

    control   SGLang's own `file` backend: one process stores a prompt, another loads it
    A, B      ours, alive at the same time on one directory: B loads what A stored, A loads what B stored; A has pages
              `page_first_direct` and the v1 interface, B `layer_first` and the legacy one
    linker    without a host pool: store, forget, load again; then another process

Every answer from loaded pages must be the control's, token for token and bit for bit in its log probabilities.
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
from contextlib import ExitStack, suppress
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


def prompt(seed: int) -> list[int]:
    """Token ids that no other seed begins with."""
    return [(seed * 7919 + i * 104729 + i * i * 31) % 40000 + 1000 for i in range(PROMPT)]


def same(answer: Any, control: Any) -> bool:
    return bool(answer["tokens"] == control["tokens"] and answer["logprobs"] == control["logprobs"])


def main() -> int:
    """Run everything; 0 when all of it holds, 77 when nothing can run here."""
    parser = argparse.ArgumentParser(description="the real SGLang engine over one store")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-sglang/bin/python")
    parser.add_argument("--model", default=str(ROOT / ".models/smollm2-135m-instruct"))
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

    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        work = Path(directory)
        (work / "file").mkdir()

        def start(name: str, kind: str, layout: str = "page_first_direct", v1: bool = True, sub: str = "") -> Process:
            process = Process(args.python, args.model, kind, work / sub, layout, v1, work / f"{name}.log")
            stack.callback(process.close)
            if process.answer() != "up":
                raise SystemExit(f"{name} did not start")
            return process

        one, two = prompt(1), prompt(2)
        first = start("control 1", "file")
        cold = {1: first.ask(one), 2: first.ask(two)}
        first.close()
        second = start("control 2", "file")
        control = {1: second.ask(one), 2: second.ask(two)}
        second.close()
        stored = [answer["details"]["storage"] for answer in control.values()]
        check("control: `file` loads both prompts", stored == [LOADED, LOADED], stored)

        a = start("a", "storage")
        check("A computes prompt 1 as the control did", same(a.ask(one), cold[1]))
        b = start("b", "storage", layout="layer_first", v1=False)
        answer = b.ask(one)
        check("B loads prompt 1 from A's store", answer["details"]["storage"] == LOADED, answer["details"])
        check("B's answer is the control's, bit for bit", same(answer, control[1]))
        check("B computes prompt 2 as the control did", same(b.ask(two), cold[2]))
        answer = a.ask(two)
        check("A loads prompt 2 from B's store", answer["details"]["storage"] == LOADED, answer["details"])
        check("A's answer is the control's, bit for bit", same(answer, control[2]))
        a.close()
        b.close()

        (work / "linked").mkdir()
        link = start("linker 1", "linker", sub="linked")
        check("linker: computes prompt 1 as the control did", same(link.ask(one), cold[1]))
        link.ask("flush")
        answer = link.ask(one)
        check("linker: loads it after a flush", answer["cached"] == LOADED, answer["cached"])
        check("linker: the answer is the control's, bit for bit", same(answer, control[1]))
        link.close()
        link = start("linker 2", "linker", sub="linked")
        answer = link.ask(one)
        check("linker: another process loads it", answer["cached"] == LOADED, answer["cached"])
        check("linker: its answer is the control's, bit for bit", same(answer, control[1]))
        link.close()
        if not all(holds for _, holds, _ in rows):
            for log in sorted(work.glob("*.log")):
                print(f"---- {log.name}\n" + "\n".join(log.read_text().splitlines()[-25:]))
    print(f"\n{time.strftime('%Y-%m-%d')}, {time.monotonic() - begun:.0f} s:\n")
    for what, holds, detail in rows:
        print(f"* {'' if holds else 'WRONG: '}{what}" + (f" ({detail})" if detail else ""))
    return 0 if all(holds for _, holds, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
