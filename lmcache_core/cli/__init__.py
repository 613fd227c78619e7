"""`lmcachectl`. Each sub-command is a module with `add(subparsers)` and `run(args) -> int` (set as a parser default).

Results go to stdout (with `--json`, the last line is one JSON object), progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from lmcache_core import redact
from lmcache_core.cli import (
    bench,
    check,
    codec_cmd,
    config_cmd,
    demo,
    engine_args,
    explain,
    model,
    plugin,
    plugins,
    schema,
)
from lmcache_core.cli.console import OK, PROBLEM, USAGE, emit
from lmcache_core.errors import ConfigError, LMCacheError, PluginError

COMMANDS = (demo, check, explain, config_cmd, plugins, plugin, schema, engine_args, bench, codec_cmd, model)

EPILOG = """\
exit codes:
  0    fine
  1    something does not work: a tier failed its check, a medium is away
  2    the configuration, a plugin or the command line is wrong; nothing was started
  130  interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lmcachectl` with the given arguments and return its exit code."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as error:
        if error.code and "--json" in (sys.argv[1:] if argv is None else argv):
            emit({"ok": False, "error": "the command line is wrong: see stderr"})
        raise
    code: int = OK
    try:
        with _told_to_end():
            code = args.run(args)
            if sys.stdout is not None:  # closed by whoever started us
                sys.stdout.flush()
    except ConfigError as error:
        problems = [
            {name: str(getattr(problem, name)) for name in ("code", "where", "path", "value", "what", "why", "fix")}
            for problem in error.problems
        ]
        return _fail(args, USAGE, str(error), {"problems": problems})
    except PluginError as error:
        return _fail(args, USAGE, str(error), {"error": str(error)})
    except LMCacheError as error:
        return _fail(args, PROBLEM, str(error), {"error": str(error)})
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has seen enough; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:
            raise
        return _fail(args, PROBLEM, *_unexpected(f"a plugin ended the process: SystemExit: {error.code}"))
    except OSError as error:
        return _fail(args, PROBLEM, *_unexpected(str(error)))
    except Exception as error:
        traceback.print_exc()
        return _fail(args, PROBLEM, *_unexpected(f"{type(error).__name__}: {error}"))
    return code


def _unexpected(text: str) -> tuple[str, dict[str, object]]:
    text = redact.hide_urls(text)
    return text, {"error": text}


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Who is told to end, or whose terminal goes away, cleans up like one who is interrupted: files and servers."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    numbers = numbers if threading.current_thread() is threading.main_thread() else []
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmcachectl",
        description="Check, explain and try exact-or-miss KV-cache tiers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lmcachectl {_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(subparsers)
    return parser


def _version() -> str:
    try:
        return version("lmcache-core")
    except PackageNotFoundError:
        return "(not installed)"


def _fail(args: argparse.Namespace, code: int, text: str, record: dict[str, object]) -> int:
    print(text or "failed without a message", file=sys.stderr)
    if getattr(args, "json", False):
        emit({"ok": False, **record})
    return code
