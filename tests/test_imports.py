"""Walk every import of the package and hold it to the table in docs/architecture.md.

The table is an allow list, of our own packages and of other people's: a new dependency is a line here, on purpose.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
ALL_OURS = frozenset({""})
PLANNER_FORBIDS = frozenset({"time", "random", "os", "logging", "asyncio", "datetime", "threading", "io", "pathlib"})


@dataclass(frozen=True)
class Rule:
    """What modules under a prefix may import: our packages, other people's, and no stdlib of `forbidden`."""

    ours: frozenset[str]
    others: frozenset[str] = frozenset()
    forbidden: frozenset[str] = frozenset()


def rule(ours="", others="", forbidden=frozenset()):
    return Rule(frozenset(ours.split()), frozenset(others.split()), forbidden)


# The longest matching prefix counts. A module may always import its own package.
RULES = {
    "": Rule(frozenset()),
    "errors": rule(),
    "cache": rule("errors"),
    "figures": rule("errors", "matplotlib"),
    "pages": rule("figures"),
    "core": rule("core errors", "numpy numba", PLANNER_FORBIDS),
    "config": rule("core.types errors", "yaml"),
    "traces": rule("traces sim.traces errors", "numpy"),
    "sim": rule("sim traces cache core config errors figures pages", "numpy yaml scipy"),
    "sim.vllm_replica": rule("sim traces core config errors vllm_plugin", "numpy vllm torch"),
    "http": rule("http core config errors", "starlette prometheus_client"),
    "vllm_plugin": rule(
        "vllm_plugin core config errors http", "vllm torch numpy zmq msgspec starlette prometheus_client"
    ),
    "ray_serve": rule("ray_serve core config errors http", "ray grpc starlette numpy yaml"),
    "bench": rule(
        "bench cache core config errors figures pages traces sim.traces",
        "numpy aiohttp matplotlib torch transformers safetensors",
    ),
    "emulated": rule("emulated sim.hardware core errors", "numpy vllm torch"),
    # The commands join everything, each import inside the function that needs it.
    "cli": Rule(ALL_OURS),
    "serving": Rule(ALL_OURS, frozenset({"yaml"})),
    "serving.vllm_command": rule(others="vllm"),
    "doctor": Rule(ALL_OURS, frozenset({"yaml"})),
}
COMMANDS = frozenset({"cli", "serving", "doctor"})


def modules() -> Iterator[tuple[str, Path]]:
    """Yield (dotted name below slos_serve, file); "" is the package itself."""
    root = SRC / "slos_serve"
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        yield ".".join(parts), path


MODULES = dict(modules())


def is_under(name: str, prefix: str) -> bool:
    return prefix in {"", name} or name.startswith(prefix + ".")


def rule_of(module: str) -> Rule:
    return RULES[max((prefix for prefix in RULES if is_under(module, prefix)), key=len)]


def imports_of(module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of everything a module imports, at any depth."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["slos_serve", *package[: len(package) - node.level + 1], *base.split(".")]).strip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full.removeprefix("slos_serve.") in MODULES else base


def breaches(module: str) -> Iterator[str]:
    allowed = rule_of(module)
    for line, name in imports_of(module):
        root = name.split(".")[0]
        where = f"{MODULES[module].relative_to(SRC)}:{line} imports {name}"
        if root == "slos_serve":
            inner = name.removeprefix("slos_serve").removeprefix(".")
            if inner and not any(is_under(inner, prefix) for prefix in allowed.ours):
                yield f"{where}: its package may not"
            if inner.partition(".")[0] in COMMANDS and module.partition(".")[0] not in COMMANDS:
                yield f"{where}: commands are imported by nobody"
        elif root in sys.stdlib_module_names:
            if root in allowed.forbidden:
                yield f"{where}: the core has no clock, chance, log or files"
        elif root not in allowed.others:
            yield f"{where}: not among this package's dependencies"


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "slos_serve")
def test_a_module_imports_only_what_its_package_may(module):
    assert not list(breaches(module))


@pytest.mark.parametrize("module", [name for name in MODULES if is_under(name, "core")])
def test_the_core_opens_no_files_and_prints_nothing(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call.id for call in calls if isinstance(call, ast.Name) and call.id in {"open", "print", "input"}]


@pytest.mark.parametrize("module", [name for name in MODULES if is_under(name, "core")])
def test_the_core_draws_no_random_numbers_of_its_own(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    made = [
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in {"default_rng", "seed"}
    ]
    assert not made


def test_the_command_line_starts_without_heavy_imports():
    heavy = "{'numpy', 'numba', 'torch', 'vllm', 'ray', 'yaml', 'matplotlib'}"
    code = f"import sys, slos_serve.cli; sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True)
