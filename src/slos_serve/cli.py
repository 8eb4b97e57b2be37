"""The `slos-serve` command: one verb per module, imported when it is asked for.

A verb's module has `HELP` (one line), `configure(parser)` and `run(args) -> int`. It may set `TAKES_UNKNOWN = True`
to receive what it does not know as `args.extra`, a list, and all it was given as `args.arguments`.

Exit status: 0 done, 1 the job failed, 2 bad arguments or input, told in one line on standard error, 130 interrupted
(a verb that has said so itself returns 130).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol, cast

from slos_serve import __version__
from slos_serve.errors import MissingExtraError, SlosServeError

VERBS = {
    "serve": "slos_serve.commands.serve",
    "demo": "slos_serve.commands.demo",
    "bench": "slos_serve.commands.bench",
    "profile": "slos_serve.commands.profile",
    "simulate": "slos_serve.commands.simulate",
    "capacity": "slos_serve.commands.capacity",
    "plan": "slos_serve.commands.plan",
    "data": "slos_serve.commands.data",
    "verify": "slos_serve.commands.verify",
    "whatif": "slos_serve.commands.whatif",
    "replay": "slos_serve.commands.replay",
    "explain": "slos_serve.commands.explain",
    "show": "slos_serve.commands.show",
    "compare": "slos_serve.commands.compare",
    "config": "slos_serve.commands.config",
    "completion": "slos_serve.commands.completion",
    "doctor": "slos_serve.commands.doctor",
}


class Verb(Protocol):
    """What a verb's module offers."""

    HELP: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments and, as epilog, an example."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it and return the exit status."""


class Parser(argparse.ArgumentParser):
    """Say what is wrong in one line, as every other bad input is told."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def find_verbs() -> dict[str, str]:
    """Return the verbs whose modules are installed, in the order of `VERBS`."""
    found = {}
    for verb, module in VERBS.items():
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module) is not None:
                found[verb] = module
    return found


def load(module: str) -> Verb:
    """Import a verb's module."""
    return cast("Verb", importlib.import_module(module))


def overview(verbs: dict[str, str]) -> str:
    """Return the help text of the command itself; imports every verb for its one line."""
    lines = [f"  {verb:<10} {load(module).HELP}" for verb, module in verbs.items()]
    return "\n".join(
        [
            "usage: slos-serve VERB [...]        (slos-serve VERB --help tells more)",
            "",
            "Serve language models with latency promises, on vLLM.",
            "",
            *lines,
            "",
            "  --version  print the version",
            "",
            "example: slos-serve serve Qwen/Qwen3-8B --port 8000",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    try:
        return _main(argv)
    except KeyboardInterrupt:  # also while a verb's module is imported
        print("interrupted", file=sys.stderr)
        return 130


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbs = find_verbs()
    first = arguments[0] if arguments else "--help"
    if first in {"-h", "--help", "help"}:
        print(overview(verbs))
        return 0 if arguments else 2
    if first == "--version":
        print(f"slos-serve {__version__}")
        return 0
    if first not in verbs:
        print(f"slos-serve: {first!r}: expected one of {', '.join(verbs)}", file=sys.stderr)
        return 2
    return _run(first, load(verbs[first]), arguments[1:])


def parser_of(name: str, verb: Verb) -> Parser:
    """Return what reads a verb's arguments."""
    parser = Parser(
        prog=f"slos-serve {name}",
        description=verb.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.configure(parser)
    return parser


def _run(name: str, verb: Verb, arguments: Sequence[str]) -> int:
    parser = parser_of(name, verb)
    try:
        args, extra = parser.parse_known_args(arguments)
        if getattr(verb, "TAKES_UNKNOWN", False):
            args.extra, args.arguments = extra, list(arguments)
        elif extra:
            parser.error(f"unrecognized arguments: {' '.join(extra)}")
    except SystemExit as ended:  # it was asked for help, or has said what is wrong
        return int(ended.code or 0)
    try:
        return _tell_compiling(name, verb.run(args))
    except BrokenPipeError:
        # The reader left (`| head`): nothing more to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MissingExtraError as error:
        return _tell(name, error, 1)
    except (ValueError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        # ConfigError is a ValueError: somebody's input names a wrong value or file.
        return _tell(name, error, 2)
    except (SlosServeError, OSError) as error:
        return _tell(name, error, 1)


def _tell_compiling(name: str, status: int) -> int:
    """Return the status of a verb that ran; say where it compiled what the next call will have to compile again."""
    jit = sys.modules.get("slos_serve.core.jit")
    reason = jit.why_not_kept() if jit and status == 0 else ""
    if reason and name != "doctor":  # which has said it
        print(f"slos-serve {name}: compiled loops are not kept, so each call compiles: {reason}", file=sys.stderr)
    return status


def _tell(name: str, error: BaseException, status: int) -> int:
    if os.environ.get("SLOS_SERVE_DEBUG"):
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"slos-serve {name}: {text.removeprefix(f'{name}: ')}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
