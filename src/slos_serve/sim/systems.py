"""Systems under test: a planner, the settings that are swept for it, and how its replicas are laid out.

`System.serve` is the one way to run a system on a workload: what kind of run its planner needs, it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from slos_serve import named
from slos_serve.core import baselines
from slos_serve.core.types import PlannerTraits
from slos_serve.errors import ConfigError, unknown_name
from slos_serve.sim.cluster.cluster import DEFAULT_ROUTER, ClusterOptions
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.run import RunResult, run_workload

if TYPE_CHECKING:
    from slos_serve.core.types import Planner
    from slos_serve.sim.hardware import Hardware
    from slos_serve.sim.workloads.workload import Workload

BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
MAX_DRAFT_LENGTH = 6

# Between two GPUs of a server: half of the 600 GB/s that an A100's NVLink gives in both directions (NVIDIA data sheet).
KV_BYTES_PER_S = 300e9
# fp16 keys and values of a 7B multi-head model: 2 x 32 layers x 4,096 x 2 bytes; others may say `kv_bytes_per_token`.
KV_BYTES_PER_TOKEN = 524_288

Settings = Mapping[str, Any]


def _alike(settings: Settings) -> ClusterOptions:
    """One replica, which does everything."""
    del settings
    return ClusterOptions()


def _disaggregated(settings: Settings) -> ClusterOptions:
    """`prefill` replicas that compute prompts and `decode` replicas that take over."""
    prefill, decode = settings["prefill"], settings["decode"]
    if not (isinstance(prefill, int) and isinstance(decode, int) and prefill >= 1 and decode >= 1):
        raise ValueError(f"prefill = {prefill!r}, decode = {decode!r}: expected at least one replica each")
    transfer_s = settings.get("kv_bytes_per_token", KV_BYTES_PER_TOKEN) / KV_BYTES_PER_S
    return ClusterOptions(
        num_replicas=prefill + decode,
        num_prefill=prefill,
        kv_transfer_s_per_token=transfer_s,
        router="least-load",
    )


def _siloed(settings: Settings) -> ClusterOptions:
    """So many replicas for each class."""
    silos = settings["silos"]
    return ClusterOptions(num_replicas=sum(silos.values()), silos=silos, router="least-load")


# Settings that say how replicas are laid out; the others are the planner's.
LAYOUT_KEYS: Mapping[Callable[[Settings], ClusterOptions], tuple[str, ...]] = {
    _disaggregated: ("prefill", "decode", "kv_bytes_per_token"),
    _siloed: ("silos",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One scheduler under test.

    `default` settings go to `build` unless others are given; `grid` lists what a sweep tries.
    `max_draft_length` is what the engine may verify per request (0: no speculation). `drops_declined`:
    what gets a "no" is turned away. `router` is set where no other makes sense. `layout` says what one
    unit of deployment is, from the settings named in `LAYOUT_KEYS`.
    """

    name: str
    build: Callable[..., Planner]
    default: Settings
    grid: Sequence[Settings]
    max_draft_length: int = 0
    drops_declined: bool = False
    router: str | None = None
    layout: Callable[[Settings], ClusterOptions] = _alike

    def deploy(
        self,
        settings: Settings,
        *,
        num_replicas: int = 1,
        router: str | None = None,
    ) -> tuple[Planner, ClusterOptions]:
        """Return the planner and the cluster of `num_replicas` units; a unit may be several replicas.

        Rates are per GPU: of `ClusterOptions.num_replicas` times the hardware's GPUs. `ConfigError` for a
        setting that the system does not have.
        """
        known = self.setting_names()
        for key in settings:
            if key not in known:
                expected = f"one of the settings {', '.join(known)}"
                raise ConfigError(where=self.name, key=key, value=settings[key], expected=expected)
        unit = self.layout(settings)
        name = self.router or router or (unit.router if num_replicas == 1 else self.default_router)
        cluster = replace(
            unit,
            num_replicas=unit.num_replicas * num_replicas,
            num_prefill=unit.num_prefill * num_replicas,
            silos={key: count * num_replicas for key, count in unit.silos.items()},
            router=name,
        )
        return self.build(**self._planner_settings(settings)), cluster

    def serve(
        self,
        workload: Workload,
        hardware: Hardware,
        *,
        settings: Settings | None = None,
        num_replicas: int = 1,
        router: str | None = None,
        engine: ReplicaOptions | None = None,
        cluster: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> RunResult:
        """Run the system on a workload, at its default settings where none are given.

        `engine`: how the simulated engine differs from an ideal one. `cluster`: changes of `ClusterOptions`, such as
        faults and hops. `how` goes to `run_workload`.
        """
        planner, options = self.deploy(
            self.default if settings is None else settings, num_replicas=num_replicas, router=router
        )
        return run_workload(
            workload,
            planner,
            hardware,
            options=replace(engine or ReplicaOptions(), drops_declined=self.drops_declined),
            cluster=replace(options, **(cluster or {})),
            max_draft_length=self.max_draft_length,
            **how,
        )

    @property
    def makes_promises(self) -> bool:
        """Whether the planner's verdicts are promises."""
        return PlannerTraits.of(self.build(**self._planner_settings(self.default))).makes_promises

    def _planner_settings(self, settings: Settings) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if key not in self._layout_keys}

    def setting_names(self) -> list[str]:
        """Return what `deploy` takes: the planner's settings, ours where it passes them on, and the layout's."""
        names = {*self.default, *self._layout_keys}
        for parameter in signature(self.build).parameters.values():
            if parameter.kind is not Parameter.VAR_KEYWORD:
                names.add(parameter.name)
            else:
                names.update(_our_settings())
        return sorted(names)

    @property
    def _layout_keys(self) -> tuple[str, ...]:
        return LAYOUT_KEYS.get(self.layout, ())

    @property
    def default_router(self) -> str:
        """How requests are routed where nothing is said: ours for ours, least load for the others."""
        return "slo" if self.makes_promises else "least-load"


def _budgets(budgets: Sequence[int] = BUDGETS, **more: Any) -> tuple[Settings, ...]:
    return tuple({"token_budget": budget, **more} for budget in budgets)


def _drafts(budgets: Sequence[int]) -> tuple[Settings, ...]:
    return tuple({"token_budget": budget, "draft_length": length} for budget in budgets for length in (1, 2, 4, 6))


def _our_settings() -> list[str]:
    from slos_serve.core.planner import SloPlanner  # noqa: PLC0415 - as slo_planner

    return list(signature(SloPlanner).parameters)


def slo_planner(**settings: Any) -> Planner:
    """Return our planner; it is compiled on import, which other systems need not wait for."""
    from slos_serve.core.planner import SloPlanner  # noqa: PLC0415

    return SloPlanner(**settings)


def _ablated(name: str) -> Callable[..., Planner]:
    def build(**settings: Any) -> Planner:
        from slos_serve.sim import ablations  # noqa: PLC0415 - as slo_planner

        planner: Planner = getattr(ablations, name)(**settings)
        return planner

    return build


def _slo(name: str, build: Callable[..., Planner] = slo_planner, max_draft_length: int = 0, **more: Any) -> System:
    values = {"default": {}, "grid": ({},), **more}
    return System(name=name, build=build, max_draft_length=max_draft_length, **values)


# What holds prompts back or requests out in today's vLLM: threshold, cadence and seats of 0.31 to 0.33, queue limits.
_VLLM_KNOBS: tuple[Settings, ...] = (
    *({"token_budget": budget, "chunk_limit": 256, "chunk_rule": "adaptive"} for budget in (2048, 8192)),
    *({"token_budget": budget, "prefill_interval": steps} for budget in (512, 2048) for steps in (2, 4)),
    *({"token_budget": 2048, "max_num_seqs": seats} for seats in (32, 64)),
    *({"token_budget": 2048, "max_num_queued_reqs": count} for count in (64, 128)),
    {"token_budget": 2048, "max_num_queued_tokens": 16384},
)
_RATIOS = ((1, 1), (2, 1), (1, 2))
_SILOS = (
    {"chat": 1, "coding": 1, "summarization": 1},
    {"chat": 2, "coding": 1, "summarization": 1},
    {"chat": 1, "coding": 2, "summarization": 1},
    {"chat": 1, "coding": 1, "summarization": 2},
    {"chat": 3, "coding": 2, "summarization": 1},
)
_SYSTEMS = (
    _slo("slos-serve", max_draft_length=MAX_DRAFT_LENGTH),
    _slo("slos-serve-ar"),
    # ablations: one idea taken out of slos-serve at a time
    _slo("slos-serve-no-spec"),
    _slo("slos-serve-no-deferral", _ablated("at_arrival"), MAX_DRAFT_LENGTH),
    _slo("slos-serve-drop", max_draft_length=MAX_DRAFT_LENGTH, drops_declined=True),
    _slo("slos-serve-no-tier", _ablated("no_lower_tier"), MAX_DRAFT_LENGTH),
    _slo(
        "slos-serve-fixed-batch",
        _ablated("fixed_batch"),
        MAX_DRAFT_LENGTH,
        default={"token_budget": 512},
        grid=_budgets(),
    ),
    _slo("slos-serve-no-routing", max_draft_length=MAX_DRAFT_LENGTH, router=DEFAULT_ROUTER),
    System(name="vllm", build=baselines.VllmPlanner, default={"token_budget": 2048}, grid=(*_budgets(), *_VLLM_KNOBS)),
    System(
        name="vllm-spec",
        build=baselines.VllmPlanner,
        default={"token_budget": 2048, "draft_length": 4},
        grid=_drafts((512, 1024, 2048)),
        max_draft_length=MAX_DRAFT_LENGTH,
    ),
    System(name="vllm-priority", build=baselines.PriorityPlanner, default={"token_budget": 2048}, grid=_budgets()),
    System(
        name="vllm-capped",
        build=baselines.VllmPlanner,
        default={"token_budget": 2048, "chunk_limit": 512, "max_num_seqs": 128},
        grid=tuple(
            {"token_budget": budget, "chunk_limit": limit, "max_num_seqs": seats}
            for budget in (512, 1024, 2048)
            for limit in (256, 512)
            for seats in (32, 64, 128)
            if limit < budget
        ),
    ),
    System(
        name="vllm-legacy",
        build=baselines.WholePromptPlanner,
        default={"token_budget": 2048},
        grid=_budgets((2048, 4096, 8192)),
    ),
    System(
        name="sarathi-serve",
        build=baselines.SarathiPlanner,
        default={},
        grid=({},),
    ),
    System(name="edf", build=baselines.EdfPlanner, default={"token_budget": 2048}, grid=_budgets()),
    System(
        name="distserve",
        build=baselines.VllmPlanner,
        default={"token_budget": 2048, "prefill": 1, "decode": 1},
        grid=tuple(
            {"token_budget": budget, "prefill": prefill, "decode": decode}
            for prefill, decode in _RATIOS
            for budget in (1024, 2048, 8192)
        ),
        layout=_disaggregated,
    ),
    System(
        name="siloed",
        build=baselines.VllmPlanner,
        default={"token_budget": 2048, "silos": _SILOS[0]},
        grid=tuple({"token_budget": budget, "silos": silos} for silos in _SILOS for budget in (512, 1024, 2048)),
        layout=_siloed,
    ),
)
SYSTEMS = {system.name: system for system in _SYSTEMS}


def find_system(name: str) -> System:
    """Return a system by name, or of a planner's class (`package.module:Class`); `ConfigError` lists the names."""
    if named.is_own(name):
        return system_of(named.find_class(name, where="arguments", key="system"), name=name)
    if name not in SYSTEMS:
        raise unknown_name(where="arguments", key="system", value=name, names=SYSTEMS)
    return SYSTEMS[name]


def system_of(
    build: Callable[..., Planner], *, name: str, like: object = None, max_draft_length: int | None = None
) -> System:
    """Return the system of a planner's class, with its own defaults as settings; `like`: what says its traits."""
    traits = PlannerTraits.of(build if like is None else like)
    longest = traits.max_draft_length if max_draft_length is None else max_draft_length
    return System(name=name, build=build, default={}, grid=({},), max_draft_length=longest)


def system_with(planner: Planner, *, max_draft_length: int | None = None) -> System:
    """Return the system of one planner that is there."""
    return system_of(lambda: planner, name=type(planner).__name__, like=planner, max_draft_length=max_draft_length)
