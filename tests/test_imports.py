"""Walk every import of the package and hold it to the table in docs/architecture.md.

The table is an allow list, of our rooms and of other people's packages: a new dependency is a word there.
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


def test_no_rooms_import_each_other_in_a_circle():
    """Modules beside smaller rooms (`core.planner`) are taken one by one."""
    inner = {room for room in RULES if any(other.startswith(f"{room}.") for other in RULES if room)}
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        here = room_of(module)
        here = module if here in inner else here
        for _, name in imports_of(module, types=False):
            target = name.removeprefix("slos_serve.")
            if name.startswith("slos_serve.") and target in MODULES:
                there = room_of(target)
                there = target if there in inner else there
                graph.setdefault(here, set()).update({there} - {here})
    list(TopologicalSorter(graph).static_order())


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
