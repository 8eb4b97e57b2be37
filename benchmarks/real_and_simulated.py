"""Whether capacity in the simulator is capacity on an engine: the same windows on both, ours and vLLM's.

    python benchmarks/real_and_simulated.py --data DIR --hardware a100-80g-7b-measured --out DIR

The engine is real and its device emulated: vLLM's server, scheduler and clients run in real time while a step lasts as
long as the hardware file says. Each scenario's first reporting window (its first `--requests` requests) is offered at
five rates to slos-serve and to plain vLLM with each of three token budgets, and simulated with the same settings, the
same promises (the shipped classes) and the engine's scheduling. Rates bracket the simulated capacities of both sides.
Output lengths learnt before the window are the same on both: the scenario's history, which goes into the state that
the server starts from.

Capacity is the highest rate at which every class attains 90 %, between the rates that were run on a straight line.
With `--together` all servers are under load at once, each from a client of its own; else one after the other.
Runs are saved as they end; the same command goes on from them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.bench.client import BenchRequest, offer, random_prompt
from slos_serve.bench.engines import ServerProcess, ServerProcesses
from slos_serve.bench.grade import entry, grade_run, request_row
from slos_serve.bench.lab import read_status
from slos_serve.bench.model import ensure_demo_model
from slos_serve.cache import write_json
from slos_serve.config import SloConfig
from slos_serve.core.lengths import LengthModel
from slos_serve.emulated.emulation import LEAVES_OUT
from slos_serve.sim.hardware import Hardware, load_hardware
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.systems import find_system
from slos_serve.sim.workloads.scenarios import Offer, find_scenario
from slos_serve.sim.workloads.workload import Workload
from slos_serve.terminal.signals import ending_by_signal

OURS = "slos-serve"
BUDGETS = (512, 1024, 2048)
TARGET = 0.9
CLASSES = SloConfig()
START_S = 240.0
DRAIN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One side: ours, or plain vLLM with a token budget."""

    name: str
    budget: int | None = None

    def simulated(self) -> tuple[str, dict[str, Any]]:
        """Return the system's name in the simulator and its settings."""
        return (OURS + "-ar", {}) if self.budget is None else ("vllm", {"token_budget": self.budget})


SETTINGS = (Setting(name=OURS), *(Setting(name=f"vllm-{budget}", budget=budget) for budget in BUDGETS))


def main() -> int:
    args = parse()
    hardware = load_hardware(args.hardware)
    args.out.mkdir(parents=True, exist_ok=True)
    with ending_by_signal():
        plan = rates_of(args, hardware)
        if not args.report_only:
            run_real(args, hardware, plan)
    rows = table_rows(args, hardware, plan)
    write_json({"emulated": args.hardware, "leaves_out": LEAVES_OUT, "rows": rows}, args.out / "report.json")
    print(as_text(rows, args))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of public trace files")
    parser.add_argument("--hardware", default="a100-80g-7b-measured", help="name or file")
    parser.add_argument("--scenarios", default="chatbot,coding,mixed")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="of the window")
    parser.add_argument("--sync", action="store_true", help="synchronous scheduling")
    parser.add_argument("--together", action="store_true", help="load all servers at once")
    parser.add_argument("--only", metavar="SETTING", help="run this side alone: slos-serve, vllm-512, ...")
    parser.add_argument("--report-only", action="store_true", help="report what has run")
    parser.add_argument("--out", type=Path, default=Path("real-and-simulated"), metavar="DIR")
    return parser.parse_args()


# --- what is offered ---


def window(args: argparse.Namespace, hardware: Hardware, scenario: str, rate_rps: float | None) -> Workload:
    offered = Offer(data=args.data, hardware=hardware, rate_rps=rate_rps, max_requests=args.requests)
    return find_scenario(scenario).offer(offered, CLASSES)


def to_send(workload: Workload) -> list[BenchRequest]:
    """Return the requests of a simulated workload for a client: the same times, lengths and promises."""
    rng = np.random.default_rng(0)
    return [
        BenchRequest(
            request_id=sim.request.request_id,
            offset_s=sim.request.arrival_s,
            prompt_token_ids=random_prompt(sim.request.num_prompt_tokens, rng),
            output_tokens=sim.num_output_tokens,
            hidden_max_tokens=sim.request.max_output_tokens,
            slo=sim.request.slo,
            slo_class=sim.request.slo_class,
        )
        for sim in workload.arrivals
    ]


# --- simulated ---


def simulated(args: argparse.Namespace, hardware: Hardware, scenario: str, setting: Setting, rate: float) -> Any:
    """Return the entry of a simulated run, from its file where it has run."""
    path = args.out / "simulated" / run_file(scenario, setting, rate)
    if path.exists():
        return json.loads(path.read_text())
    system, settings = setting.simulated()
    result = find_system(system).serve(
        window(args, hardware, scenario, rate),
        hardware,
        settings=settings,
        engine=ReplicaOptions(async_lag=not args.sync),
        max_model_len=find_scenario(scenario).max_model_len(hardware),
    )
    document = result.entry(system=setting.name)
    write_json(document, path)
    return document


def rates_of(args: argparse.Namespace, hardware: Hardware) -> dict[str, list[float]]:
    """Return five rates per scenario, around the simulated capacities of both sides."""
    path = args.out / "rates.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    found = {}
    for scenario in args.scenarios.split(","):
        own = search(args, hardware, scenario, SETTINGS[0])
        best = max(search(args, hardware, scenario, setting) for setting in SETTINGS[1:])
        low, high = sorted((own, best))
        rates = [0.85 * low, 1.15 * low, (low * high) ** 0.5, 0.9 * high, 1.1 * high]
        found[scenario] = sorted({round(rate, 3) for rate in rates})
        print(f"{scenario}: simulated capacity about {own:.2f}/s ours, {best:.2f}/s vLLM", file=sys.stderr, flush=True)
    write_json(found, path)
    return found


def search(args: argparse.Namespace, hardware: Hardware, scenario: str, setting: Setting) -> float:
    """Return the capacity by bisection to 4 %, in requests per second."""

    def holds(rate: float) -> bool:
        return worst(simulated(args, hardware, scenario, setting, round(rate, 3))) >= TARGET

    low, high = 0.25, 0.5
    while holds(high) and high < 64:
        low, high = high, 2 * high
    while high / low > 1.04:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# --- real ---


def run_real(args: argparse.Namespace, hardware: Hardware, plan: Mapping[str, Sequence[float]]) -> None:
    """Offer every window to every server that has not had it."""
    cells = [(scenario, rate) for scenario, rates in plan.items() for rate in rates]
    sides = [setting for setting in SETTINGS if args.only in (None, setting.name)]
    missing = [cell for cell in cells if not all(real_file(args, cell, setting).exists() for setting in sides)]
    if not missing:
        return
    state = learnt_state(args, hardware, plan)
    context = multiprocessing.get_context("spawn")
    with ServerProcesses(args.out / "logs") as fleet, ProcessPoolExecutor(len(sides), mp_context=context) as pool:
        engines = {setting: start(fleet, setting, args, hardware, state) for setting in sides}
        fleet.wait(list(engines.values()), timeout_s=START_S)
        for engine in engines.values():
            asyncio.run(offer(engine.url, "m", warming(args, hardware)))
        for number, cell in enumerate(missing):
            turned = [*sides[number % len(sides) :], *sides[: number % len(sides)]]
            jobs = [(args, cell, setting, engines[setting].url) for setting in turned]
            if args.together:
                list(pool.map(run_cell, jobs))
            else:
                for job in jobs:
                    pool.submit(run_cell, job).result()
            for engine in engines.values():
                engine.check()


def start(
    fleet: ServerProcesses, setting: Setting, args: argparse.Namespace, hardware: Hardware, state: Path
) -> ServerProcess:
    model = str(ensure_demo_model())
    flags = ["--emulate", args.hardware, "--served-model-name", "m", "--disable-uvicorn-access-log"]
    flags += ["--no-enable-prefix-caching", *(["--no-async-scheduling"] if args.sync else [])]
    if setting.budget is not None:
        return fleet.start(setting.name, model, ["--no-slo", "--max-num-batched-tokens", str(setting.budget), *flags])
    profile = args.out / "profile.json"
    exact = {"schema": "slos-serve-profile/1", "key": "the file itself", "perf_model": hardware.perf_model.to_json()}
    write_json(exact, profile)
    options = {"slo": {"state": str(state.resolve())}}
    flags += ["--profile", str(profile), "--slo-mode", "enforce", "--additional-config", json.dumps(options)]
    return fleet.start(setting.name, model, flags)


def learnt_state(args: argparse.Namespace, hardware: Hardware, plan: Mapping[str, Sequence[float]]) -> Path:
    """Return the state of a server that has seen the scenarios' history of lengths, and few steps."""
    path: Path = args.out / "learnt.json"
    path.unlink(missing_ok=True)
    with ServerProcesses(args.out / "logs") as fleet:
        engine = start(fleet, SETTINGS[0], args, hardware, path)
        fleet.wait([engine], timeout_s=START_S)
        asyncio.run(offer(engine.url, "m", warming(args, hardware)))
        while not path.exists():  # written once a minute; vLLM kills its engine core at the end
            engine.check()
            time.sleep(1)
    lengths = LengthModel()
    for scenario in plan:
        for name, prompt, output in window(args, hardware, scenario, None).history:
            lengths.observe(name, prompt, output)
    document = json.loads(path.read_text())
    write_json({**document, "lengths": lengths.to_json()}, path)
    return path


def warming(args: argparse.Namespace, hardware: Hardware) -> list[BenchRequest]:
    """Return a few requests of a window that is not reported."""
    offered = Offer(data=args.data, hardware=hardware, rate_rps=2.0, part="tune", max_requests=16)
    return to_send(find_scenario(args.scenarios.split(",")[0]).offer(offered, CLASSES))


def run_cell(job: tuple[argparse.Namespace, tuple[str, float], Setting, str]) -> None:
    """Offer one window to one server and save what came of it."""
    args, (scenario, rate), setting, url = job
    workload = window(args, load_hardware(args.hardware), scenario, rate)
    requests = to_send(workload)
    results = asyncio.run(offer(url, "m", requests, drain_timeout_s=DRAIN_S))
    streams = grade_run(requests, results)
    graded = entry(streams, system=setting.name, scenario=scenario, span_s=workload.duration_s, rate_rps=rate)
    document = {**graded, "max_lag_s": max(result.lag_s for result in results), "served": served(url)}
    document["requests"] = [request_row(stream) | {"said": stream.result.slo} for stream in streams]
    write_json(document, real_file(args, (scenario, rate), setting))
    line = f"{scenario} {rate:g}/s {setting.name}: {graded['attainment']:.3f}"
    line += f", kept {graded['kept']}/{graded['promised']}, client late by {document['max_lag_s'] * 1e3:.0f} ms at most"
    print(line, file=sys.stderr, flush=True)


def served(url: str) -> dict[str, Any]:
    """Return what our server says of itself after a run; {} of plain vLLM."""
    snapshot = read_status(url).get("snapshot") or {}
    keys = ("effective_mode", "step_downs", "divergences", "plan_s", "overhead_s", "clock_error_s")
    return {key: snapshot[key] for key in keys if key in snapshot}


def real_file(args: argparse.Namespace, cell: tuple[str, float], setting: Setting) -> Path:
    folder: Path = args.out / "real"
    return folder / run_file(cell[0], setting, cell[1])


def run_file(scenario: str, setting: Setting, rate: float) -> str:
    return f"{scenario}-{setting.name}-{rate:g}.json"


# --- table ---


def worst(document: Mapping[str, Any]) -> float:
    """Return the attainment of the class that has least."""
    return min(group["attainment"] or 0.0 for group in document["by_class"].values())


def capacity(rates: Sequence[float], shares: Sequence[float]) -> float | None:
    """Return where a falling curve crosses the target, on straight lines; None where it does not among the rates."""
    falling = np.minimum.accumulate(np.array(shares))
    if falling[0] < TARGET or falling[-1] >= TARGET:
        return None
    right = int(np.argmax(falling < TARGET))
    part = (falling[right - 1] - TARGET) / (falling[right - 1] - falling[right])
    return float(rates[right - 1] + part * (rates[right] - rates[right - 1]))


def table_rows(args: argparse.Namespace, hardware: Hardware, plan: Mapping[str, Sequence[float]]) -> list[Any]:
    rows = []
    for scenario, rates in plan.items():
        for setting in SETTINGS:
            cells = [(scenario, rate) for rate in rates if real_file(args, (scenario, rate), setting).exists()]
            if not cells:
                continue
            done = [rate for _, rate in cells]
            real = [json.loads(real_file(args, cell, setting).read_text()) for cell in cells]
            sim = [simulated(args, hardware, scenario, setting, rate) for rate in done]
            rows.append(
                {
                    "scenario": scenario,
                    "setting": setting.name,
                    "rates": done,
                    "real": [run["attainment"] for run in real],
                    "simulated": [run["attainment"] for run in sim],
                    "kept": [[run["kept"], run["promised"]] for run in real],
                    "kept_simulated": [[run["kept"], run["promised"]] for run in sim],
                    "ttft_p99_s": [run["ttft_s"]["p99"] for run in real],
                    "capacity": capacity(done, [worst(run) for run in real]),
                    "capacity_simulated": capacity(done, [worst(run) for run in sim]),
                    "served": [run["served"] for run in real],
                    "max_lag_s": max(run["max_lag_s"] for run in real),
                }
            )
    return rows


def as_text(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> str:
    scheduling = "synchronous" if args.sync else "asynchronous"
    lines = [f"emulated {args.hardware}, {scheduling} scheduling: {LEAVES_OUT}", ""]
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        here = [row for row in rows if row["scenario"] == scenario]
        lines.append(f"{scenario:<18}" + "".join(f"{rate:>16.2f}/s" for rate in here[0]["rates"]) + "   capacity")
        for row in here:
            cells = "".join(f"{f'{r:.3f} ({s:.3f})':>18}" for r, s in zip(row["real"], row["simulated"], strict=True))
            lines.append(
                f"  {row['setting']:<16}{cells}   {shown(row['capacity'])} ({shown(row['capacity_simulated'])})"
            )
            if any(promised for _, promised in row["kept"]):
                lines.append(f"  {'promises kept':<16}" + "".join(f"{f'{k}/{p}':>18}" for k, p in row["kept"]))
    lines += [
        "",
        "attainment on the real engine, in brackets simulated; capacity in requests/s, - outside the rates run",
    ]
    return "\n".join(lines)


def shown(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.2f}"


if __name__ == "__main__":
    sys.exit(main())
