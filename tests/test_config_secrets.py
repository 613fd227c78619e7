"""Seeded secrets stay out of everything that is printed: every command, every error, every form."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_mutants import FAR_MODEL
from dists import Distributions

from lmcache_core import plugins, redact
from lmcache_core.cli import main
from lmcache_core.config import load
from lmcache_core.errors import ConfigError

Capture = pytest.CaptureFixture[str]

SECRET = "canary"
"""Every secret of these tests begins with this word, and nothing else does."""

GOOD = """\
chunk_tokens: 16
tenancy: {secret: canary-of-all-tenants}
tiers:
  - {name: dram, capacity: 4MiB, backend: {type: cpu}}
  - name: far
    backend:
      type: far
      url: 'far://user:canary-url@host/kv?token=canary-query&a=1'
      access_key: canary-typed
  - name: store
    backend:
      type: fsspec
      url: memory://kv
      storage_options:
        secret: canary-option
        client_kwargs: {aws_session_token: canary-nested, plain: visible}
  - name: away
    backend:
      type: redis
      url: redis://127.0.0.1:9
      username: me
"""

BROKEN = {
    "a typo beside a secret": ("access_key: canary-typed", "acess_key: canary-typo"),
    "a secret of a wrong type": ("access_key: canary-typed", "access_key: [canary-list]"),
    "a secret given twice": ("access_key: canary-typed", "access_key: canary-a\n      access_key: canary-b"),
    "a secret under a tag": ("access_key: canary-typed", "access_key: !!str canary-tag"),
    "a secret that looks like a tag": ("access_key: canary-typed", "access_key: !canary-tag"),
    "a secret that looks like an alias": ("access_key: canary-typed", "access_key: *canary-alias"),
    "a secret that looks like an anchor": ("access_key: canary-typed", "access_key: &canary-anchor"),
    "a long secret in a misspelt url": ("url: redis://127.0.0.1:9", f"ulr: redis://u:canary-{'x' * 80}@h:9"),
    "a quote in a password": ("url: redis://127.0.0.1:9", "ulr: redis://u:it's-canary@h:9"),
    "a secret with an open quote": ("access_key: canary-typed", 'access_key: "canary-quote'),
    "a secret over two lines": ("access_key: canary-typed", "access_key: canary-a\n        canary-b"),
    "a secret without a colon": ("access_key: canary-typed", "access_key canary-colon"),
    "an unknown password": ("access_key: canary-typed", "password: canary-unknown"),
    "an unknown number": ("access_key: canary-typed", "password: 55512345"),
    "a password in another place": ("chunk_tokens: 16", "password: canary-top"),
    "a url of a wrong type": ("memory://kv", "[ 'memory://u:canary-list@kv' ]"),
    "a url without a store": ("memory://kv", "memory:u:canary-user@kv"),
    "two passwords": ("url: redis://127.0.0.1:9", "url: redis://u:canary-one@h:9\n      password: canary-two"),
    "a wrong redis url": ("redis://127.0.0.1:9", "redos://u:canary-scheme@h:9"),
    "a misspelt password": ("username: me", "pasword: canary-misspelt"),
    "a misspelt password with a list": ("username: me", "passwort: [canary-list]"),
    "a key that is a secret": ("secret: canary-option", "secret: canary-option\n      passwrd: canary-key"),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in __import__("os").environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(plugins, "installed", functools.cache(plugins.installed))
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    module = site / f"{Distributions(site).backend('far')}.py"
    source = module.read_text().replace("class Config(BackendConfig):", FAR_MODEL + "\nclass Config(BackendConfig):")
    error = "raise OSError(f'no route to {self.url} as {self.access_key.get_secret_value()}')"
    module.write_text(source.replace("def build(self, context): return Store()", f"def build(self, context): {error}"))
    yield
    for name in [n for n, m in sys.modules.items() if str(site) in str(getattr(m, "__file__", None))]:
        del sys.modules[name]


def everything(capsys: Capture, argv: list[str]) -> str:
    """What a command prints, however it ends."""
    with contextlib.suppress(SystemExit):
        main(argv)
    out, err = capsys.readouterr()
    return out + err


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(
    "command",
    [["check", "--timeout", "2s"], ["explain"], ["plugins"], ["schema"], ["engine-args", "vllm", "--config"]],
    ids=lambda command: command[0],
)
def test_commands_on_a_good_file(
    tmp_path: Path,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    options: list[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "lmcache.yaml"
    file.write_text(GOOD)
    monkeypatch.setenv("LMCACHE__TIERS__AWAY__BACKEND__PASSWORD", "canary-environment")
    monkeypatch.setenv("LMCACHE_REMOTE_URL", "redis://u:canary-classic@h:1")
    printed = everything(capsys, [*command, str(file), *options])
    assert printed.strip()
    assert SECRET not in printed + caplog.text
    if command[0] == "check":
        assert "no route to far://***@host" in printed
    if command[0] == "explain":
        assert "visible" in printed, "what is no secret is shown"


@pytest.mark.parametrize("name", BROKEN)
def test_commands_on_a_broken_file(tmp_path: Path, capsys: Capture, name: str) -> None:
    old, new = BROKEN[name]
    assert GOOD.count(old) == 1
    file = tmp_path / "lmcache.yaml"
    file.write_text(GOOD.replace(old, new))
    for command in (["check"], ["check", "--json"], ["explain"]):
        printed = everything(capsys, [*command, str(file)])
        assert "config" in printed or "problems" in printed
        assert SECRET not in printed
        assert "55512345" not in printed
    with pytest.raises(ConfigError) as error:
        load(file, env={})
    chain: BaseException | None = error.value
    while chain is not None:
        assert SECRET not in str(chain) + repr(chain)
        chain = chain.__cause__ or chain.__context__


@pytest.mark.parametrize(
    "variable",
    [
        "LMCACHE__TIERS__AWAY__BACKEND__PASWORD",
        "LMCACHE__TIERS__NOBODY__BACKEND__PASSWORD",
        "LMCACHE__TIERS__AWAY__BACKEND__PASSWORD__X",
        "LMCACHE__TOKEN",
        "LMCACHE__TIERS__FAR__BACKEND__ACCESS_KEY__",
    ],
)
@pytest.mark.parametrize("value", ["canary-env", '["canary-env"]', '["canary-env"', "redis://u:canary-env@h"])
def test_variables(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text(GOOD)
    monkeypatch.setenv(variable, value)
    printed = everything(capsys, ["explain", str(file)])
    assert variable in printed
    assert SECRET not in printed


def test_converting(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {
        "aws_secret_access_key": "canary-a",
        "password": "canary-b",
        "valkey_password": "canary-c",
        "key": "canary-d",
    }
    urls = [
        "redis://u:canary-e@h:1",
        "s3://b?token=canary-f",
        "lm://u:canary-g@h",
        "fs://u:canary-h@h/x",
    ]
    file = tmp_path / "theirs.yaml"
    for url in urls:
        for bad in ({}, {"chunk_size": "x"}):
            file.write_text(json.dumps({"remote_url": url, "extra_config": extra, "max_local_cpu_size": 0.1, **bad}))
            for options in ([], ["--json"]):
                printed = everything(capsys, ["config", "from-lmcache", str(file), *options])
                assert printed.strip()
                assert SECRET not in printed, url
                assert SECRET not in everything(capsys, ["explain", str(file), *options])
    adapter = {"type": "resp", "host": "h", "port": 1, "password": "canary-i", "token": "canary-j"}
    monkeypatch.setenv("LMCACHE_REMOTE_URL", "rediss://u:canary-k@h:1")
    argv = ["config", "from-lmcache", "--env", "--l2-adapter", json.dumps(adapter), "--json"]
    assert SECRET not in everything(capsys, argv)


def test_models_do_not_show_them_either(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text(GOOD)
    loaded = load(file, env={})
    assert SECRET not in repr(loaded) + str(loaded.config) + repr(loaded.config.tiers[1].backend)


def test_hiding_goes_to_any_depth_and_keeps_the_rest() -> None:
    data = {"a": {"password": "x", "list": [{"api_key": 5, "on": True}]}, "url": "s3://u:p@h/b?sig=1&z=2", "n": None}
    assert redact.hide(data) == {
        "a": {"password": "***", "list": [{"api_key": "***", "on": True}]},
        "url": "s3://***@h/b?sig=***&z=2",
        "n": None,
    }
