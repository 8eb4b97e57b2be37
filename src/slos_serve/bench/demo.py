"""The demo: vLLM against vLLM with slos-serve, a real model, the same bursty load, on this machine.

1. Start our server; it measures its own steps (the profile). Nothing else runs meanwhile.
2. From the profile alone: the promises of three classes, two rates, and two token budgets for plain vLLM.
3. Start plain vLLM twice, once per budget; warm all three up in the same way.
4. At each rate, offer the same requests to each, one engine at a time; the better budget is the opponent.

Nothing is tuned on what is reported, and a run is never repeated until it looks better.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slos_serve import figures, pages
from slos_serve.bench import plots, report
from slos_serve.bench.compare import OURS, STOCK, Run, best_setting, run_once, save_run
from slos_serve.bench.lab import MODEL_NAME, Lab, Say, Side, describe_engine, read_status
from slos_serve.bench.plots import plot_fit
from slos_serve.bench.scaled import Scaled
from slos_serve.cache import write_json
from slos_serve.core.fit import from_records
from slos_serve.emulated.emulation import notice_of
from slos_serve.records.profile import read_records
from slos_serve.terminal.progress import Progress

CALM, BUSY = 0.15, 0.8  # rates, as shares of the service capacity that the profile implies


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user may choose. `seconds` is the length of one run."""

    model: str
    out: Path
    seconds: float = 32.0
    seed: int = 7
    rates_rps: tuple[float, ...] | None = None
    emulate: str | None = None


@dataclass(slots=True, kw_only=True)
class DemoResult:
    """What the demo found."""

    scaled: Scaled
    rates_rps: list[float]
    runs: list[Run] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    overhead: dict[str, float | None] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


def run_demo(options: Options, *, say: Say) -> DemoResult:
    """Do the whole demo and write the report; every server is ended, whatever happens."""
    with Lab(model=options.model, out=options.out, say=say, emulate=options.emulate) as lab:
        scaled = lab.start_ours(fresh=True)
        capacity = scaled.service_capacity_rps
        rates = list(options.rates_rps or (round(share * capacity, 2) for share in (CALM, BUSY)))
        outcome = DemoResult(scaled=scaled, rates_rps=rates, engine=describe_engine(options.model, options.emulate))
        say(_profile_text(scaled))
        samples = from_records(read_records(lab.record_path))
        plot_fit(scaled.profile.perf_model, samples, options.out / "profile.png")
        overhead = Overhead(options.out / "logs")
        try:
            sides = lab.start_sides(scaled, scaled.budgets[:2])
            outcome.overhead = overhead.result()
        finally:
            overhead.stop()
        _run_all(sides, outcome, options, say)
        outcome.status = read_status(sides[0].engine.url)
    write_report(outcome, options)
    return outcome


def _run_all(sides: Sequence[Side], outcome: DemoResult, options: Options, say: Say) -> None:
    """Run every rate on every side, in turns; save each run as it ends."""
    total = len(outcome.rates_rps) * len(sides)
    say(f"{total} runs of {options.seconds:.0f} s: the same requests for each engine, one engine at a time.")
    for i, rate in enumerate(outcome.rates_rps):
        for j, side in enumerate(sides[::-1] if i % 2 else sides):
            label = f"run {i * len(sides) + j + 1} of {total}: {rate:.2f} requests/s on {side.name}"
            with Progress(label) as progress:
                started = time.monotonic()
                run = run_once(
                    side.engine.url,
                    MODEL_NAME,
                    outcome.scaled,
                    system=side.system,
                    budget=side.budget,
                    rate_rps=rate,
                    duration_s=options.seconds,
                    seed=options.seed,
                    on_result=lambda _: progress(min(1.0, (time.monotonic() - started) / options.seconds)),  # noqa: B023
                )
            side.engine.check()
            outcome.runs.append(run)
            save_run(run, options.out / "runs")


class Overhead:
    """Measure the schedulers' CPU seconds per step beside the servers' start, where the sources are there."""

    def __init__(self, folder: Path) -> None:
        script = Path(__file__).parents[3] / "benchmarks" / "step_overhead.py"
        self.out = folder / "step_overhead.json"
        self.out.unlink(missing_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        if script.exists():
            command = [sys.executable, str(script), "--sizes", "16", "--steps", "200", "--cases", "steady"]
            command += ["--json", str(self.out)]
            with (folder / "step_overhead.log").open("wb") as log:
                self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def result(self) -> dict[str, float | None]:
        """Wait for it and return `stock_p50` and `ours_p50` in seconds, None where it could not be measured."""
        if self._process is None:
            return {"stock_p50": None, "ours_p50": None}
        try:
            self._process.wait(120)
            return read_overhead(json.loads(self.out.read_text(encoding="utf-8")))
        except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError, StopIteration):
            return {"stock_p50": None, "ours_p50": None}
        finally:
            self.stop()

    def stop(self) -> None:
        """End it if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def read_overhead(document: Mapping[str, Any]) -> dict[str, float | None]:
    """Return seconds per step, stock and ours, from the benchmark's row of equal batches."""
    row = next(row for row in document["rows"] if row["case"] == "steady")
    return {"stock_p50": row["stock"]["p50"] / 1e6, "ours_p50": row["enforce"]["p50"] / 1e6}


def _profile_text(scaled: Scaled) -> str:
    profile, document = scaled.profile, scaled.profile.document
    classes = ", ".join(f"{name} {c.tpot_ms:.0f} ms" for name, c in scaled.config.classes.items() if c.tpot_ms)
    return (
        f"Profile: a decode step takes {profile.decode_step_s * 1e3:.1f} ms, a prompt of 512 tokens "
        f"{profile.reference_s(512) * 1e3:.0f} ms (R2 {document['r2']:.3f}, held-out error "
        f"{document['mape_heldout'] * 100:.1f} %).\n"
        f"Promises per token: {classes}; first token within 3 or 5 times the idle engine's time.\n"
        f"It could serve {scaled.service_capacity_rps:.2f} requests per second with full steps."
    )


def systems_of(runs: Sequence[Run]) -> tuple[dict[str, list[Run]], dict[float, str]]:
    """Return the runs to compare, ours and the best of plain vLLM at each rate, and which budget that was."""
    rates = sorted({run["rate_rps"] for run in runs})
    chosen: dict[str, list[Run]] = {STOCK: [], OURS: []}
    best: dict[float, str] = {}
    for rate in rates:
        here = [run for run in runs if run["rate_rps"] == rate]
        stock = [run for run in here if run["system"] == STOCK]
        if stock:
            best[rate] = best_setting(stock)
            chosen[STOCK] += [run for run in stock if run["setting"] == best[rate]]
        chosen[OURS] += [run for run in here if run["system"] == OURS]
    return chosen, best


def write_report(outcome: DemoResult, options: Options) -> None:
    """Write report.json, report.html and the PNG plots."""
    chosen, best = systems_of(outcome.runs)
    systems = {name: [run["entry"] for run in runs] for name, runs in chosen.items()}
    profile = outcome.scaled.profile.document
    document = {
        "schema": "slos-serve-demo/1",
        "engine": outcome.engine,
        "profile": {key: profile.get(key) for key in ("r2", "mape_heldout", "margin_coverage", "num_steps", "terms")},
        "workload": {
            **outcome.scaled.describe(),
            "rates_rps": outcome.rates_rps,
            "seconds": options.seconds,
            "seed": options.seed,
            "vllm_settings": sorted({run["setting"] for run in outcome.runs if run["system"] == STOCK}),
            "vllm_best_setting": {f"{rate:g}": name for rate, name in best.items()},
            "max_client_lag_s": max(run["max_lag_s"] for run in outcome.runs),
        },
        "systems": systems,
        "every_run": [
            {"setting": run["setting"], "rate_rps": run["rate_rps"], "attainment": run["entry"]["attainment"]}
            for run in outcome.runs
        ],
        "step_overhead_s": outcome.overhead,
        "planner": (outcome.status.get("snapshot") or {}).get("plan_s"),
        "mode": outcome.status.get("effective_mode"),
    }
    write_json(document, options.out / "report.json")
    busiest = max(outcome.rates_rps)
    rows = {name: run["requests"] for name, runs in chosen.items() for run in runs if run["rate_rps"] == busiest}
    (options.out / "report.html").write_text(html_page(document, rows), encoding="utf-8")
    figures.save(plots.attainment_figure(systems), options.out / "attainment.png")
    end_s = max(row["sent_s"] for part in rows.values() for row in part) + 0.5
    figures.save(plots.timeline_figure(rows, start_s=0.0, end_s=end_s), options.out / "timeline.png")


def html_page(document: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the report page of the demo. `rows[system]`: the requests of the busiest run."""
    systems = document["systems"]
    ours, stock = systems[OURS][-1], systems[STOCK][-1]
    kept, promised = (sum(entry[key] for entry in systems[OURS]) for key in ("kept", "promised"))
    rate = f"{ours['rate_rps']:.2f} requests per second"
    lead = (
        f"At {rate} in bursts, vLLM with slos-serve served <b>{pages.percent(ours['attainment'])}</b> of requests "
        f"with every token in time; plain vLLM, at the better of two token budgets, "
        f"<b>{pages.percent(stock['attainment'])}</b>. Same model, same requests, same machine."
    )
    emulated = notice_of(document["engine"])
    tiles = [
        (pages.percent(ours["attainment"]), f"attainment with slos-serve at {rate}", "ours"),
        (pages.percent(stock["attainment"]), f"attainment of plain vLLM at {rate}", "stock"),
        (f"{kept} of {promised}", "promises kept, all runs", "good"),
    ]
    workload, profile, engine = document["workload"], document["profile"], document["engine"]
    overhead = document["step_overhead_s"]
    facts: dict[str, object] = {
        "model": engine["model"],
        "engine": f"vLLM {engine['vllm']}, {engine['device']}",
        "performance model": f"R2 {profile['r2']:.3f}, held-out error {profile['mape_heldout'] * 100:.1f} %",
        "one decode step, idle": f"{workload['decode_step_s'] * 1e3:.1f} ms (a 7B model on an A100: 12.5 ms)",
        "arrivals": f"{workload['arrivals']} (coefficient of variation of the gaps), seed {workload['seed']}",
        "length of a run": f"{workload['seconds']:.0f} s",
        "plain vLLM was run with": ", ".join(workload["vllm_settings"]),
        "its best at each rate": ", ".join(f"{r}/s: {name}" for r, name in workload["vllm_best_setting"].items()),
        "client's worst delay in sending": f"{workload['max_client_lag_s'] * 1e3:.0f} ms",
    }
    for name, promise in workload["classes"].items():
        slowdown, tpot = promise["ttft_slowdown"], promise["tpot_ms"]
        facts[f"class {name}"] = f"first token within {slowdown:g} x the idle engine's time, then {tpot:.0f} ms a token"
    if overhead.get("ours_p50"):
        stock_us, ours_us = overhead["stock_p50"] * 1e6, overhead["ours_p50"] * 1e6
        facts["scheduler, CPU time a step"] = f"{stock_us:.0f} us plain, {ours_us:.0f} us with slos-serve (16 decodes)"
    sections = report.comparison_sections(systems, timeline=rows, rate=rate)
    sections.append(("How it was measured", pages.facts(facts)))
    title = "vLLM and vLLM with slos-serve, side by side" + (", on an emulated device" if emulated else "")
    return pages.page(title=title, lead=lead, tiles=tiles, sections=sections, notice=emulated)
