"""docs/benchmarks-gpu.md out of what benchmarks/gpu.py measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]


def page(result: Result) -> str:
    """docs/benchmarks-gpu.md."""
    tests, sections = result["tests"], result["sections"]
    lines = [
        "# Benchmarks on a GPU",
        "",
        f"{result['device']}, driver {result['driver']}, CUDA {result['cuda']}, PyTorch {result['torch']};",
        f"{result['date']}; `make gpu`. Medians; GB/s are 10^9 bytes of bfloat16 a second.",
        "",
        f"`tests/gpu`: {tests['summary']}.",
    ]
    for name, (title, tell) in TOLD.items():
        if name not in sections:
            continue
        found = sections[name]
        lines += ["", f"## {title}", ""]
        if found["result"]:
            lines += tell(found["result"])
        if found["error"]:
            lines += ["", f"Not finished: {found['error']}"]
    return "\n".join([*lines, ""])


def _table(head: str, rows: list[list[str]]) -> list[str]:
    return [f"| {head} |", f"|{'---|' * (head.count('|') + 1)}", *(f"| {' | '.join(row)} |" for row in rows)]


def tell_limits(found: Result) -> list[str]:
    rows = [
        [name, f"{found[f'{key}to_host_gb_s']:.1f}", f"{found[f'{key}to_device_gb_s']:.1f}"]
        for name, key in (("allocated by CUDA", ""), ("the `cpu` backend's arena, shared and registered", "arena_"))
    ]
    note = (
        f"On the device: {found['on_device_gb_s']:.0f} GB/s. Arena pinned: {'yes' if found['arena_pinned'] else 'NO'}"
    )
    return [
        "Plain copies of 1 GiB.",
        "",
        *_table("host memory | to it, GB/s | from it, GB/s", rows),
        "",
        f"{note}{'; ' if found['arena_remark'] else '.'}{found['arena_remark']}",
    ]


def tell_pages(found: Result) -> list[str]:
    rows, needed = [], {}
    for row in found["rows"]:
        path = row["path"] + (f", {row['ctas']} blocks" if row["ctas"] else "") + (" *" if row["chosen"] else "")
        cells = [f"{row[f'{verb}_gb_s']:.1f} ({row[f'{verb}_of_limit']:.2f})" for verb in ("gather", "scatter")]
        rows.append([row["slots"], row["layout"], path, *cells])
        if row["ctas"] and min(row["gather_of_limit"], row["scatter_of_limit"]) >= ENOUGH:
            needed.setdefault(row["layout"], row["ctas"])
    few = "; ".join(f"{layout}: {ctas}" for layout, ctas in needed.items()) or "more than 64"
    return [
        "16 chunks of 256 tokens of a Llama-3.1-8B (512 MiB), random blocks of 16 tokens. In brackets, the part of the",
        "plain copy; * is what `GpuPagedKV.choose` takes.",
        "",
        *_table("slots | layout | path | gather | scatter", rows),
        "",
        f"Thread blocks (one for a multiprocessor) that reach {ENOUGH} of the link both ways: {few}.",
    ]


def tell_tier(found: Result) -> list[str]:
    rows = [[row["what"], f"{row['gb_s']:.1f}"] for row in found["rows"]]
    same = "yes" if found["same_bytes"] else "NO"
    return ["64 chunks (2 GiB) of the same layout.", "", *_table("what | GB/s", rows), "", f"Bytes equal: {same}."]


def tell_codec(found: Result) -> list[str]:
    rows = []
    for row in found["rows"]:
        cells = [f"{row[name]:.0f}" for name in ("encode_gb_s", "decode_gb_s", "encode_us", "decode_us")]
        rows.append([row["level"], str(row["chunks"]), f"{row['ratio']:.2f}", *cells])
    equal = all(row.get("equals_host", True) and row["status_ok"] for row in found["rows"])
    head = "level | chunks | ratio | encode GB/s | decode GB/s | encode us | decode us"
    lines = [
        "The same chunks, of random numbers with a model's offsets and scales: the ratio is not a model's.",
        "",
        *_table(head, rows),
        "",
        f"Bytes and values equal to the host's: {'yes' if equal else 'NO'}.",
    ]
    if "by_ctas" in found:
        steps = ", ".join(f"{row['ctas']}: {row['decode_gb_s']:.0f}" for row in found["by_ctas"])
        needed = found["ctas_needed"] or "more than 128"
        lines += [
            f"Decode GB/s by thread blocks (one for a multiprocessor): {steps}. To keep up with the link",
            f"({found['needed_gb_s']:.0f} GB/s decoded): {needed}.",
        ]
    return lines


def tell_ttft(found: Result) -> list[str]:
    names, rows = found["tiers"], []
    for row in found["rows"]:
        cells = [f"{row[f'{n}_s']:.3f} ({row['cold_s'] / row[f'{n}_s']:.0f}x)" for n in names]
        rows.append([str(row["tokens"]), f"{row['cold_s']:.3f}", *cells])
    equal = all(row[f"{n}_tokens_equal"] for row in found["rows"] for n in names)
    pure = all(row[f"{n}_sources"] in ([n], ["computed", n]) for row in found["rows"] for n in names)
    return [
        f"Seconds to the first token, Transformers, random weights of shape {found['shape']} in bfloat16, one prompt;",
        "in brackets, how many times faster than computing it.",
        "",
        *_table(" | ".join(["tokens", "cold", *names]), rows),
        "",
        f"8 greedy tokens equal to the cold run's: {'yes' if equal else 'NO'}.",
        f"Served by the tier named: {'yes' if pure else 'NO'}.",
    ]


ENOUGH = 0.9
TOLD: dict[str, tuple[str, Callable[[Result], list[str]]]] = {
    "ttft": ("Time to first token", tell_ttft),
    "limits": ("Plain copies", tell_limits),
    "tier": ("GPU tier", tell_tier),
    "pages": ("Pages and slots", tell_pages),
    "codec": ("Codec", tell_codec),
}
"""The sections: title, and how they are told."""
