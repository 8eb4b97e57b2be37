"""Workloads as columns: when requests arrive and how long they are.

A `Trace` is one table, read from a file (`read_trace`) or put together from lengths (`read_lengths`) and
arrival times made here (`synthetic_arrivals`). A file may be in any format of `slos_serve.traces.formats`, which is
told by its content, and may be gzipped. `FILE@start:duration` takes a window, in seconds from the first request.

The rate is varied by stretching time, which keeps a trace's shape: gaps, bursts and order stay.
Times are seconds from the trace's first request, or from the window's start; lengths are tokens.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slos_serve.traces.reading import Loaded, load
from slos_serve.traces.rows import COUNTS, LABELS, Origin, ReadOptions

if TYPE_CHECKING:
    from typing import Self

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
StrArray = npt.NDArray[np.str_]
BoolArray = npt.NDArray[np.bool_]

SMALL_TRACE = Path(__file__).parent / "data" / "mixed_small.csv.gz"  # made by `small_trace`, ships with the package


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in arrival order, one array per column; labels are "" where the file says nothing.

    `span_s` is the time the requests are spread over, so that `rate_rps` is requests per second of it.
    `origin`: the format it was read from, and what was left out.
    Raises `ValueError` for columns of unequal length, no rows, negative lengths or unsorted arrivals.
    """

    arrived_at_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    thinking_tokens: IntArray
    cached_tokens: IntArray
    session_id: StrArray
    turn: IntArray
    slo_class: StrArray
    span_s: float
    source: str = "trace"
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(f"{self.source}: no requests: expected at least one")
        for name in (*COUNTS, *LABELS):
            if len(getattr(self, name)) != len(self):
                raise ValueError(f"{self.source}: {name} has {len(getattr(self, name))} rows: expected {len(self)}")
        for name in COUNTS:
            if (getattr(self, name) < 0).any():
                raise ValueError(f"{self.source}: {name}: expected no negative numbers")
        if not np.isfinite(self.arrived_at_s).all() or (np.diff(self.arrived_at_s) < 0).any():
            raise ValueError(f"{self.source}: arrived_at_s: expected finite times in ascending order")
        if not (math.isfinite(self.span_s) and self.span_s >= 0):
            raise ValueError(f"{self.source}: span_s = {self.span_s!r}: expected a finite time >= 0")

    @classmethod
    def build(cls, *, arrived_at_s: npt.ArrayLike, prompt_tokens: npt.ArrayLike, output_tokens: npt.ArrayLike,
              source: str = "trace", span_s: float | None = None, origin: Origin | None = None,
              **columns: Any) -> Self:  # fmt: skip
        """Build from what is known; other counts are 0, labels "", and the span follows from the gaps."""
        times = np.array(arrived_at_s, np.float64)
        filled: dict[str, npt.NDArray[np.generic]] = {}
        given = {**columns, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        for name in (*COUNTS, *LABELS):
            dtype = np.int64 if name in COUNTS else np.str_
            value = given.pop(name, None)
            filled[name] = np.zeros(len(times), dtype) if value is None else np.array(value, dtype)
        if given:
            raise ValueError(f"{source}: columns {sorted(given)}: expected names among {[*COUNTS, *LABELS]}")
        if span_s is None:  # n gaps for n requests: the last one is taken to be an average one
            span_s = float(times[-1] - times[0]) * len(times) / (len(times) - 1) if len(times) > 1 else 0.0
        return cls(arrived_at_s=times, span_s=span_s, source=source, origin=origin or Origin(), **filled)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.arrived_at_s)

    @property
    def rate_rps(self) -> float:
        """Requests per second of the span; infinite where all arrive at once."""
        return len(self) / self.span_s if self.span_s > 0 else math.inf

    @property
    def gap_cv(self) -> float:
        """Coefficient of variation of the gaps between arrivals: 1 for Poisson, 0 where it has no meaning."""
        gaps = np.diff(self.arrived_at_s)
        return float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else 0.0

    def select(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64] | slice) -> Self:
        """Return some of the rows (their numbers may repeat), times and span unchanged; `ValueError` for none."""
        kept = {name: getattr(self, name)[rows] for name in ("arrived_at_s", *COUNTS, *LABELS)}
        return replace(self, **kept)

    def window(self, start_s: float, duration_s: float) -> Self:
        """Return what arrives in [start_s, start_s + duration_s), with time 0 at the window's start."""
        where = f"{self.source}@{start_s:g}:{duration_s:g}"
        inside = _inside(where, self.arrived_at_s, (start_s, duration_s))
        cut = self.select(inside)
        return replace(cut, arrived_at_s=cut.arrived_at_s - start_s, span_s=duration_s, source=where)

    def part(self, first: int, last: int) -> Self:
        """Return rows `first` to `last - 1`, from time 0 on, over the time until the row after them arrives."""
        rows = self.select(slice(first, last))
        start_s, newest_s = float(rows.arrived_at_s[0]), float(self.arrived_at_s[-1])
        ends_s = max(newest_s, self.span_s)  # of the trace
        if last < len(self):
            ends_s = float(self.arrived_at_s[last])
        return replace(rows, arrived_at_s=rows.arrived_at_s - start_s, span_s=ends_s - start_s)

    def at_rate(self, rate_rps: float) -> Self:
        """Return the same requests with time stretched so that `rate_rps` arrive each second."""
        if not (math.isfinite(rate_rps) and rate_rps > 0):
            raise ValueError(f"{self.source}: rate_rps = {rate_rps!r}: expected a positive finite number")
        if not math.isfinite(self.rate_rps):
            raise ValueError(f"{self.source}: all requests arrive at once: expected a trace that spans some time")
        factor = self.rate_rps / rate_rps
        return replace(self, arrived_at_s=self.arrived_at_s * factor, span_s=self.span_s * factor)

    def limited_to(self, max_total_tokens: int) -> tuple[Self, int]:
        """Return the requests whose prompt and output fit a context, and how many were dropped."""
        fits = self.prompt_tokens + self.output_tokens <= max_total_tokens
        if not fits.any():
            raise ValueError(f"{self.source}: no request fits {max_total_tokens} tokens")
        return self.select(fits), int((~fits).sum())

    def with_arrivals(self, arrived_at_s: FloatArray, *, span_s: float | None = None) -> Self:
        """Return the same lengths under other arrival times."""
        columns = {name: getattr(self, name) for name in (*COUNTS, *LABELS)}
        return self.build(arrived_at_s=arrived_at_s, span_s=span_s, source=self.source, origin=self.origin, **columns)


def read_trace(
    spec: str | Path,
    options: ReadOptions | None = None,
    *,
    num_requests: int | None = None,
    from_first: bool = True,
    spread: bool = True,
) -> Trace:
    """Read `FILE` or `FILE@start:duration`, seconds from the first request. `ValueError` names file and line or column.

    `num_requests`: only the first so many that are kept, over the time until the next one. `from_first` false: times
    stay on the file's clock, whose 0 a window then counts from. `spread` false: arrivals stay on the coarse ticks that
    some formats have.
    """
    path, window = _split_spec(str(spec))
    loaded = load(path, options or ReadOptions(), window if from_first else None, num_requests)
    times = loaded.columns["arrived_at_s"] - (loaded.first_s if from_first else 0.0)
    if loaded.format.on_ticks and spread:
        times = spread_ties(times)
    inside = np.ones(len(times), np.bool_) if window is None else _inside(str(spec), times, window)
    kept = np.flatnonzero(inside & (loaded.reasons == ""))
    if num_requests is None or len(kept) <= num_requests:
        return _trace_of(loaded, times, inside, str(spec), window)
    inside[kept[num_requests] :] = False
    start_s = window[0] if window else 0.0
    trace = _trace_of(loaded, times, inside, str(spec), window)
    return replace(trace, span_s=float(times[kept[num_requests]]) - start_s)


def first_of(trace: Trace, max_requests: int | None) -> Trace:
    """Return the first rows of a trace, spread over the time until the row after them."""
    if max_requests is None or len(trace) <= max_requests:
        return trace
    span_s = float(trace.arrived_at_s[max_requests])
    return replace(trace.select(slice(max_requests)), span_s=span_s)


def _trace_of(
    loaded: Loaded, times: FloatArray, inside: BoolArray, source: str, window: tuple[float, float] | None
) -> Trace:
    """Return what is kept of some rows; the span is that of all of them, so that the rate of what is kept is true."""
    rows = Trace.build(
        **{name: column[inside] for name, column in loaded.columns.items() if name != "arrived_at_s"},
        arrived_at_s=times[inside] - (window[0] if window else 0.0),
        span_s=window[1] if window else None,
        source=source,
        origin=loaded.origin(inside),
    )
    kept = loaded.reasons[inside] == ""
    if not kept.any():
        why = ", ".join(f"{count} {reason}" for reason, count in rows.origin.left_out.items())
        raise ValueError(f"{source}: no request is left to serve: {why}")
    return rows if kept.all() else rows.select(kept)


def _inside(where: str, times: FloatArray, window: tuple[float, float]) -> BoolArray:
    """Tell which times are in a window; `ValueError` for one that is none or holds none."""
    start_s, duration_s = window
    if not (math.isfinite(start_s) and start_s >= 0 and math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"{where}: expected a start >= 0 and a duration > 0, in seconds")
    inside: BoolArray = (times >= start_s) & (times < start_s + duration_s)
    if not inside.any():
        after = times[times >= start_s]
        near = f"the next one comes at {after[0]:.10g} s" if len(after) else f"the last one comes at {times[-1]:.10g} s"
        raise ValueError(f"{where}: no request arrives in this window, which counts from the first: {near}")
    return inside


def spread_ties(arrived_at_s: FloatArray) -> FloatArray:
    """Return arrivals that share a coarse tick spread evenly until the next one."""
    ticks, first, counts = np.unique(arrived_at_s, return_index=True, return_counts=True)
    gaps = np.diff(ticks)
    gaps = np.append(gaps, np.median(gaps) if len(gaps) else 0.0)
    rank = np.arange(len(arrived_at_s)) - np.repeat(first, counts)
    return np.asarray(arrived_at_s + rank * np.repeat(gaps / counts, counts), np.float64)


def read_lengths(path: str | Path) -> Trace:
    """Read a CSV of lengths without arrival times; all arrive at 0 until `with_arrivals`."""
    return read_trace(path)


def synthetic_arrivals(process: str, rate_rps: float, num_requests: int, rng: np.random.Generator) -> FloatArray:
    """Return sorted arrival times from 0 on, in seconds, at a mean rate of `rate_rps`.

    `process` is `poisson`; `gamma:CV`, gaps with that coefficient of variation; or
    `bursts:FACTOR:PERIOD:SHARE`, Poisson at FACTOR times the base rate for the first SHARE of every
    PERIOD seconds. `ValueError` for anything else.
    """
    if not (math.isfinite(rate_rps) and rate_rps > 0) or num_requests < 1:
        raise ValueError(f"{num_requests} arrivals at {rate_rps!r} per second: expected both to be positive")
    name, *rest = process.split(":")
    try:
        values = [float(part) for part in rest]
    except ValueError:
        values = [math.nan]
    usable = all(math.isfinite(value) and value > 0 for value in values)
    if name == "poisson" and not values:
        return np.cumsum(rng.exponential(1 / rate_rps, num_requests))
    if name == "gamma" and usable and len(values) == 1:
        shape = 1 / values[0] ** 2
        return np.cumsum(rng.gamma(shape, 1 / (rate_rps * shape), num_requests))
    if name == "bursts" and usable and len(values) == 3 and values[2] < 1:
        factor, period_s, share = values
        base = rate_rps / (factor * share + 1 - share)
        units = np.cumsum(rng.exponential(1.0, num_requests))  # arrivals of a unit-rate process
        periods, rest_units = np.divmod(units, rate_rps * period_s)
        in_burst = base * factor * share * period_s
        inside = np.where(
            rest_units < in_burst, rest_units / (base * factor), share * period_s + (rest_units - in_burst) / base
        )
        return np.asarray(periods * period_s + inside, np.float64)
    raise ValueError(f"arrivals {process!r}: expected poisson, gamma:CV or bursts:FACTOR:PERIOD_S:SHARE")


def small_trace() -> Trace:
    """Make the trace that ships with the package: 600 requests of three classes in bursts, seed 2025."""
    rng = np.random.default_rng(2025)
    classes = rng.choice(["chat", "coding", "summarization"], 600, p=[0.5, 0.3, 0.2])
    #                       median prompt, sigma, median output, sigma
    shapes = {"chat": (300, 0.8, 120, 0.7), "coding": (900, 0.6, 40, 0.8), "summarization": (1400, 0.4, 90, 0.4)}
    table = np.array([shapes[name] for name in classes])
    prompt, output = (np.exp(rng.normal(np.log(table[:, i]), table[:, i + 1])).astype(np.int64) for i in (0, 2))
    return Trace.build(
        arrived_at_s=np.round(synthetic_arrivals("gamma:2.5", 2.0, 600, rng), 3),
        prompt_tokens=np.clip(prompt, 8, 3000),
        output_tokens=np.clip(output, 2, 800),
        slo_class=classes,
        source="mixed_small",
    )


def write_trace(trace: Trace, path: Path) -> None:
    """Write our columns as CSV, gzipped where the name says so; same trace, same bytes."""
    optional = [name for name in (*COUNTS[2:], *LABELS) if _is_used(trace, name)]
    names = ["arrived_at_s", *COUNTS[:2], *optional]
    rows = zip(*(getattr(trace, name).tolist() for name in names), strict=True)
    text = "\n".join([",".join(names), *(",".join(map(str, row)) for row in rows), ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def _is_used(trace: Trace, name: str) -> bool:
    values = getattr(trace, name)
    return bool((values != ("" if name in LABELS else 0)).any())


def _split_spec(spec: str) -> tuple[Path, tuple[float, float] | None]:
    head, at, tail = spec.rpartition("@")
    if not at or Path(spec).exists():
        return Path(spec), None
    start, colon, duration = tail.partition(":")
    try:
        window = float(start), float(duration)
    except ValueError:
        window = None
    if not colon or window is None:
        raise ValueError(f"trace {spec!r}: window {tail!r}: expected FILE@start:duration in seconds")
    return Path(head), window
