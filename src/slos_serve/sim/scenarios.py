"""The six scenarios of the evaluation, built from public trace files in a folder the user names.

Every scenario is offered in numbered parts. `part="report"`: seed 0 is the published window, the others
are further windows of the same trace (those of `coding` overlap: the trace is short). `part="tune"`:
windows from before all of them, for choosing settings. The rate is varied by stretching time, so a seed is
the same requests in the same order at every rate: comparisons are paired.

Lengths come from the trace unless said. Where a scenario draws (which documents, which sessions, Poisson
gaps), the generator is seeded with the part and the seed. Requests longer than the context are dropped
before the rate is set, and counted. Class promises are the shipped ones with no floor and no allowance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.config import SloConfig
from slos_serve.errors import ConfigError
from slos_serve.sim.sessions import tool_sessions
from slos_serve.sim.traces import Trace, read_lengths, read_trace, synthetic_arrivals
from slos_serve.sim.workload import History, RequestFactory, Workload, trace_workload

if TYPE_CHECKING:
    from slos_serve.sim.hardware import Hardware

PARTS = ("report", "tune")
SCENARIO_SLOS = SloConfig(ttft_floor_ms=0.0, ttft_allowance_ms=0.0)
HISTORY_ROWS = 1000

CONV, CODE = "traces/azure2023_conv.csv.gz", "traces/azure2023_code.csv.gz"
ARXIV, REASONING = "lengths/arxiv_summarization_4k_llama2.csv.gz", "lengths/reasoning_s1k.csv.gz"
CONV_LEAD_S = 77.3  # the conversation trace starts this long before the coding trace
WINDOW_S = 300.0
TOOL_WINDOW_S = 100.0
MAX_REASONING = 300  # requests, of 1,000 that are there
SUMMARIZATION_SHARE = 0.1  # of the requests of `mixed`

CONV_WINDOWS = {
    "report": (900.0, 1155.0, 1410.0, 1665.0, 1920.0, 2175.0, 2430.0, 2685.0, 2940.0, 3195.0),
    "tune": (0.0, 300.0, 600.0),
}
CODE_WINDOWS = {
    "report": (1786.0, 950.0, 1070.0, 1190.0, 1310.0, 1430.0, 1550.0, 2086.0, 2206.0, 2326.0),
    "tune": (150.0, 450.0, 650.0),
}
MIXED_WINDOWS = {
    "report": (1000.0, 1130.0, 1260.0, 1390.0, 1520.0, 1650.0, 1786.0, 2086.0, 2206.0, 2326.0),
    "tune": (150.0, 450.0, 650.0),
}  # on the coding trace's clock
TOOL_WINDOWS = {
    "report": (1936.0, 1050.0, 1150.0, 1250.0, 1350.0, 1450.0, 1550.0, 1650.0, 2036.0, 2136.0),
    "tune": (150.0, 450.0, 650.0),
}
HISTORY_END_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Which run of a scenario: folder of files, hardware, rate (requests per second, None: as recorded), part, seed.

    `max_requests` cuts the window short, for a quick look.
    """

    data: Path
    hardware: Hardware
    rate_rps: float | None
    part: str = "report"
    seed: int = 0
    max_requests: int | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part = {self.part!r}: expected one of {PARTS}")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed!r}: expected 0 or more")

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Return this part's and seed's generator; further ones by `stream`."""
        return np.random.default_rng([PARTS.index(self.part), self.seed, stream])

    def start_s(self, windows: dict[str, tuple[float, ...]]) -> float:
        """Return where this seed's window starts; seeds beyond the list go round."""
        starts = windows[self.part]
        return starts[self.seed % len(starts)]

    def read(self, path: str) -> Trace:
        """Read a trace of the data folder. `ConfigError` where it is not there."""
        return read_trace(self._file(path))

    def lengths(self, path: str) -> Trace:
        """Read a length file of the data folder."""
        return read_lengths(self._file(path))

    def file(self, path: str) -> Path:
        """Return an existing file of the data folder."""
        return self._file(path)

    def _file(self, path: str) -> Path:
        file = self.data / path
        if not file.is_file():
            raise ConfigError(where="data", key=path, value=str(file), expected="a file in the folder given by --data")
        return file


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A named workload. `max_context`: longest sequence offered, in tokens, whatever the hardware could hold."""

    name: str
    build: Callable[[Offer, RequestFactory, int], Workload]
    max_context: int = 8192

    def max_model_len(self, hardware: Hardware) -> int:
        """Return the context length of this scenario on this hardware."""
        return hardware.limits(max_model_len=self.max_context).max_model_len

    def offer(self, offer: Offer, slo_config: SloConfig = SCENARIO_SLOS) -> Workload:
        """Return the workload of one run."""
        longest = self.max_model_len(offer.hardware)
        factory = RequestFactory(slo_config, offer.hardware.reference_s, longest)
        return replace(self.build(offer, factory, longest), name=self.name)


def rows_of(trace: Trace, slo_class: str) -> History:
    """Return lengths as history, latest last, at most `HISTORY_ROWS`."""
    prompt, output = trace.prompt_tokens[-HISTORY_ROWS:].tolist(), trace.output_tokens[-HISTORY_ROWS:].tolist()
    return [(slo_class, p, o) for p, o in zip(prompt, output, strict=True)]


def history_of(trace: Trace, slo_class: str, start_s: float, longest: int) -> History:
    """Return what was served in the trace's first part, the window itself left out."""
    times = trace.arrived_at_s
    outside = (times < HISTORY_END_S) & ~((times >= start_s) & (times < start_s + WINDOW_S))
    fits = trace.prompt_tokens + trace.output_tokens <= longest
    return rows_of(trace.select(outside & fits), slo_class)


def labelled(trace: Trace, slo_class: str) -> Trace:
    """Return the trace with every row in one class."""
    return replace(trace, slo_class=np.full(len(trace), slo_class))


def merged(parts: list[Trace], span_s: float) -> Trace:
    """Return traces on one clock as one."""
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("prompt_tokens", "output_tokens", "slo_class")
    }
    times = np.concatenate([part.arrived_at_s for part in parts])
    order = np.argsort(times, kind="stable")
    sorted_columns = {name: values[order] for name, values in columns.items()}
    return Trace.build(arrived_at_s=times[order], span_s=span_s, source="mixed", **sorted_columns)


def _window(path: str, slo_class: str, windows: dict[str, tuple[float, ...]]) -> Callable[..., Workload]:
    def build(offer: Offer, factory: RequestFactory, longest: int) -> Workload:
        trace = offer.read(path)
        start_s = offer.start_s(windows)
        return trace_workload(
            trace.window(start_s, WINDOW_S),
            factory,
            max_model_len=longest,
            default_class=slo_class,
            rate_rps=offer.rate_rps,
            max_requests=offer.max_requests,
            history=history_of(trace, slo_class, start_s, longest),
        )

    return build


def _documents(offer: Offer, longest: int, count: int) -> tuple[Trace, History]:
    """Draw documents that fit, and others as history."""
    lengths, _ = offer.lengths(ARXIV).limited_to(longest)
    order = offer.rng().permutation(len(lengths))
    drawn, others = (np.zeros(len(lengths), np.bool_) for _ in range(2))
    drawn[order[:count]] = True
    others[order[count : count + HISTORY_ROWS]] = True
    return lengths.select(drawn), rows_of(lengths.select(others), "summarization")


def _summarization(offer: Offer, factory: RequestFactory, longest: int) -> Workload:
    count = 600
    documents, history = _documents(offer, longest, count)
    arrivals = synthetic_arrivals("poisson", count / WINDOW_S, count, offer.rng(1))
    return trace_workload(
        documents.with_arrivals(arrivals),
        factory,
        max_model_len=longest,
        default_class="summarization",
        rate_rps=offer.rate_rps,
        max_requests=offer.max_requests,
        history=history,
    )


def _mixed(offer: Offer, factory: RequestFactory, longest: int) -> Workload:
    start_s = offer.start_s(MIXED_WINDOWS)
    conv, code = offer.read(CONV), offer.read(CODE)
    chat, _ = conv.window(start_s + CONV_LEAD_S, WINDOW_S).limited_to(longest)
    coding, _ = code.window(start_s, WINDOW_S).limited_to(longest)
    count = round((len(chat) + len(coding)) * SUMMARIZATION_SHARE / (1 - SUMMARIZATION_SHARE))
    documents, history = _documents(offer, longest, count)
    times = np.sort(offer.rng(1).uniform(0.0, WINDOW_S, len(documents)))
    parts = [
        labelled(chat, "chat"),
        labelled(coding, "coding"),
        labelled(documents.with_arrivals(times), "summarization"),
    ]
    return trace_workload(
        merged(parts, WINDOW_S),
        factory,
        max_model_len=longest,
        default_class="chat",
        rate_rps=offer.rate_rps,
        max_requests=offer.max_requests,
        history=[
            *history_of(conv, "chat", start_s + CONV_LEAD_S, longest),
            *history_of(code, "coding", start_s, longest),
            *history,
        ],
    )


def _reasoning(offer: Offer, factory: RequestFactory, longest: int) -> Workload:
    times = offer.read(CONV).window(offer.start_s(CONV_WINDOWS), WINDOW_S).arrived_at_s[:MAX_REASONING]
    count = len(times)
    lengths, _ = offer.lengths(REASONING).limited_to(longest)
    order = offer.rng().permutation(len(lengths))
    chosen, others = (np.zeros(len(lengths), np.bool_) for _ in range(2))
    chosen[order[:count]] = True
    others[order[count:]] = True
    drawn = lengths.select(chosen)
    return trace_workload(
        drawn.with_arrivals(times[: len(drawn)]),
        factory,
        max_model_len=longest,
        default_class="reasoning",
        rate_rps=offer.rate_rps,
        max_requests=offer.max_requests,
        history=rows_of(lengths.select(others), "reasoning"),
    )


def _tools(offer: Offer, factory: RequestFactory, longest: int) -> Workload:
    starts = offer.read(CODE).window(offer.start_s(TOOL_WINDOWS), TOOL_WINDOW_S)
    return tool_sessions(
        offer.file("lengths/toolbench_full_sessions_calls.csv.gz"),
        offer.file("lengths/lmcache_agent_calls.csv.gz"),
        starts,
        factory,
        max_model_len=longest,
        rate_rps=offer.rate_rps,
        max_requests=offer.max_requests,
        rng=offer.rng(),
    )


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="chatbot", build=_window(CONV, "chat", CONV_WINDOWS)),
        Scenario(name="coding", build=_window(CODE, "coding", CODE_WINDOWS)),
        Scenario(name="summarization", build=_summarization),
        Scenario(name="mixed", build=_mixed),
        Scenario(name="tool-calling", build=_tools, max_context=16384),
        Scenario(name="reasoning", build=_reasoning, max_context=16384),
    )
}


def find_scenario(name: str) -> Scenario:
    """Return a scenario by name; `ConfigError` lists the names."""
    if name not in SCENARIOS:
        raise ConfigError(where="simulate", key="scenario", value=name, expected=f"one of {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
