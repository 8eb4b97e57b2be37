"""`slos-serve bench`: open-loop load on any OpenAI URL, graded by class."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve import figures, pages
from slos_serve.bench import plots, report
from slos_serve.bench.client import (
    ENDPOINTS,
    SLO_FORMS,
    BenchRequest,
    StreamResult,
)
from slos_serve.bench.grade import GradedStream, entry, grade_run, request_row, verdict
from slos_serve.bench.http_json import get_json
from slos_serve.bench.target import Target
from slos_serve.bench.wire import Wire, parse_extra_body, parse_headers
from slos_serve.bench.workload import build_requests, parse_goodput
from slos_serve.cache import write_json
from slos_serve.commands.options import whole
from slos_serve.config import load_slo_config
from slos_serve.emulated.emulation import notice, notice_of
from slos_serve.errors import ConfigError, SlosServeError
from slos_serve.records.profile import Profile
from slos_serve.terminal.progress import Progress
from slos_serve.traces.offered import add_options, check_options, offered_trace, summary, tell
from slos_serve.traces.rows import TOO_LONG
from slos_serve.traces.trace import Trace

HELP = "Offer load to any OpenAI URL, open loop, and grade it by class."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench`."""
    parser.epilog = (
        "examples:\n"
        "  slos-serve bench --target http://127.0.0.1:8000 --goodput ttft:500,tpot:50 --rate 2 --num-requests 100\n"
        "  slos-serve bench --target http://127.0.0.1:8000 --trace azure.csv.gz@900:300 --mix chat=1 \\\n"
        "      --profile profile.json --rate 4 --out results"
    )
    parser.add_argument("--target", metavar="URL", required=True, help="server to load, such as http://127.0.0.1:8000")
    parser.add_argument("--model", metavar="NAME", help="model name (default: the server's first)")
    add_options(parser)
    parser.add_argument("--slo-config", metavar="FILE", help="latency classes (default: the shipped ones)")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="frozen reference that slowdown SLOs are graded with"
    )
    parser.add_argument("--goodput", metavar="ttft:MS,tpot:MS", help="the same promises for every request instead")
    parser.add_argument("--system", metavar="NAME", help="name of the system in the results (default: by its verdicts)")
    parser.add_argument("--endpoint", choices=ENDPOINTS, default="completions", help="completions")
    parser.add_argument("--slo-form", choices=SLO_FORMS, default="body", help="where the SLO is said: body")
    parser.add_argument(
        "--plain", action="store_true", help="send only what every OpenAI server knows (default: until one is refused)"
    )
    parser.add_argument(
        "--header", metavar="NAME=VALUE", action="append", default=[], help="an HTTP header to send; may be repeated"
    )
    parser.add_argument(
        "--extra-body", metavar="JSON", help="fields put over those of every request's body; null leaves one out"
    )
    parser.add_argument("--api-key", metavar="KEY", help="default: $OPENAI_API_KEY")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json, requests.jsonl and report.html")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="0")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Offer the load and print the grades; 1 where every request failed."""
    check_options("bench", args)
    target = Target(
        url=args.target,
        api_key=_api_key(args),
        headers=parse_headers(args.header),
        wire=Wire(parse_extra_body(args.extra_body), is_plain=args.plain),
    )
    model, longest = asyncio.run(target.model(args.model))
    trace = offered_trace(args, max_total_tokens=None if longest is None else longest - 1)
    requests = make_requests(args, trace)
    tell(trace.source, len(requests), trace.span_s, trace)
    results = _offer(args, target, model, requests)
    streams = grade_run(requests, results)
    span_s = trace.span_s or 1.0  # all at one instant: as `tell` says
    is_ours = any(verdict(result) for result in results)
    system = args.system or ("slos-serve" if is_ours else "vllm")
    graded = entry(streams, system=system, scenario=_scenario(args), span_s=span_s, rate_rps=len(trace) / span_s)
    document = {
        "target": args.target,
        "model": model,
        "emulated": _emulated(args, is_ours=is_ours),
        "workload": {
            "trace": trace.source,
            "num_requests": len(requests),
            "rate_rps": len(trace) / span_s,
            "gap_cv": trace.gap_cv,
            "dropped_too_long": trace.origin.left_out.get(TOO_LONG, 0),
            "read": summary(trace),
            "max_model_len": longest,
            "seed": args.seed,
        },
        "client": {
            "max_lag_s": max(result.lag_s for result in results),
            "counted_by": sorted({result.counted_by for result in results if result.counted_by}),
            "fields_left_out": sorted(target.wire.refused),
            "errors": sorted({result.error for result in results if result.error})[:10],
        },
        "systems": {system: [graded]},
    }
    if args.out is not None:
        _write(args.out, document, streams)
    _print(args, document, system)
    return 1 if graded["failed"] == len(requests) else 0


def _emulated(args: argparse.Namespace, *, is_ours: bool) -> str:
    """Return what is to be said of an emulated device, "" for a real one; known from our server or the profile."""
    key = None if args.profile is None else Profile.load(args.profile).document.get("key")
    if is_ours:
        with contextlib.suppress(SlosServeError):
            url = args.target.rstrip("/").removesuffix("/v1")
            return notice_of(get_json(f"{url}/v1/slo/status", _api_key(args)).get("device"))
    return notice(key)


def _api_key(args: argparse.Namespace) -> str | None:
    return args.api_key or os.environ.get("OPENAI_API_KEY")


def make_requests(args: argparse.Namespace, trace: Trace) -> list[BenchRequest]:
    """Return the requests of the trace with what each is promised."""
    profile = Profile.load(args.profile) if args.profile is not None else None
    config = load_slo_config(args.slo_config)
    unknown = sorted(set(trace.slo_class.tolist()) - set(config.classes))
    if unknown:
        known = ", ".join(config.classes)
        raise ConfigError(where="bench", key="class", value=unknown[0], expected=f"one of {known}")
    return build_requests(
        trace,
        config=config,
        reference=None if profile is None else profile.reference_s,
        rng=np.random.default_rng(args.seed),
        slo=parse_goodput(args.goodput) if args.goodput else None,
    )


def _scenario(args: argparse.Namespace) -> str:
    return Path(str(args.trace)).name if args.trace is not None else "small"


def _offer(args: argparse.Namespace, target: Target, model: str, requests: list[BenchRequest]) -> list[StreamResult]:
    done = 0
    last_s = max(request.offset_s for request in requests)
    with Progress(f"offering {len(requests)} requests in {last_s:.0f} s") as progress:

        def note(_: StreamResult) -> None:
            nonlocal done
            done += 1
            progress(done / len(requests))

        return asyncio.run(
            target.offer(model, requests, endpoint=args.endpoint, slo_form=args.slo_form, on_result=note)
        )


def _write(folder: Path, document: dict[str, Any], streams: list[GradedStream]) -> None:
    rows = [request_row(stream) for stream in streams]
    write_json(document, folder / "results.json")
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    systems = document["systems"]
    (name,) = systems
    timeline = {name: rows}
    rate = f"{document['workload']['rate_rps']:.2f} requests per second"
    sections = report.comparison_sections(systems, timeline=timeline, rate=rate)
    graded = systems[name][0]
    where = ", on an emulated device" if document["emulated"] else ""
    page = pages.page(
        title=f"{report.NAMES.get(name, name)}: {document['model']}{where}",
        lead=f"{graded['num_requests']} requests at {rate}.",
        tiles=[(pages.percent(graded["attainment"]), "SLO attainment", "ours")],
        sections=sections,
        notice=document["emulated"],
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    figures.save(plots.attainment_figure(systems), folder / "attainment.png")


def _print(args: argparse.Namespace, document: dict[str, Any], system: str) -> None:
    if args.json:
        print(json.dumps(document))
        return
    (graded,) = document["systems"][system]
    if document["emulated"]:
        print(document["emulated"])
    print(report.text_table(document["systems"]))
    outcomes = ", ".join(
        f"{graded[key]} {key}" for key in ("met", "missed", "declined", "rejected", "failed", "cancelled")
    )
    print(f"\n{outcomes}; {graded['goodput_rps']:.2f} met per second")
    for key, name in (("ttft_s", "time to first token"), ("tpot_s", "time per token")):
        values = ", ".join(f"{rank} {v * 1e3:.0f} ms" for rank, v in graded[key].items() if v is not None)
        print(f"{name}: {values or 'none'}")
    for reason, count in document["workload"]["read"]["left_out"].items():
        print(f"left out: {count} {reason}")
    if document["client"]["fields_left_out"]:
        print(f"sent without {', '.join(document['client']['fields_left_out'])}, which this server does not take")
    for error in document["client"]["errors"][:3]:
        print(f"failed: {error}")
    if args.out is not None:
        print(f"written to {args.out}/results.json, requests.jsonl, report.html")
