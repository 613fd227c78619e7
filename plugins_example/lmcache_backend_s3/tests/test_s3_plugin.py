"""The s3 plugin as a distribution: its wheel, its size, its settings."""

import configparser
import secrets
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from lmcache_backend_s3 import S3Config
from pydantic import ValidationError

from lmcache_core.errors import BackendUnavailable
from lmcache_core.protocols import BuildContext

ROOT = Path(__file__).parents[1]

# Run with -I -S: only the wheel, lmcache-core's sources and the dependencies are there.
PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]
from lmcache_core.plugins import BACKENDS, Plugins
plugins = Plugins()
before = "lmcache_backend_s3" in sys.modules
config = plugins.backend("s3")(url="s3://bucket/kv")
print(before, type(config).__module__, sys.modules["lmcache_backend_s3"].__file__.startswith(sys.argv[1]))
"""


def test_the_plugin_is_a_wheel_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", str(source), "-w", str(tmp_path), "--no-deps", "--no-index"]
    ran = subprocess.run(
        [*command, "--no-build-isolation", "--disable-pip-version-check"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("lmcache_backend_s3-0.1.0-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert sorted(names) == [f"lmcache_backend_s3/{name}" for name in ("__init__.py", "py.typed", "rig.py")]
        entries = configparser.ConfigParser()
        entries.read_string(archive.read("lmcache_backend_s3-0.1.0.dist-info/entry_points.txt").decode())
        assert dict(entries["lmcache.backends"]) == {"s3": "lmcache_backend_s3"}
        assert dict(entries["lmcache.rigs"]) == {"s3": "lmcache_backend_s3.rig:S3Rig"}
        archive.extractall(tmp_path / "site")
    core = Path(sys.modules["lmcache_core"].__file__ or "").parents[1]
    paths = [str(tmp_path / "site"), str(core), sysconfig.get_path("purelib")]
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", PROGRAM, *paths], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "False lmcache_backend_s3 True\n"


def test_the_plugin_stays_small() -> None:
    assert len((ROOT / "lmcache_backend_s3/__init__.py").read_text().splitlines()) < 100


def test_secrets_are_shown_nowhere() -> None:
    canary = f"canary-{secrets.token_hex(8)}"
    config = S3Config(url="s3://bucket/kv", access_key_id="id", secret_access_key=canary, session_token=canary)
    for text in (repr(config), str(config), config.model_dump_json(), repr(config.model_dump())):
        assert canary not in text
    local = S3Config.model_validate({**config.model_dump(), "endpoint": "http://127.0.0.1:1", "allow_http": True})
    with pytest.raises(BackendUnavailable, match="tier `cold`: s3://bucket/kv") as caught:
        local.build(BuildContext("cold", 8192, None, 4, False, 1.0))
    assert canary not in str(caught.value)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"url": "bucket/kv"}, "url"),
        ({"url": "s3://"}, "url"),
        ({"url": "s3://bucket/kv", "endpoint": "localhost:8333"}, "endpoint"),
        ({"url": "s3://bucket/kv", "endpoint": "http://localhost:8333"}, "allow_http: true"),
        ({"url": "s3://bucket/kv", "concurrency": 0}, "concurrency"),
        ({"url": "s3://bucket/kv", "buckt": "x"}, "buckt"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        S3Config.model_validate(settings)
