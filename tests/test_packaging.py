"""The house itself: what is in the wheel, that it builds anywhere, which way imports point, and what is forbidden."""

from __future__ import annotations

import ast
import configparser
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lmcache_core", "lmcache_backends", "lmcache_serde")
LIBRARY = "lmcache_core/liblmcache_host.so"

# Run with `-I -S`, so that no installed lmcache-core is in the way: argv is the directory to import from, then a
# directory with the dependencies.
ROUND_TRIP = """
import sys
sys.path[:0] = sys.argv[1:]
import numpy as np
import lmcache_core, lmcache_backends.cpu, lmcache_serde.zstd
from lmcache_core import _native
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.keys import as_int32
from lmcache_core.layout import KVLayout

assert lmcache_core.__file__.startswith(sys.argv[1]), lmcache_core.__file__
layout = KVLayout("lknhd", "bfloat16", 1, 2, 1, 16, chunk_tokens=32, block_tokens=16)
pages = np.arange(2 * 2 * 16 * 16, dtype=np.uint16)
out = np.zeros_like(pages)
PagedKV([pages.ctypes.data], PageGeometry.vllm_cpu(layout, "vec"), 2).gather([[1, 0]], [out.ctypes.data])
assert out[0] == 512 and sorted(out) == list(range(1024))
digest = _native.sha256_chain(bytes(32), as_int32([1, 2, 3, 4]), 4)
assert digest.hex().startswith("EXPECTED"), digest.hex()
print(_native.available(), _native.why_not())
"""


def build(out: Path, **env: str) -> tuple[Path, str]:
    """Build the wheel with the tools of this environment; return it and the build's output."""
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "-v", "-w", str(out)]
    command += ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    ran = subprocess.run(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ran.returncode == 0, ran.stdout
    (wheel,) = out.glob("*.whl")
    return wheel, ran.stdout


def run_from(wheel: Path, directory: Path) -> str:
    """Unpack the wheel, run a round trip from it alone, and return what it printed."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    expected = hashlib.sha256(bytes(32) + b"".join(i.to_bytes(4, "little") for i in (1, 2, 3, 4))).hexdigest()
    program = ROUND_TRIP.replace("EXPECTED", expected)
    command = [sys.executable, "-I", "-S", "-c", program, str(directory), sysconfig.get_path("purelib")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler here")
    return build(tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    false = shutil.which("false") or "/bin/false"
    return build(tmp_path_factory.mktemp("wheel"), CC=false, CXX=false, CUDACXX=false)


def test_the_wheel_with_a_compiler(wheel: Path, tmp_path: Path) -> None:
    # One wheel for every CPython: the library is a plain C ABI.
    assert wheel.name.startswith("lmcache_core-")
    assert "-py3-none-linux_" in wheel.name
    assert LIBRARY in zipfile.ZipFile(wheel).namelist()
    if shutil.which("nvcc"):
        assert "lmcache_core/liblmcache_cuda.so" in zipfile.ZipFile(wheel).namelist()
    assert run_from(wheel, tmp_path) == "True"


def test_the_wheel_without_a_compiler(without_compiler: tuple[Path, str], tmp_path: Path) -> None:
    wheel, log = without_compiler
    assert "No working C++ compiler" in log
    assert "Fix: install g++ or clang++" in " ".join(log.split())  # CMake wraps its warnings
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    printed = run_from(wheel, tmp_path)
    assert printed.startswith("False")
    assert "install a C++17 compiler and reinstall" in printed


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sources <= set(names)
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "lmcache_core" / "cli" / "templates").iterdir()}
    assert templates and templates <= set(names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".txt")) and name.startswith("csrc")]
    entries = configparser.ConfigParser()
    entries.read_string(archive.read(f"{info}/entry_points.txt").decode())
    # The names of the other project's commands are not ours to take.
    assert dict(entries["console_scripts"]) == {"lmcachectl": "lmcache_core.cli:main"}
    assert set(entries["lmcache.backends"]) == {"cpu", "fsspec", "gds", "gpu", "redis"}
    assert set(entries["lmcache.serdes"]) == {"cachegen", "raw", "zstd"}
    assert set(entries["lmcache.evictions"]) == {"lru"}


def test_the_library_exports_its_own_functions_and_needs_only_libc(wheel: Path, tmp_path: Path) -> None:
    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("no binutils here")
    library = zipfile.ZipFile(wheel).extract(LIBRARY, tmp_path)
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in symbols.stdout.splitlines()}
    header = "".join((ROOT / f"csrc/include/lmcache_{name}.h").read_text() for name in ("host", "codec"))
    assert exported
    assert all(name.startswith("lmc_") and f" {name}(" in header for name in exported)
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert {name.split(".so")[0] for name in needed} <= {"libc", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}


# The sources.

# At run time a module may import only from rows above its own (or its own package).
ROWS = (
    {"types", "errors", "canonical", "spelling", "_native"},
    {"layout", "redact", "units", "_cuda"},
    {"protocols", "identity", "seal", "copies"},
    {"tenancy", "gpu"},
    {"hookspecs", "keys", "slots", "lanes", "plan", "cost", "aio"},
    {"plugins", "eviction", "books", "doorway", "mirror", "handles"},
    {"tier"},
    {"writedown", "ladder"},
    {"config", "pipeline", "isolation"},
    {"build"},
    {"adapters", "engine"},
    {"testing"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
PUBLIC = {
    "aio",
    "types",
    "errors",
    "units",
    "layout",
    "copies",
    "protocols",
    "hookspecs",
    "isolation",
    "redact",
    "seal",
    "testing",
    "_cuda",
    "_native",
}
"""What backends and serdes are built on: ours use what anybody's may use."""
ENGINE_ROOM = {
    "slots",
    "lanes",
    "plan",
    "cost",
    "tenancy",
    "books",
    "doorway",
    "mirror",
    "tier",
    "handles",
    "writedown",
    "pipeline",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
by_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, whether `import a.b` or `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


class _RunTime(ast.NodeTransformer):
    """Leaves out what only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def component(name: str) -> tuple[str, str]:
    """Package and first-level module of a dotted name or of a source's path."""
    package, _, rest = name.partition(".")
    return package, rest.split(".")[0]


def dotted(source: Path) -> str:
    return ".".join(source.relative_to(ROOT).with_suffix("").parts)


def of(source: Path) -> tuple[str, str]:
    return component(dotted(source))


@by_source
def test_imports_point_one_way(source: Path) -> None:
    package, module = of(source)
    for name in imported(_RunTime().visit(ast.parse(source.read_text()))):
        to_package, target = component(name)
        if to_package not in PACKAGES:
            continue
        if package == "lmcache_core":
            if module == "__init__":
                pytest.fail(f"{source.name} must import nothing first-party, it imports {name}")
            if to_package != "lmcache_core":
                assert RANK[module] > RANK["build"], f"{module} imports {name}: the core does not know its plugins"
            elif target != module:
                assert RANK[target] < RANK[module], f"{module} imports {name}"
        elif to_package == "lmcache_core":
            assert target in PUBLIC, f"{source.name} imports {name}, which is not public to plugins"
        else:
            assert to_package == package, f"{source.name} imports {name}"


@by_source
def test_first_party_imports_are_at_the_top(source: Path) -> None:
    for function in ast.walk(ast.parse(source.read_text())):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = [name for name in imported(function) if component(name)[0] in PACKAGES]
            assert not inside, f"{function.name} imports {inside}"


@pytest.mark.parametrize("module", sorted(ENGINE_ROOM))
def test_the_engine_room_knows_neither_pluggy_nor_pydantic(module: str) -> None:
    (source,) = (path for path in SOURCES if of(path) == ("lmcache_core", module))
    roots = {component(name)[0] for name in imported(ast.parse(source.read_text()))}
    assert not roots & {"pluggy", "pydantic", "torch"}


@by_source
def test_nothing_that_runs_what_it_reads(source: Path) -> None:
    tree = ast.parse(source.read_text())
    assert not {component(name)[0] for name in imported(tree)} & FORBIDDEN_MODULES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in FORBIDDEN_CALLS, f"line {node.lineno}: {name}"
        if name.split(".")[-1] == "import_module":
            literal = node.args and isinstance(node.args[0], ast.Constant)
            assert literal, f"line {node.lineno}: a module's name must never come from data"
        if any(keyword.arg == "shell" for keyword in node.keywords):
            pytest.fail(f"line {node.lineno}: shell=")


def test_the_core_imports_no_engine_and_no_driver() -> None:
    # What runs an engine, in a process of its own where it is not an adapter.
    engines = ("lmcache_core.adapters", "lmcache_core.cli.demo_phase", "lmcache_core.__main__")
    names = [dotted(source).removesuffix(".__init__") for source in SOURCES]
    program = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = {"torch", "transformers", "vllm", "cufile", "redis", "fsspec"} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-c", program, *(name for name in names if not name.startswith(engines))]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_every_module_has_a_row() -> None:
    modules = {of(path)[1] for path in SOURCES if of(path)[0] == "lmcache_core"} - {"__init__"}
    assert modules <= set(RANK), f"give {sorted(modules - set(RANK))} a row in ROWS"
