"""What the operator asked of the plug-in: `additional_config["slo"]`, checked once at start-up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from slos_serve.config import SloConfig, load_slo_config
from slos_serve.core.types import Planner
from slos_serve.errors import ConfigError
from slos_serve.named import find_class
from slos_serve.vllm_plugin.safety.modes import MODES, Modes
from slos_serve.vllm_plugin.safety.rules import SafetyLimits

WHERE = 'additional_config["slo"]'
STATE_SUFFIX = ".learnt.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The plug-in's settings; `mode` is None where the operator left it to the platform.

    `class_modes` are the classes whose mode differs. `profile` and `record` are file paths; `state` is the file
    that keeps what was learnt across restarts: None for one beside the profile, False for none. `record_max_mb`: what
    records may take on disk, older ones beside the file included. The second of several
    data-parallel engines keeps what it learns and records in NAME-1, and so on. `record_names`: let records say tenants
    and sessions.
    `guard_s`: from the end of a step to the client seeing its token. `planner` is a dotted class name and
    `planner_options` its keyword arguments. `always_plan`: plan even while no request has an SLO (to compare planners).
    `report_s`: how often the attainment of each class is written to the log. `thinking_end` are the token ids (or one
    text, looked up in the tokenizer) that end a thinking span. `fault_dir` is where the states of planner faults are
    written (`None`: a private folder below the temporary one). `channel_dir`: the folder below which engine and API
    server meet (`None`: a private one of this user). `publish_replica`: let snapshots carry what a router plans with.
    `use_prefix_hits`: tell the planner how much of a waiting prompt the prefix cache holds. `edge`: our HTTP edge
    stands in front of this engine, so that only what it wrote into a request counts. `may_enforce`: the engine was
    verified, so that it may be switched to enforcing; one that was started so, or runs on a CPU, may anyway.
    """

    config: SloConfig = field(default_factory=SloConfig)
    mode: str | None = None
    class_modes: Mapping[str, str] = field(default_factory=dict)
    profile: Path | None = None
    profile_key: str = ""
    state: Path | Literal[False] | None = None
    record: Path | None = None
    record_max_mb: float = 4000.0
    record_names: bool = False
    guard_s: float = 0.01
    planner: str = "slos_serve.core.planner.SloPlanner"
    planner_options: Mapping[str, Any] = field(default_factory=dict)
    always_plan: bool = False
    report_s: float = 60.0
    thinking_end: str | tuple[int, ...] = "</think>"
    fault_dir: Path | None = None
    channel_dir: str | None = None
    publish_replica: bool = False
    use_prefix_hits: bool = True
    edge: bool = False
    may_enforce: bool = False
    safety: SafetyLimits = field(default_factory=SafetyLimits)

    @classmethod
    def parse(cls, document: Mapping[str, Any] | None) -> Settings:
        """Read the JSON document; `ConfigError` for an unknown key or a value that does not fit."""
        if document is not None and not isinstance(document, Mapping):
            raise ConfigError(where="additional_config", key="slo", value=document, expected="a mapping")
        given = dict(document or {})
        known = {f.name for f in fields(cls)} - {"guard_s"} | {"guard_ms"}
        for key, value in given.items():
            if key not in known:
                raise ConfigError(where=WHERE, key=key, value=value, expected=f"one of {', '.join(sorted(known))}")
        given = {key: value for key, value in given.items() if value is not None}
        config = load_slo_config(given.pop("config", None))
        mode = given.pop("mode", None)
        if mode is not None and mode not in MODES:
            raise ConfigError(where=WHERE, key="mode", value=mode, expected=f"one of {', '.join(MODES)}")
        class_modes = _class_modes(given.pop("class_modes", {}), config)
        state = given.pop("state", None)
        profile, record, fault_dir = (_path(given.pop(key, None)) for key in ("profile", "record", "fault_dir"))
        guard_s = _number(given.pop("guard_ms", 10.0), "guard_ms") / 1000
        record_max_mb = _number(given.pop("record_max_mb", 4000.0), "record_max_mb")
        report_s = _number(given.pop("report_s", 60.0), "report_s")
        thinking_end = _thinking_end(given.pop("thinking_end", "</think>"))
        safety = _safety(given.pop("safety", {}))
        return cls(
            config=config,
            mode=mode,
            class_modes=class_modes,
            state=False if state is False else _path(None if state is True else state),
            guard_s=guard_s,
            report_s=report_s,
            record_max_mb=record_max_mb,
            thinking_end=thinking_end,
            safety=safety,
            profile=profile,
            record=record,
            fault_dir=fault_dir,
            **given,
        )

    def resolved_modes(self, *, given: bool, is_cpu: bool) -> Modes:
        """Return the modes to run in: what was asked, else enforce on CPUs, observe elsewhere and bare."""
        mode = self.mode or ("enforce" if given and is_cpu else "observe")
        return Modes(engine=mode, by_class=self.class_modes)

    def state_path(self, engine_index: int) -> Path | None:
        """Return the file of what one engine has learnt; None keeps nothing."""
        if self.state is False or (self.state is None and self.profile is None):
            return None
        return _of_engine(self.state or self.profile.with_suffix(STATE_SUFFIX), engine_index)  # type: ignore[union-attr]

    def record_path(self, engine_index: int) -> Path | None:
        """Return the file of one engine's records; None writes none."""
        return None if self.record is None else _of_engine(self.record, engine_index)

    def make_planner(self) -> Planner:
        """Import and construct the planner; `ConfigError` where there is none of that name."""
        factory = find_class(self.planner, where=WHERE, key="planner")
        try:
            planner: Planner = factory(**self.planner_options)
        except (TypeError, ValueError) as error:
            options = dict(self.planner_options)
            raise ConfigError(where=WHERE, key="planner_options", value=options, expected=str(error)) from error
        return planner


def _path(value: object) -> Path | None:
    return Path(str(value)) if value else None


def _of_engine(path: Path, index: int) -> Path:
    """Return a file's name for one of several data-parallel engines; the first has the name itself."""
    return path.with_stem(f"{path.stem}-{index}") if index else path


def _class_modes(value: object, config: SloConfig) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ConfigError(where=WHERE, key="class_modes", value=value, expected="a mapping of classes to modes")
    for name, mode in value.items():
        config.check_promising(name, WHERE)
        if mode not in MODES:
            expected = f"one of {', '.join(MODES)}"
            raise ConfigError(where=WHERE, key=f"class_modes.{name}", value=mode, expected=expected)
    return dict(value)


def _thinking_end(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(token, int) for token in value):
        return tuple(value)
    raise ConfigError(where=WHERE, key="thinking_end", value=value, expected="a text or a list of token ids")


def _safety(value: Any) -> SafetyLimits:
    try:
        return SafetyLimits(**value)
    except TypeError as error:
        names = ", ".join(f.name for f in fields(SafetyLimits))
        raise ConfigError(where=WHERE, key="safety", value=value, expected=f"a mapping with {names}") from error


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ConfigError(where=WHERE, key=key, value=value, expected="a number, 0 or more")
    return float(value)
