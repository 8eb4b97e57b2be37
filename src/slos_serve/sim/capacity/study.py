"""Which searches a capacity table is made of, and which runs each of them asks for."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slos_serve.sim.capacity.jobs import SearchJob
from slos_serve.sim.capacity.runs import CLAIRVOYANT, Cell, guess_rps
from slos_serve.sim.capacity.search import Answer, Point, SearchEffort, Settings, rate_at, search
from slos_serve.sim.capacity.table import hardware_entry
from slos_serve.sim.systems import find_system
from slos_serve.sim.workloads.scenarios import find_scenario, hardware_of
from slos_serve.traces.synthetic import data_name

QUICK = SearchEffort(num_windows=3, coarse_windows=1, tune_windows=1, steps=3, max_rates=4, higher_rates=1)
FULL = SearchEffort(coarse_windows=2, steps=3, max_rates=3, higher_rates=0)
BOUND = SearchEffort(num_windows=3, coarse_windows=1, steps=2, max_rates=2, higher_rates=0)
QUICK_SETTINGS = 3
QUICK_SHARE = 2  # a quick look runs one in so many of the requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where searches run: some replicas of some hardware behind a router. `name` is its key in the report."""

    name: str
    hardware: str
    replicas: int
    router: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to measure: one search for each system on each scenario at each site.

    `replicas`: the first number is the table's; the others are sites of their own, for scaling, and so is each
    of `routers` (None: the system's own) wherever there are several replicas. The
    clairvoyant bound is found on the first windows only: it costs a linear programme a run.
    `reuse`: systems whose runs by earlier code stand.
    """

    scenarios: tuple[str, ...]
    systems: tuple[str, ...]
    hardware: tuple[str, ...]
    data: str
    effort: SearchEffort
    is_quick: bool = False
    max_requests: int | None = None
    acceptance: float = 0.7
    async_lag: bool | None = None
    known_lengths: bool = False
    slo_scale: float = 1.0
    seed: int = 0
    replicas: tuple[int, ...] = (1,)
    routers: tuple[str | None, ...] = (None,)
    reuse: tuple[str, ...] = ()

    @property
    def sites(self) -> list[Site]:
        """Return every hardware with every number of replicas, and every router where it has something to do."""
        sites = []
        for count in self.replicas:
            for name in self.hardware:
                for router in self.routers if count > 1 else self.routers[:1]:
                    words = [name] if count == self.replicas[0] else [name, f"x{count}"]
                    words += [router] if router is not None and len(self.routers) > 1 and count > 1 else []
                    sites.append(Site(name=" ".join(words), hardware=name, replicas=count, router=router))
        return sites

    def cell(self, site: Site, scenario: str, system: str, **changes: Any) -> Cell:
        """Return a run of one search."""
        hardware = hardware_of(scenario, site.hardware)
        enough = find_scenario(scenario).num_requests(hardware)
        if self.is_quick:
            enough //= QUICK_SHARE
        values = {
            "scenario": scenario,
            "system": system,
            "hardware": hardware,
            "replicas": site.replicas,
            "router": site.router,
            "data": self.data,
            "part": "report",
            "window": 0,
            "rate_rps": 1.0,
            "acceptance": self.acceptance,
            "async_lag": self.async_lag,
            "known_lengths": self.known_lengths,
            "max_requests": self.max_requests or enough,
            "slo_scale": self.slo_scale,
            "seed": self.seed,
        }
        return Cell(**{**values, **changes})

    def check(self) -> None:
        """Build one workload of every scenario. Raises `ValueError` for a file that is missing, bad or too long."""
        for site in self.sites:
            for scenario in self.scenarios:
                guess_rps(self.cell(site, scenario, self.systems[0]))

    def grid(self, system: str) -> list[Settings]:
        """Return the settings to try, the default first."""
        if system == CLAIRVOYANT:
            return ["{}"]
        known = find_system(system)
        grid = [json.dumps(dict(settings)) for settings in known.grid]
        default = json.dumps(dict(known.default))
        grid.sort(key=lambda settings: settings != default)
        if self.is_quick and len(grid) > QUICK_SETTINGS:
            grid = [grid[0], *grid[1 :: (len(grid) - 1) // (QUICK_SETTINGS - 1)]][:QUICK_SETTINGS]
        return grid

    def facts(self) -> dict[str, Any]:
        """Return what a reader of the table must know of how it was made."""
        return {
            "data": data_name(self.data),
            "is_quick": self.is_quick,
            "num_windows": self.effort.num_windows,
            "max_requests": self.max_requests,
            "acceptance": self.acceptance,
            "async_lag": self.async_lag,
            "known_lengths": self.known_lengths,
            "slo_scale": self.slo_scale,
            "routers": list(self.routers),
            "seed": self.seed,
            "reuse": list(self.reuse),
        }

    def search_jobs(self) -> list[SearchJob]:
        """Return every search, those of one scenario side by side."""
        return [
            self.search_job(site, scenario, system)
            for site in self.sites
            for scenario in self.scenarios
            for system in self.systems
            if fits(system, scenario)
        ]

    def search_job(self, site: Site, scenario: str, system: str, grid: Sequence[Settings] | None = None) -> SearchJob:
        """Return one search, over some settings (default: all that are to be tried)."""
        base = self.cell(site, scenario, system)

        def cell_of(point: Point) -> Cell:
            return self.cell(
                site,
                scenario,
                system,
                part=point.part,
                settings=point.settings,
                rate_rps=rate_at(point.rate_index),
                window=point.window,
                may_stop=point.may_stop,
            )

        guess = functools.partial(guess_rps, base)
        name = lane_name(site, scenario, system)
        effort = BOUND if system == CLAIRVOYANT else self.effort
        return SearchJob(name=name, search=search(grid or self.grid(system), guess, effort), cell_of=cell_of)

    def document(self, search_jobs: Sequence[SearchJob]) -> dict[str, Any]:
        """Return what is known of every search that has ended."""
        answers = {search_job.name: search_job.answer for search_job in search_jobs if search_job.answer is not None}
        hardware = {}
        for site in self.sites:
            found: dict[str, dict[str, Answer]] = {}
            for scenario in self.scenarios:
                names = {system: lane_name(site, scenario, system) for system in self.systems}
                mine = {system: answers[key] for system, key in names.items() if key in answers}
                if mine:
                    found[scenario] = mine
            on = {scenario: hardware_of(scenario, site.hardware) for scenario in found}
            hardware[site.name] = {**hardware_entry(found, on), "replicas": site.replicas}
        document: dict[str, Any] = {"hardware": hardware, "study": self.facts()}
        errors = {search_job.name: search_job.error for search_job in search_jobs if search_job.error}
        return {**document, "errors": errors} if errors else document


def fits(system: str, scenario: str) -> bool:
    """Tell whether a system is made for a scenario.

    GPUs partitioned by class need several classes, the clairvoyant bound requests that wait for no others.
    """
    if system == CLAIRVOYANT:
        return not find_scenario(scenario).has_rounds
    silos = find_system(system).default.get("silos")
    return not silos or set(silos) == set(find_scenario(scenario).classes)


def lane_name(site: Site, scenario: str, system: str) -> str:
    """Return the name of one search."""
    words = [Path(site.hardware).stem]
    words += [f"x{site.replicas}"] if site.replicas > 1 else []
    words += [site.router] if site.router is not None else []
    return f"{' '.join(words)}/{scenario}/{system}"
