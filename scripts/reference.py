# ruff: noqa: SLF001 - neither argparse nor prometheus_client lists what it was given
"""Write the reference pages of the documentation from the code: `docs/reference/`.

    python scripts/reference.py            # writes them
    python scripts/reference.py --check    # exit status 1 and their names where they are out of date

A test runs the check. What a page needs to know is said where it is used: a flag in its verb, a key in
`commands/config.py`, a metric where it is made. Only the settings of the plug-in are described here.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

import slos_serve
from slos_serve import cli
from slos_serve.commands import simulate
from slos_serve.commands.config import CLASS_KEYS, KEYS
from slos_serve.config import BEST_EFFORT, SloClass, SloConfig, default_classes
from slos_serve.core.routing.routers import ROUTERS
from slos_serve.http.metrics import SloMetrics
from slos_serve.sim.hardware import load_hardware
from slos_serve.sim.systems import SYSTEMS
from slos_serve.sim.workloads.scenarios import SCENARIOS
from slos_serve.traces.offered import tell
from slos_serve.traces.registry import all_formats
from slos_serve.vllm_plugin.safety.rules import SafetyLimits
from slos_serve.vllm_plugin.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
NOTE = "<!-- Written by scripts/reference.py: change the code, then run it. -->"

SETTINGS = {
    "config": "latency classes: a YAML file, or the document itself",
    "mode": "`observe` or `enforce`; unsaid: `slos-serve serve` decides, a bare `vllm serve` observes",
    "class_modes": 'the modes of classes that differ: `{"chat": "observe"}`',
    "profile": "the measured profile, a file; without one the engine learns and observes",
    "profile_key": "what the profile was measured for, to be compared with this engine",
    "state": "where what was learnt outlives a restart: a file, `false` for nowhere, unsaid: beside the profile",
    "record": "file that gets a JSON line for each step, request and plan",
    "record_max_mb": "what records may take on disk in MB, older ones beside the file included",
    "record_names": "let records say tenants and sessions",
    "guard_ms": "taken off every deadline: a step's end until the client has its token (30 on a cluster)",
    "planner": "a planner's class: see [A scheduler or router](../extend/scheduler.md)",
    "planner_options": "its keyword arguments",
    "always_plan": "plan even while no request has an SLO",
    "report_s": "seconds between two lines of the log about attainment",
    "thinking_end": "text or token ids that end a thinking span",
    "fault_dir": "folder for the states of planner faults; unsaid: a private one below the temporary folder",
    "channel_dir": "folder below which engine and API server meet; unsaid: a private one of this user",
    "publish_replica": "publish what a router plans with; `slos-serve serve` with replicas sets it",
    "use_prefix_hits": "count on what the prefix cache holds of a waiting prompt",
    "edge": "the HTTP edge stands in front, so only what it seals counts; `slos-serve serve` sets it",
    "may_enforce": "the engine was verified, so that `POST /v1/slo/mode` may switch it to enforcing",
    "safety": "when steering stops by itself; below",
}
SAFETY = {
    "min_promises_kept": "share of promises kept below which the scheduler steps down",
    "num_promises": "promises that must have ended before that is judged",
    "min_coverage": "share of steps that end within their margin",
    "num_covered_steps": "steps before that is judged",
    "max_fault_share": "share of steps that the planner failed to plan",
    "num_faults": "faults before that is judged",
    "max_time_share": "planner's share of the time",
    "num_timed_steps": "steps before that is judged",
    "max_plan_s": "seconds after which a plan is cut off",
    "max_clock_step_s": "seconds by which the clock may be set back unnoticed",
    "max_clock_error_s": "seconds between the time planned for and the time at which batches start",
    "num_clock_errors": "steps in a row before that counts",
    "hold_s": "seconds until steering is tried again, longer after each time",
    "is_enabled": "false: never step down",
}
DOTTED = {
    "slos_serve.vllm_plugin.scheduler": ("AutoSloScheduler", "SloScheduler", "AsyncSloScheduler"),
    "slos_serve.vllm_plugin.stats": ("SloStatLogger",),
    "slos_serve.http.middleware": ("SloMiddleware",),
    "slos_serve.ray_serve.app": ("build_openai_app",),
    "slos_serve.ray_serve.autoscaling": ("HeadroomPolicy",),
    "slos_serve.core.planner": ("SloPlanner",),
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _value(value: object) -> str:
    return f"`{json.dumps(value, default=str)}`"


def commands() -> str:
    """Return the page of the command line: every verb, every flag, its examples."""
    parts = [NOTE, "# Commands", _ABOUT_COMMANDS]
    verbs = cli.find_verbs()
    parts.append(
        table(("verb", ""), ((f"[`{name}`](#{name})", cli.load(module).HELP) for name, module in verbs.items()))
    )
    parts += [_verb(name, cli.load(module)) for name, module in verbs.items()]
    return "\n\n".join(parts)


_ABOUT_COMMANDS = """\
`slos-serve VERB --help` says the same. Every verb but `config` prints what people read, and with `--json` one JSON document on
standard output; logs and progress go to standard error. Exit status: 0 done, 1 the job failed, 2 bad arguments or input (one
line that names the field, its value and what was expected), 130 interrupted. The same `--seed` gives the same result."""


def parser_of(name: str, verb: cli.Verb) -> argparse.ArgumentParser:
    """Return the parser of a verb."""
    parser = cli.Parser(prog=f"slos-serve {name}", allow_abbrev=False)
    verb.configure(parser)
    return parser


def _verb(name: str, verb: cli.Verb) -> str:
    parser = parser_of(name, verb)
    parts = [f"## {name}", f"{verb.HELP[0].upper()}{verb.HELP[1:].rstrip('.')}.", _flags(parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parts += [f"**{name} {sub}**\n\n{_flags(one)}" for sub, one in action.choices.items() if _flags(one)]
    if parser.epilog:
        parts.append("```text\n" + inspect.cleandoc(parser.epilog) + "\n```")
    return "\n\n".join(part for part in parts if part)


def _flags(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        value = _metavar(action)
        flags = [f"`{flag}{f' {value}' if value else ''}`" for flag in action.option_strings] or [f"`{value}`"]
        text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        rows.append((", ".join(flags), text))
    return table(("argument", ""), rows) if rows else ""


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices:
        return "|".join(map(str, action.choices))
    return action.dest.upper()


def configuration() -> str:
    """Return the page of the YAML file: every key, its kind, its default."""
    config, usual = SloConfig(), default_classes()[BEST_EFFORT]
    document = config.to_json()
    top = [(f"`{key}`", _kind(SloConfig, key), "see below" if key == "classes" else _value(document[key]), text)
           for key, text in KEYS.items()]  # fmt: skip
    keys = [
        (
            f"`{key}`",
            _kind(SloClass, key),
            "unsaid" if getattr(usual, key) is None else _value(getattr(usual, key)),
            text,
        )
        for key, text in CLASS_KEYS.items()
    ]
    missing = [f.name for f in dataclasses.fields(SloConfig) if f.name not in KEYS]
    missing += [f.name for f in dataclasses.fields(SloClass) if f.name not in {*CLASS_KEYS, "name"}]
    if missing:
        raise SystemExit(f"commands/config.py: no description of {', '.join(missing)}")
    names = sorted({key for one in default_classes().values() for key in one.to_json()} - {"weight", "on_unattainable"})
    names.sort(key=list(CLASS_KEYS).index)
    shipped = [
        (f"`{name}`", *(str(one.to_json().get(key, "-")) for key in names)) for name, one in default_classes().items()
    ]
    return "\n\n".join([
        NOTE, "# Configuration", _ABOUT_CONFIG, "## Keys of the file", table(("key", "kind", "default", ""), top),
        "## Keys of a class", table(("key", "kind", "default", ""), keys), _ABOUT_CLASSES,
        "## Shipped classes", table(("class", *(f"`{name}`" for name in names)), shipped),
    ])  # fmt: skip


_ABOUT_CONFIG = """\
One YAML file, given to `serve`, `bench`, `simulate`, `plan`, `whatif` and `doctor` as `--slo-config FILE`. `slos-serve config`
prints the one in force, commented. Times are milliseconds. Unknown keys, keys written twice and values that make no sense are
refused, with file, key, value and what was expected. A sample with every key: [SLOs and classes](../guide/slos-and-classes.md)."""
_ABOUT_CLASSES = """\
A class promises at least one of `ttft_ms`, `ttft_slowdown`, `tpot_ms`, `final_tpot_ms`, `thinking_tpot_ms`, `e2e_ms` and
`max_gap_ms`; `best-effort` alone promises nothing. `ttft_ms` and `ttft_slowdown` exclude each other. A class in the file replaces the shipped one of
its name whole; `name: null` removes it; the others stay."""


def _kind(owner: type, key: str) -> str:
    text = str(next(f.type for f in dataclasses.fields(owner) if f.name == key))
    plain = text.replace(" | None", "")
    names = {"float": "number", "int": "whole number", "str": "text", "bool": "true or false"}
    return names.get(plain, "list" if plain.startswith("tuple") else "mapping" if "Mapping" in plain else plain)


def metrics() -> str:
    """Return the page of metrics, as they are registered."""
    metrics = SloMetrics(CollectorRegistry())
    known = (*vars(metrics).values(), *metrics.numbers.values())
    made = [one for one in known if isinstance(one, MetricWrapperBase)]
    rows = []
    for one in made:
        name = one._name + ("_total" if one._type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in one._labelnames) or "-"
        rows.append((f"`{name}`", one._type, labels, one._documentation))
    return "\n\n".join([NOTE, "# Metrics", _ABOUT_METRICS, table(("metric", "type", "labels", ""), rows), _QUERIES])


_ABOUT_METRICS = """\
Beside vLLM's own on `GET /metrics`. `class` is a class of the configuration or `custom` (numbers without a class). `tenant` is
bounded: configured names, the first hundred others, then `other`. Every series of a configured class is there at 0 from the
start. The lists of verdicts, reasons and outcomes are in [HTTP](../http-api.md)."""
_QUERIES = """\
## Questions, as PromQL

| question | query |
|---|---|
| attainment of each class, 5 minutes | `sum by (class) (rate(slos_serve_requests_total{outcome="met"}[5m])) / sum by (class) (rate(slos_serve_requests_total{outcome!="cancelled",outcome!="none"}[5m]))` |
| promises broken | `sum by (class) (increase(slos_serve_promises_total{result="broken"}[1h]))` |
| is the engine steered? | `slos_serve_mode == 2` |
| why no promise? | `sum by (reason) (rate(slos_serve_verdicts_total{verdict="best-effort"}[5m]))` |
| did the planner fail? | `sum by (kind) (increase(slos_serve_planner_faults_total[1h]))` |"""


def settings() -> str:
    """Return the page of what the plug-in takes beside the classes."""
    usual = {f.name: getattr(Settings(), f.name) for f in dataclasses.fields(Settings)}
    usual = {"guard_ms" if key == "guard_s" else key: value for key, value in usual.items()}
    usual |= {"guard_ms": 1000 * usual["guard_ms"], "config": "the shipped classes", "safety": {}}
    limits = dataclasses.asdict(SafetyLimits())
    for what, known, described in (("SETTINGS", usual, SETTINGS), ("SAFETY", limits, SAFETY)):
        if set(known) != set(described):
            raise SystemExit(f"{what} of {__file__}: {sorted(set(known) ^ set(described))}: expected a line for each")
    rows = [
        (f"`{key}`", "the shipped classes" if key == "config" else _value(usual[key]), SETTINGS[key])
        for key in SETTINGS
    ]
    more = [(f"`{key}`", _value(limits[key]), SAFETY[key]) for key in SAFETY]
    head = ("key", "default", "")
    return "\n\n".join(
        [NOTE, "# Engine settings", _ABOUT_SETTINGS, table(head, rows), "## `safety`", _ABOUT_SAFETY, table(head, more)]
    )


_ABOUT_SETTINGS = """\
The plug-in reads `additional_config["slo"]` of vLLM, once, at start. `slos-serve serve` writes what its own flags say there, and
adds what is given beside them:

```console
vllm serve MODEL --scheduler-cls slos_serve.vllm_plugin.scheduler.AutoSloScheduler \\
    --additional-config '{"slo": {"config": "classes.yaml", "mode": "observe", "record": "steps.jsonl"}}'
```

`null` means unsaid. Unknown keys are refused."""
_ABOUT_SAFETY = """\
Where one of these is missed, vLLM's own order runs, the log and `/v1/slo/status` say why, and steering is tried again."""


def simulation() -> str:
    """Return the page of named systems, scenarios, hardware and trace formats."""
    systems = [
        (f"`{one.name}`", str(one.max_draft_length or "-"), ", ".join(f"`{key}`" for key in one.setting_names()) or "-")
        for one in SYSTEMS.values()
    ]
    folder = ROOT / "src" / "slos_serve" / "sim" / "hardware"
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    hardware = [
        (f"`{one['name']}`", str(one.get("num_gpus", 1)), f"{one['kv_tokens']:,}", one["description"])
        for one in documents
    ]
    formats = "\n".join(f"- {one.name}" for one in sorted(all_formats(), key=lambda one: one.name.lower()))
    return "\n\n".join([
        NOTE, "# Names in simulation",
        "What `simulate`, `capacity` and `plan` know by name. `package.module:Class` names one of your own.",
        "## Systems", "With the longest draft that the engine may verify, and what `--set KEY=VALUE` takes.",
        table(("system", "drafts", "settings"), systems),
        "## Routers", ", ".join(f"`{name}`" for name in ROUTERS) + "; `pooled` is one replica as fast as all, a bound.",
        "## Scenarios", ", ".join(f"`{name}`" for name in SCENARIOS) + ".",
        "## Hardware", table(("hardware", "GPUs", "KV room, tokens", ""), hardware),
        "## Trace formats", f"Recognised by content; [Bring your trace](../traces.md) says how.\n\n{formats}",
    ])  # fmt: skip


def python() -> str:
    """Return the page of what `import slos_serve` offers, and of the dotted names that stay."""
    names = [name for name in slos_serve.__all__ if not name.startswith("__")]
    parts = [
        NOTE,
        "# Python",
        _ABOUT_PYTHON,
        table(("name", ""), ((f"[`{n}`](#{_anchor(n, names)})", _summary(getattr(slos_serve, n))) for n in names)),
    ]
    parts += [_member(name, getattr(slos_serve, name)) for name in names]
    dotted = [(f"`{module}.{name}`", _class_line(module, name)) for module, them in DOTTED.items() for name in them]
    parts += ["## Dotted names", _ABOUT_DOTTED, table(("name", ""), dotted)]
    return "\n\n".join(parts)


_ABOUT_PYTHON = """\
`import slos_serve` is quick: what it offers is imported when it is first used. All of it is typed
(`py.typed`). Times are seconds, lengths tokens. `examples/` in the repository has a scheduler, a router, a trace, a tour."""
_ABOUT_DOTTED = "Names that commands and files of vLLM, Ray and Prometheus say; they keep their place."


def _anchor(name: str, names: Sequence[str]) -> str:
    """Return the anchor of a heading: of names that differ in case only, the later one gets a number."""
    earlier = [one for one in names[: names.index(name)] if one.lower() == name.lower()]
    return name.lower() + (f"_{len(earlier)}" if earlier else "")


def _summary(value: object) -> str:
    return " ".join(_about(value).split("\n\n")[0].split())


def _about(value: object) -> str:
    plain = not (inspect.isclass(value) or inspect.isfunction(value))
    return (
        f"A constant: the path of a trace that is shipped, `{Path(str(value)).name}`."
        if plain
        else inspect.getdoc(value) or ""
    )


def _member(name: str, value: Any) -> str:
    parts = [f"## {name}", _signature(name, value), _about(value)]
    methods = [
        f"- `{key}{_parameters(one)}`: {_summary(one)}"
        for key, one in (vars(value).items() if inspect.isclass(value) else ())
        if not key.startswith("_") and inspect.isfunction(one)
    ]
    return "\n\n".join(part for part in (*parts, "\n".join(methods)) if part)


def _signature(name: str, value: Any) -> str:
    if not inspect.isclass(value) and not inspect.isfunction(value):
        return ""
    if inspect.isclass(value) and (issubclass(value, BaseException) or getattr(value, "_is_protocol", False)):
        return ""
    if inspect.isclass(value) and hasattr(value, "__members__"):
        return f"`{', '.join(value.__members__)}`"
    return f"```py\n{name}{_parameters(value)}\n```"


def _parameters(value: Callable[..., Any]) -> str:
    """Return the parameters as they are written, without types and paths that differ between machines."""
    shown = []
    star = False
    for one in inspect.signature(value).parameters.values():
        if one.name == "self":
            continue
        if one.kind is one.KEYWORD_ONLY and not star:
            shown.append("*")
            star = True
        star = star or one.kind is one.VAR_POSITIONAL
        shown.append(
            {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "") + one.name + _default(one.default)
        )
    return f"({', '.join(shown)})"


def _default(value: object) -> str:
    if value is inspect.Parameter.empty:
        return ""
    return f"={value!r}" if isinstance(value, str | int | float | bool | tuple | None) else "=..."


def _class_line(module: str, name: str) -> str:
    """Return the first sentence of a docstring, without importing what may need vLLM or Ray."""
    path = ROOT / "src" / Path(*module.split(".")).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n\n")[0]
    raise SystemExit(f"{module}: no {name}: expected the names of DOTTED in {__file__}")


def examples() -> str:
    """Return the page of examples: what each is, what it prints, and what is said of a file of each trace format."""
    folder = ROOT / "examples"
    parts = [NOTE, "# Examples", _ABOUT_EXAMPLES]
    for path in sorted(folder.glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        parts += [f"## {path.stem}", about.split("\n\n")[0], f"[The file](../../examples/{path.name}). It prints"]
        parts.append(f"```text\n{path.with_suffix('.out').read_text(encoding='utf-8').rstrip()}\n```")
    parts += ["## Trace files", _ABOUT_TRACES]
    for path in sorted((folder / "traces").iterdir(), key=lambda path: path.name):
        shown = path.read_text(encoding="utf-8").splitlines()[:SHOWN_LINES]
        shown = [line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]} ..." for line in shown]
        parts += [
            f"### {path.name}",
            "\n".join(["```text", *shown, "```"]),
            "\n".join(["```text", *said_of(path), "```"]),
        ]
    return "\n\n".join(parts)


def said_of(path: Path) -> list[str]:
    """Return what `slos-serve simulate --trace FILE` says of a file on standard error."""
    parser = argparse.ArgumentParser()
    simulate.configure(parser)
    more = NEEDED.get(path.name, [])
    args = parser.parse_args(["--trace", path.name, *more])
    with contextlib.chdir(path.parent), contextlib.redirect_stderr(io.StringIO()) as said:
        workload, _, trace = simulate.build_workload(args, load_hardware(args.hardware))
        assert trace is not None
        tell(workload.name, workload.num_requests, trace.span_s, trace)
    return [f"$ slos-serve simulate --trace {' '.join([path.name, *more])}", *said.getvalue().splitlines()]


SHOWN_LINES, SHOWN_CHARACTERS = 3, 110
NEEDED = {
    "azure-openai.csv": ["--hardware", "h100-8b-derived"],
    "vidur-lengths.csv": ["--arrivals", "poisson", "--rate", "2"],
}
_ABOUT_EXAMPLES = """\
`examples/` in the repository. Each runs as it is, and a test compares what it prints with what is here; `...` stands for what
another version of the planner may change."""
_ABOUT_TRACES = """\
A small file of each format that is read, in `examples/traces/`, its first lines, and what `simulate` says of it (`plan` and
`bench` say the same). Which formats there are and how they are told apart: [Bring your trace](../traces.md)."""


WRITERS = {
    "cli.md": commands,
    "configuration.md": configuration,
    "metrics.md": metrics,
    "settings.md": settings,
    "simulation.md": simulation,
    "python.md": python,
    "examples.md": examples,
}


def main() -> int:
    """Write the pages, or say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page is out of date")
    is_check = parser.parse_args().check
    stale = []
    for name, write in WRITERS.items():
        path, text = PAGES / name, write() + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not is_check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if is_check and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/reference.py", file=sys.stderr)
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
