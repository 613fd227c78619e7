"""Read from vLLM's sources what the adapter rests on, without importing them; prints JSON for vllm_api.json.

usage: vllm_api.py (WHEEL | SITE_PACKAGES)...

A wheel costs no installation, so that every version the adapter supports can be checked on every run.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

_SOURCES = {
    "methods": ("vllm/distributed/kv_transfer/kv_connector/v1/base.py", "KVConnectorBase_V1"),
    "SchedulerOutput": ("vllm/v1/core/sched/output.py", "SchedulerOutput"),
    "KVConnectorBlockState": ("vllm/v1/core/sched/output.py", "KVConnectorBlockState"),
    "KVConnectorOutput": ("vllm/v1/outputs.py", "KVConnectorOutput"),
    "FullAttentionSpec": ("vllm/v1/kv_cache_interface.py", "FullAttentionSpec"),
    "AttentionSpec": ("vllm/v1/kv_cache_interface.py", "AttentionSpec"),
    "KVCacheSpec": ("vllm/v1/kv_cache_interface.py", "KVCacheSpec"),
    "MultiModalFeatureSpec": ("vllm/multimodal/inputs.py", "MultiModalFeatureSpec"),
    "Request": ("vllm/v1/request.py", "Request"),
}


def read(root: Path, name: str) -> str:
    """A source file of an installation or of a wheel."""
    if root.is_dir():
        return (root / name).read_text(encoding="utf-8")
    with zipfile.ZipFile(root) as wheel:
        return wheel.read(name).decode()


def describe(root: Path) -> dict[str, object]:
    """Methods with their parameters, abstract ones, fields of data classes, and parameters of a request."""
    fields: dict[str, list[str]] = {}
    methods: dict[str, list[str]] = {}
    abstract: list[str] = []
    request: list[str] = []
    for key, (file, name) in _SOURCES.items():
        tree = ast.parse(read(root, file))
        (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
        for node in found.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields.setdefault(key, []).append(node.target.id)
            if isinstance(node, ast.FunctionDef) and key in ("methods", "Request"):
                arguments = node.args
                names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
                names = [n for n in names if n not in ("self", "cls")]
                if key == "Request" and node.name == "__init__":
                    request = names
                elif key == "methods":
                    methods[node.name] = names
                    if any(isinstance(d, ast.Name) and d.id == "abstractmethod" for d in node.decorator_list):
                        abstract.append(node.name)
    fields.pop("methods", None)
    inherited = fields.pop("KVCacheSpec") + fields.pop("AttentionSpec")
    fields["FullAttentionSpec"] = inherited + fields["FullAttentionSpec"]
    return {"methods": methods, "abstract": sorted(abstract), "fields": fields, "request": request}


def main(arguments: Sequence[str]) -> None:
    found = {}
    for argument in arguments:
        root = Path(argument)
        version = read(root, "vllm/_version.py").partition("__version__ = version = '")[2].partition("'")[0]
        found[version.partition("+")[0]] = describe(root)
    lines = [f"{json.dumps(version)}: {json.dumps(found[version], sort_keys=True)}" for version in sorted(found)]
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main(sys.argv[1:])
