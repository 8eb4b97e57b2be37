"""Named systems: a planner, the settings that are swept for it, and whether it gives verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slos_serve.core import baselines
from slos_serve.errors import ConfigError

if TYPE_CHECKING:
    from slos_serve.core.types import Planner

BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
MAX_DRAFT_LENGTH = 6

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One scheduler under test.

    `default` settings go to `build` unless others are given; `grid` lists what a sweep tries.
    `max_draft_length` is what the engine may verify per request (0: no speculation).
    """

    name: str
    build: Callable[..., Planner]
    default: Settings
    grid: Sequence[Settings]
    makes_promises: bool = False
    max_draft_length: int = 0


def _budgets(budgets: Sequence[int] = BUDGETS, **more: Any) -> tuple[Settings, ...]:
    return tuple({"token_budget": budget, **more} for budget in budgets)


def _drafts(budgets: Sequence[int]) -> tuple[Settings, ...]:
    return tuple({"token_budget": budget, "draft_length": length} for budget in budgets for length in (1, 2, 4, 6))


def slo_planner(**settings: Any) -> Planner:
    """Return our planner; it is compiled on import, which other systems need not wait for."""
    from slos_serve.core.planner import SloPlanner  # noqa: PLC0415

    return SloPlanner(**settings)


def _slo(max_draft_length: int, name: str) -> System:
    return System(
        name=name,
        build=slo_planner,
        default={},
        grid=({},),
        makes_promises=True,
        max_draft_length=max_draft_length,
    )


_SYSTEMS = (
    _slo(MAX_DRAFT_LENGTH, "slos-serve"),
    _slo(0, "slos-serve-ar"),
    System(name="vllm", build=baselines.VllmPlanner, default={"token_budget": 2048}, grid=_budgets()),
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
)
SYSTEMS = {system.name: system for system in _SYSTEMS}


def find_system(name: str) -> System:
    """Return a system by name; `ConfigError` lists the names."""
    if name not in SYSTEMS:
        raise ConfigError(where="simulate", key="system", value=name, expected=f"one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]
