"""The six scenarios of the evaluation, built from public trace files in a folder the user names.

Every scenario is offered in numbered parts. `part="report"`: seed 0 is the published window, the others
are further windows of the same trace, which do not overlap. `part="tune"`: windows from before all of
them, for choosing settings. The rate is varied by stretching time, so a seed is
the same requests in the same order at every rate: comparisons are paired.

Lengths come from the trace unless said. Where a scenario draws (which documents, which sessions, Poisson
gaps), the generator is seeded with the part and the seed. Requests longer than the context are dropped
before the rate is set, and counted. Class promises are the shipped ones with no floor and no allowance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.config import OVERRIDES, SloClass, SloConfig
from slos_serve.errors import ConfigError, unknown_name
from slos_serve.sim.workloads.sessions import tool_sessions
from slos_serve.sim.workloads.workload import History, RequestFactory, Workload, trace_workload
from slos_serve.traces.trace import Trace, read_lengths, read_trace, synthetic_arrivals

if TYPE_CHECKING:
    from slos_serve.sim.hardware import Hardware

PARTS = ("report", "tune")
SCENARIO_SLOS = SloConfig(ttft_floor_ms=0.0, ttft_allowance_ms=0.0)
HISTORY_ROWS = 1000

CONV, CODE = "traces/azure2023_conv.csv.gz", "traces/azure2023_code.csv.gz"
ARXIV, REASONING = "lengths/arxiv_summarization_4k_llama2.csv.gz", "lengths/reasoning_s1k.csv.gz"
CONV_LEAD_S = 77.3  # the conversation trace starts this long before the coding trace
WINDOW_S = 300.0
MAX_REASONING = 300  # requests of a window, of 1,000 that are there; a longer one has the same lengths again
SUMMARIZATION_SHARE = 0.1  # of the requests of `mixed`

# (start, duration) in seconds, apart from each other; every one holds 160 requests or more.
CONV_WINDOWS = {
    "report": ((900.0, 300.0), *((1200.0 + 255.0 * i, 255.0) for i in range(9))),
    "tune": ((0.0, 300.0), (300.0, 300.0), (600.0, 300.0)),
}
CODE_WINDOWS = {
    "report": (
        *((1786.0, 300.0), (950.0, 170.0), (1120.0, 170.0), (1290.0, 160.0), (1450.0, 170.0)),
        *((1620.0, 166.0), (2086.0, 150.0), (2236.0, 150.0), (2386.0, 150.0), (2536.0, 160.0)),
    ),
    "tune": ((150.0, 280.0), (430.0, 260.0), (690.0, 210.0)),
}  # those of `mixed` are the same, on this trace's clock
TOOL_WINDOWS = {
    "report": tuple(
        (start_s, 100.0) for start_s in (1936.0, 1036.0, 1136.0, 1336.0, 1436.0, 1636.0, 1736.0, 2136.0, 2236.0, 2536.0)
    ),
    "tune": ((150.0, 100.0), (550.0, 100.0), (850.0, 100.0)),
}
Windows = Mapping[str, tuple[tuple[float, float], ...]]
HISTORY_END_S = 900.0


_read_trace = lru_cache(maxsize=8)(partial(read_trace, from_first=False))  # windows are on the files' own clock
_read_lengths = lru_cache(maxsize=8)(read_lengths)


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

    def window(self, windows: Windows) -> tuple[float, float]:
        """Return start and duration of this seed's window, in seconds; seeds beyond the list go round."""
        known = windows[self.part]
        return known[self.seed % len(known)]

    def read(self, path: str) -> Trace:
        """Read a trace of the data folder. `ConfigError` where it is not there."""
        return _read_trace(self._file(path))

    def lengths(self, path: str) -> Trace:
        """Read a length file of the data folder."""
        return _read_lengths(self._file(path))

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
    """A named workload. `max_context`: longest sequence offered, in tokens, whatever the hardware could hold.

    `has_rounds`: requests wait for earlier ones. `enough_requests`: how many of a window a capacity search
    runs: enough for several times the life of a request at the rates in question.
    `enough_measured`: the same with the measured constants, where that takes more.
    `published`, `measured`: the hardware file that stands for the scenario in each set of constants.
    """

    name: str
    build: Callable[[Offer, RequestFactory, int], Workload]
    classes: tuple[str, ...]
    has_rounds: bool = False
    max_context: int = 8192
    enough_requests: int = 200
    enough_measured: int = 0
    published: str = "a100-40g-opt-6.7b-published"
    measured: str = "a100-80g-7b-measured"

    def num_requests(self, hardware: str) -> int:
        """Return how many requests of a window a capacity search runs on the hardware of this name."""
        return max(self.enough_requests, self.enough_measured if hardware == self.measured else 0)

    def max_model_len(self, hardware: Hardware) -> int:
        """Return the context length of this scenario on this hardware."""
        return hardware.limits(max_model_len=self.max_context).max_model_len

    def offer(self, offer: Offer, slo_config: SloConfig = SCENARIO_SLOS) -> Workload:
        """Return the workload of one run."""
        longest = self.max_model_len(offer.hardware)
        factory = RequestFactory(slo_config, offer.hardware.reference_s, longest)
        return replace(self.build(offer, factory, longest), name=self.name)


def scaled_slos(scale: float) -> SloConfig:
    """Return the classes of the scenarios with every promise multiplied by `scale`."""
    if scale == 1.0:
        return SCENARIO_SLOS

    def scaled(slo_class: SloClass) -> SloClass:
        given = {name: getattr(slo_class, name) for name in (*OVERRIDES, "final_tpot_ms")}
        return replace(slo_class, **{name: scale * value for name, value in given.items() if value is not None})

    return replace(SCENARIO_SLOS, classes={name: scaled(one) for name, one in SCENARIO_SLOS.classes.items()})


def rows_of(trace: Trace, slo_class: str) -> History:
    """Return lengths as history, latest last, at most `HISTORY_ROWS`."""
    prompt, output = trace.prompt_tokens[-HISTORY_ROWS:].tolist(), trace.output_tokens[-HISTORY_ROWS:].tolist()
    return [(slo_class, p, o) for p, o in zip(prompt, output, strict=True)]


def history_of(trace: Trace, slo_class: str, window: tuple[float, float], longest: int) -> History:
    """Return what was served in the trace's first part, the window itself left out."""
    times = trace.arrived_at_s
    outside = (times < HISTORY_END_S) & ~((times >= window[0]) & (times < sum(window)))
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


def _window(path: str, slo_class: str, windows: Windows) -> Callable[..., Workload]:
    def build(offer: Offer, factory: RequestFactory, longest: int) -> Workload:
        trace = offer.read(path)
        window = offer.window(windows)
        return trace_workload(
            trace.window(*window),
            factory,
            max_model_len=longest,
            default_class=slo_class,
            rate_rps=offer.rate_rps,
            max_requests=offer.max_requests,
            history=history_of(trace, slo_class, window, longest),
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
    start_s, duration_s = offer.window(CODE_WINDOWS)
    conv, code = offer.read(CONV), offer.read(CODE)
    chat, coding = conv.window(start_s + CONV_LEAD_S, duration_s), code.window(start_s, duration_s)
    num_fitting = sum(len(part.limited_to(longest)[0]) for part in (chat, coding))
    count = round(num_fitting * SUMMARIZATION_SHARE / (1 - SUMMARIZATION_SHARE))
    documents, history = _documents(offer, longest, count)
    times = np.sort(offer.rng(1).uniform(0.0, duration_s, len(documents)))
    parts = [
        labelled(chat, "chat"),
        labelled(coding, "coding"),
        labelled(documents.with_arrivals(times), "summarization"),
    ]
    return trace_workload(
        merged(parts, duration_s),
        factory,
        max_model_len=longest,
        default_class="chat",
        rate_rps=offer.rate_rps,
        max_requests=offer.max_requests,
        history=[
            *history_of(conv, "chat", (start_s + CONV_LEAD_S, duration_s), longest),
            *history_of(code, "coding", (start_s, duration_s), longest),
            *history,
        ],
    )


def _reasoning(offer: Offer, factory: RequestFactory, longest: int) -> Workload:
    times = offer.read(CONV).window(*offer.window(CONV_WINDOWS)).arrived_at_s
    times = times[: max(MAX_REASONING, offer.max_requests or 0)]
    lengths, _ = offer.lengths(REASONING).limited_to(longest)
    order = offer.rng().permutation(len(lengths))
    chosen, others = np.sort(order[:MAX_REASONING]), np.sort(order[MAX_REASONING:])
    return trace_workload(
        lengths.select(np.resize(chosen, len(times))).with_arrivals(times),
        factory,
        max_model_len=longest,
        default_class="reasoning",
        rate_rps=offer.rate_rps,
        max_requests=offer.max_requests,
        history=rows_of(lengths.select(others), "reasoning"),
    )


def _tools(offer: Offer, factory: RequestFactory, longest: int) -> Workload:
    starts = offer.read(CODE).window(*offer.window(TOOL_WINDOWS))
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
        Scenario(name="chatbot", classes=("chat",), build=_window(CONV, "chat", CONV_WINDOWS), enough_requests=400),
        Scenario(name="coding", classes=("coding",), build=_window(CODE, "coding", CODE_WINDOWS)),
        Scenario(name="summarization", classes=("summarization",), build=_summarization),
        Scenario(name="mixed", classes=("chat", "coding", "summarization"), build=_mixed, enough_requests=300),
        Scenario(
            name="tool-calling",
            classes=("tool",),
            has_rounds=True,
            build=_tools,
            max_context=16384,
            published="a100-40g-toolllama-7b-published",
            measured="h100-8b-derived",
        ),
        Scenario(
            name="reasoning",
            classes=("reasoning",),
            build=_reasoning,
            max_context=16384,
            enough_requests=300,
            enough_measured=1000,  # an H100's memory alone takes a hundred
            published="a100-40g-r1-distill-7b-published",
            measured="h100-8b-derived",
        ),
    )
}


HARDWARE_SETS = ("published", "measured")  # names that stand for one hardware file per scenario


def hardware_of(scenario: str, name: str) -> str:
    """Return the hardware that a scenario runs on: `name` itself, or the set's file for the scenario."""
    return str(getattr(find_scenario(scenario), name)) if name in HARDWARE_SETS else name


def find_scenario(name: str) -> Scenario:
    """Return a scenario by name; `ConfigError` says the closest name and lists all."""
    if name not in SCENARIOS:
        raise unknown_name(where="arguments", key="scenario", value=name, names=SCENARIOS)
    return SCENARIOS[name]
