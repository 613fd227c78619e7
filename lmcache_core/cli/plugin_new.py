"""`lmcachectl plugin new NAME`: a package that works, with its test, to be changed into what its author wants."""

from __future__ import annotations

import argparse
import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from lmcache_core.cli.console import OK, add_json, emit
from lmcache_core.errors import ConfigError, LMCacheError, Problem
from lmcache_core.plugins import BACKENDS, EVICTIONS, NOUNS, PLUGINS, SERDES, installed

_TEMPLATES = Path(__file__).parent / "templates"
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST = 24
"""A serde's codec is its name and a number, in 32 bytes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of plugin and what the files of its package are made from."""

    group: str
    word: str
    """Between `lmcache_` and the name, in the package's name."""
    example: str
    """How a configuration names it."""
    files: dict[str, str]
    """Template -> path in the package's directory."""


_COMMON = {
    "pyproject.toml.tmpl": "pyproject.toml",
    "README.md.tmpl": "README.md",
    "py.typed.tmpl": "$package/py.typed",
}
KINDS = {
    "backend": Kind(
        BACKENDS,
        "backend",
        "- {name: mine, capacity: 1GiB, backend: {type: $name, path: /var/tmp/$name}}",
        {
            **_COMMON,
            "backend.py.tmpl": "$package/__init__.py",
            "backend_rig.py.tmpl": "$package/rig.py",
            "backend_test.py.tmpl": "tests/test_$name.py",
        },
    ),
    "serde": Kind(
        SERDES,
        "serde",
        "- {name: disk, capacity: 1GiB, serde: {type: $name}, backend: {type: gds, path: /var/tmp/$name}}",
        {**_COMMON, "serde.py.tmpl": "$package/__init__.py", "serde_test.py.tmpl": "tests/test_$name.py"},
    ),
    "eviction": Kind(
        EVICTIONS,
        "eviction",
        "- {name: disk, capacity: 1GiB, eviction: {type: $name}, backend: {type: gds, path: /var/tmp/$name}}",
        {**_COMMON, "eviction.py.tmpl": "$package/__init__.py", "eviction_test.py.tmpl": "tests/test_$name.py"},
    ),
    "wrapper": Kind(
        PLUGINS,
        "wrapper",
        "plugins: [$name]",
        {**_COMMON, "wrapper.py.tmpl": "$package/__init__.py", "wrapper_test.py.tmpl": "tests/test_$name.py"},
    ),
}


def register(kinds: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "new",
        help="write a complete working plugin package to start from",
        description="Write a package that works as it is and passes its test, to be changed into what you want. "
        "Nothing that exists is overwritten.",
    )
    parser.add_argument("name", metavar="NAME", help="what a configuration will name it by, e.g. s3x")
    parser.add_argument("--kind", choices=list(KINDS), default="backend", help="(default: backend)")
    parser.add_argument("--dir", type=Path, default=Path("."), metavar="DIR", help="where (default: here)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the package and say what to do with it."""
    root, files = write(args.name, args.kind, args.dir)
    if args.json:
        emit({"ok": True, "name": args.name, "kind": args.kind, "directory": str(root), "files": files})
        return OK
    print(f"wrote {root}")
    for file in files:
        print(f"  {file}")
    print(f"next:\n  cd {root}\n  pip install -e '.[test]'\n  pytest\n  lmcachectl plugin test {args.name}")
    return OK


def write(name: str, kind: str, directory: Path) -> tuple[Path, list[str]]:
    """Write a package `name` of a kind below `directory`; return its directory and the files in it.

    Raise `ConfigError` for a name that cannot be one, `LMCacheError` when something is in the way.
    """
    what = KINDS[kind]
    _check_name(name, what)
    package = f"lmcache_{what.word}_{name}"
    words = {
        "name": name,
        "kind": kind,
        "noun": NOUNS[what.group].capitalize() if what.group != PLUGINS else "Wrapper",
        "package": package,
        "distribution": package.replace("_", "-"),
        "group": what.group,
        "Class": "".join(part.capitalize() for part in name.split("_")),
        "extra_entries": "",
    }
    words["example"] = Template(what.example).substitute(words)
    if kind == "backend":
        words["extra_entries"] = (
            f'\n[project.entry-points."lmcache.rigs"]\n{name} = "{package}.rig:{words["Class"]}Rig"\n'
        )
    root = directory / package
    texts = {
        Template(path).substitute(words): Template((_TEMPLATES / template).read_text(encoding="utf-8")).substitute(
            words
        )
        for template, path in what.files.items()
    }
    try:
        root.mkdir(parents=True)
        for path, text in texts.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, encoding="utf-8")
    except FileExistsError:
        raise LMCacheError(f"{root} exists, and nothing is overwritten: choose another name or --dir") from None
    except OSError as error:
        raise LMCacheError(f"cannot write {root}: {error.strerror}; choose another place with --dir") from error
    return root, sorted(texts)


def _check_name(name: str, kind: Kind) -> None:
    what = fix = ""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        what = "is no plugin name: small letters, digits and single underscores, beginning with a letter"
        what += f", at most {_LONGEST} characters"
        near = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_0123456789")[:_LONGEST].strip("_")
        fix = f"for instance `{near}`" if _NAME.fullmatch(near) else "for instance `s3x`"
    elif keyword.iskeyword(name) or keyword.issoftkeyword(name):
        what = "is a word of Python"
        fix = f"for instance `{name}_kv`"
    elif name in ("null", "true", "false"):
        what = "is a word of YAML, which would not read it as text"
        fix = f"for instance `{name}_kv`"
    elif name in ("storage", "memory", "backend", "serde", "eviction", "plugin"):
        what = "would name a class like one of lmcache-core"
        fix = f"for instance `my_{name}`"
    else:
        taken = [plugin for plugin in installed() if (plugin.group, plugin.name) == (kind.group, name)]
        if taken:
            what = f"is a {NOUNS[kind.group]} of {taken[0].distribution} already; with two, neither would start"
            fix = f"for instance `my_{name}`"
    if what:
        raise ConfigError([Problem(where="command line", path="NAME", what=f"`{name}` {what}", fix=fix)])
