"""SLOs-Serve: multi-SLO serving for large language models, on vLLM.

What a library user needs is here, imported when it is first used:

    import slos_serve

    run = slos_serve.simulate("slos-serve", "trace.csv", rate_rps=3.0)
    print(run.entry()["attainment"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slos_serve.config import SloClass, SloConfig, load_slo_config
    from slos_serve.core.perf import PerfModel
    from slos_serve.core.planner import SloPlanner
    from slos_serve.core.routing.router_base import Arrival, Choice, Route, Router
    from slos_serve.core.routing.routers import LeastLoad, SloRouter
    from slos_serve.core.routing.snapshots import ReplicaSnapshot
    from slos_serve.core.types import (
        BatchPlan,
        Limits,
        Plan,
        Planner,
        PlannerTraits,
        ReplicaState,
        Request,
        RequestTable,
        Slo,
        Status,
        Tier,
        Verdict,
    )
    from slos_serve.errors import ConfigError
    from slos_serve.library import Capacity, capacity, simulate
    from slos_serve.sim.hardware import Hardware, load_hardware
    from slos_serve.sim.run import RunResult
    from slos_serve.traces.trace import SMALL_TRACE, Trace, read_trace

__version__ = "0.1.0"

_HOMES = {
    "config": ("SloClass", "SloConfig", "load_slo_config"),
    "core.perf": ("PerfModel",),
    "core.planner": ("SloPlanner",),
    "core.routing.router_base": ("Arrival", "Choice", "Route", "Router"),
    "core.routing.routers": ("LeastLoad", "SloRouter"),
    "core.routing.snapshots": ("ReplicaSnapshot",),
    "core.types": (
        *("BatchPlan", "Limits", "Plan", "Planner", "PlannerTraits", "ReplicaState", "Request", "RequestTable"),
        *("Slo", "Status", "Tier", "Verdict"),
    ),
    "errors": ("ConfigError",),
    "library": ("Capacity", "capacity", "simulate"),
    "sim.hardware": ("Hardware", "load_hardware"),
    "sim.run": ("RunResult",),
    "traces.trace": ("SMALL_TRACE", "Trace", "read_trace"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "SMALL_TRACE",
    "Arrival",
    "BatchPlan",
    "Capacity",
    "Choice",
    "ConfigError",
    "Hardware",
    "LeastLoad",
    "Limits",
    "PerfModel",
    "Plan",
    "Planner",
    "PlannerTraits",
    "ReplicaSnapshot",
    "ReplicaState",
    "Request",
    "RequestTable",
    "Route",
    "Router",
    "RunResult",
    "Slo",
    "SloClass",
    "SloConfig",
    "SloPlanner",
    "SloRouter",
    "Status",
    "Tier",
    "Trace",
    "Verdict",
    "__version__",
    "capacity",
    "load_hardware",
    "load_slo_config",
    "read_trace",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for from where it lives."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'slos_serve' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    value = getattr(import_module(f"slos_serve.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
