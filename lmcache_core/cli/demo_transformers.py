"""The demo on Hugging Face Transformers: one process per phase (see `demo_phase`), so that a restart is a restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from lmcache_core.cli.demo_common import (
    DISK,
    DRAM,
    RECOMPUTE,
    Answer,
    DemoOptions,
    DemoResult,
    Report,
)
from lmcache_core.errors import LMCacheError

CONTROL_IS = "cache off, the document's KV kept by the engine itself in the same process (equal computation)"


def run(options: DemoOptions, report: Report) -> DemoResult:
    """Tell the story in two processes and gather what they measured. Raise `LMCacheError` when one fails."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise LMCacheError(f"{' and '.join(missing)} must be installed: pip install 'lmcache-core[transformers]'")
    first = _phase("first", options, report)
    restart = _phase("restart", options, report)
    return DemoResult(
        engine="transformers",
        model=first["model"],
        device=first["device"],
        dtype=first["dtype"],
        prompt_tokens=first["prompt_tokens"],
        phases={
            RECOMPUTE: [Answer(**answer) for answer in first["recompute"]],
            "cold": [Answer(**answer) for answer in first["cold"]],
            DRAM: [Answer(**answer) for answer in first["dram"]],
            DISK: [Answer(**answer) for answer in restart["disk"]],
        },
        control=first["control"],
        control_is=CONTROL_IS,
        notes=[*first["notes"], *restart["notes"]],
    )


def _phase(name: str, options: DemoOptions, report: Report) -> dict[str, Any]:
    """Run one phase in a process of its own; its lines on stdout are progress."""
    result = options.work / f"{name}.json"
    command = [sys.executable, "-m", "lmcache_core.cli.demo_phase", name, str(options.save()), str(result)]
    # Threads that spin while they wait make every figure on a busy machine worse, ours and the control's.
    environment = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", **os.environ}
    log = options.work / f"{name}.log"
    with (
        log.open("w") as errors,
        report.step(f"[{name}] starting a process") as say,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                say(f"[{name}] {line.rstrip()}")
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
        raise LMCacheError(f"the {name} phase ended with status {process.returncode}:\n{tail}")
    record: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return record
