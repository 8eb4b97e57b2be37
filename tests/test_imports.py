"""Walk every import of the package and hold it to the table in docs/architecture.md.

The table is an allow list, of our rooms and of other people's packages: a new dependency is a word there. Run as a
program, this says how the import graph looks: `python tests/test_imports.py`.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
PLANNER_FORBIDS = frozenset({"time", "random", "os", "logging", "asyncio", "datetime", "threading", "io", "pathlib"})


def modules() -> Iterator[tuple[str, Path]]:
    """Yield (dotted name below slos_serve, file); "" is the package itself."""
    root = SRC / "slos_serve"
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        yield ".".join(parts), path


MODULES = dict(modules())
SCOPES = ("", "sim", "core", "vllm_plugin")


def is_under(name: str, prefix: str) -> bool:
    return prefix in {"", name} or name.startswith(prefix + ".")


@dataclass(frozen=True)
class Rule:
    """What the modules of a room may import: our rooms, and other people's packages."""

    ours: frozenset[str]
    others: frozenset[str] = frozenset()


def rules() -> dict[str, Rule]:
    """Read the table: rooms in the first column, what they may import in the last ("everything": of ours)."""
    found = {}
    for line in (ROOT / "docs/architecture.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        rooms, _, allowed = line.strip("|").split("|")
        names = frozenset(re.findall(r"`([\w.]+)`", allowed))
        if "everything" in allowed:
            names |= {""}
        for room in re.findall(r"`([\w.]+)`", rooms):
            ours = frozenset(name for name in names if not name or name in MODULES)
            found[room] = Rule(ours | {room}, names - ours)
    door = found["library"]  # `import slos_serve` offers what is behind it
    return {**found, "": Rule(door.ours, door.others)}


RULES = rules()


def room_of(module: str) -> str:
    """Return the smallest room that a module is in."""
    return max((prefix for prefix in RULES if is_under(module, prefix)), key=len)


def without_types(tree: ast.Module) -> ast.Module:
    """Drop what only type checkers follow."""
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return tree


def imports_of(module: str, *, types: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of everything a module imports, at any depth."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree if types else without_types(tree)):
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
    room = room_of(module)
    allowed = RULES[room]
    for line, name in imports_of(module):
        root = name.split(".")[0]
        where = f"{MODULES[module].relative_to(SRC)}:{line} imports {name}"
        if root == "slos_serve":
            inner = name.removeprefix("slos_serve").removeprefix(".")
            if inner and not any(is_under(inner, prefix) for prefix in allowed.ours):
                yield f"{where}: {room or 'the package'} may not"
        elif root in sys.stdlib_module_names:
            if root in PLANNER_FORBIDS and is_under(module, "core"):
                yield f"{where}: the core has no clock, chance, log or files"
        elif root not in allowed.others:
            yield f"{where}: not among this room's dependencies"


def test_every_module_is_in_a_room_of_the_table():
    assert not [module for module in MODULES if module and not room_of(module)]


def graph(scope: str = "", *, depth: int | None = None, types: bool = True) -> dict[str, set[str]]:
    """Return who below `scope` imports whom: modules, or with `depth` 1 what stands right below it."""
    found: dict[str, set[str]] = {}

    def unit(module: str) -> str:
        inner = module.removeprefix(scope).removeprefix(".")
        return ".".join(inner.split(".")[:depth])

    for module in MODULES:
        if module in {"", scope} or not is_under(module, scope):
            continue
        targets = found.setdefault(unit(module), set())
        for _, name in imports_of(module, types=types):
            target = name.removeprefix("slos_serve.")
            if target in MODULES and target not in {"", scope} and is_under(target, scope):
                targets |= {unit(target)} - {unit(module)}
    return found


def figures(scope: str) -> dict[str, int]:
    """Return units, floors (each imports lower ones alone) and arrows of the import graph right below `scope`."""
    arrows, floors = graph(scope, depth=1), 0
    sorter = TopologicalSorter(arrows)
    sorter.prepare()
    while sorter.is_active():
        sorter.done(*sorter.get_ready())
        floors += 1
    return {"units": len(arrows), "floors": floors, "arrows": sum(map(len, arrows.values()))}


def test_no_modules_import_each_other_in_a_circle_not_even_for_types():
    list(TopologicalSorter(graph()).static_order())


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_below_a_package_imports_each_other_in_a_circle(scope):
    assert figures(scope)["floors"]


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


if __name__ == "__main__":
    for one in SCOPES:
        sys.stdout.write(f"{one or 'the whole'}: {figures(one)}\n")
