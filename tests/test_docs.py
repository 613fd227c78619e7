"""Every code block of the README and of docs/ is executed, by its language:

* `yaml`, `toml`: loads as a configuration. `toml pyproject` announces plugins in groups that exist.
* `python`: runs in a process of its own, in an empty directory that holds `examples/`. `python tiny-model` gets a
  tiny random Llama as `model` and a prompt as `inputs` first.
* `bash`: `lmcachectl` lines run; of `make` lines the target must exist. `bash no-run` is for what needs a server, a
  download or another machine, and may only start with one of `NOT_RUN`.
* `text` and `json` are not code.

With the word `shelf` a block finds the tutorial's first plugin installed, as the tutorial writes it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lmcache_core.config import load
from lmcache_core.plugins import GROUPS

ROOT = Path(__file__).parent.parent
NOT_RUN = (
    "pip install",
    "python -m vllm",
    "python -m venv",
    "git clone",
    "vllm serve",
    "curl ",
    "apt-get ",
    "sudo ",
    "export ",
    "#",
)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TINY_MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=None, bos_token_id=None)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 128, (1, 600))
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
"""


def blocks() -> list[object]:
    found = []
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = file.read_text()
        for match in FENCE.finditer(text):
            line = text[: match.start()].count("\n") + 1
            info = match.group(1).strip()
            found.append(pytest.param(info, match.group(2), id=f"{file.relative_to(ROOT)}:{line}:{info or 'none'}"))
    return found


def block(page: Path, info: str) -> str:
    """The one block of a page with these words after its fence."""
    (code,) = (match.group(2) for match in FENCE.finditer(page.read_text()) if match.group(1).strip() == info)
    return code


def install_shelf(place: Path) -> None:
    """The tutorial's plugin as an installed distribution."""
    page = ROOT / "docs" / "plugins.md"
    project = tomllib.loads(block(page, "toml pyproject"))
    name, version = project["project"]["name"], project["project"]["version"]
    (module,) = project["tool"]["setuptools"]["py-modules"]
    (place / f"{module}.py").write_text(block(page, "python first-plugin"))
    info = place / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    entries = [
        f"[{group}]\n" + "\n".join(f"{key} = {value}" for key, value in each.items())
        for group, each in project["project"]["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(entries))


@pytest.mark.parametrize("info, code", blocks())
def test_block(info: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    language, _, option = info.partition(" ")
    if option == "shelf":
        install_shelf(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    if (language, option) == ("toml", "pyproject"):
        assert set(tomllib.loads(code)["project"]["entry-points"]) <= set(GROUPS)
    elif language in ("yaml", "toml"):
        file = tmp_path / f"config.{language}"
        file.write_text(code)
        assert load(file, env={}).config.tiers
    elif language == "python":
        prelude = TINY_MODEL if option == "tiny-model" else ""
        run([sys.executable, "-W", "error::SyntaxWarning", "-c", prelude + code], tmp_path)
    elif language == "bash":
        for line in commands(code):
            words = line.split("#")[0].split()
            if option == "no-run":
                assert line.startswith(NOT_RUN), f"{line!r} could be run: drop `no-run`, or say why in NOT_RUN"
            elif words[0] == "make":
                run(["make", "-n", *words[1:]], ROOT)
            elif words[0] == "lmcachectl":
                run([str(Path(sys.executable).parent / words[0]), *words[1:]], tmp_path)
            else:
                pytest.fail(f"nobody runs {line!r}: use lmcachectl or make, or mark the block `bash no-run`")
    else:
        assert language in ("text", "json", "mermaid"), f"a block of unknown language {info!r}"


def commands(code: str) -> list[str]:
    joined = code.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command} -> {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_relative_links_exist() -> None:
    missing = []
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
            if not (file.parent / target).exists():
                missing.append(f"{file.relative_to(ROOT)} -> {target}")
    assert not missing, missing


def test_every_test_named_in_the_promises_exists() -> None:
    folders = [ROOT / "tests", *(ROOT / "plugins_example").glob("*/tests")]
    sources = [path.read_text() for folder in folders for path in folder.rglob("*.py")]
    text = (ROOT / "docs" / "promises.md").read_text()
    names = set(re.findall(r"`(test_[a-z0-9_]+)`", text))
    assert len(names) > 40
    assert not [name for name in names if not any(f"def {name}(" in source for source in sources)]
    assert not [file for file in re.findall(r"`(tests/[a-z0-9_/]+\.py)`", text) if not (ROOT / file).exists()]
