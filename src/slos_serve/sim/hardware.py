"""What a simulated engine is made of: step times, KV room, limits, and where each figure comes from.

A hardware file is JSON, schema `slos-serve-hardware/1`, shipped beside this module or written by a user:

    {"schema": "slos-serve-hardware/1", "name": "...", "description": "...", "num_gpus": 1,
     "perf_model": {"lines": [{"per_token_s": ..., "fixed_s": ...}, ...]},
     "kv_tokens": 118000, "max_model_len": 4096, "max_num_batched_tokens": 8192, "max_num_seqs": 256,
     "block_size": 16, "provenance": {"perf_model": {"kind": "measured", "source": "..."}, ...}}

`kind` is `published` (a paper's own constants), `measured` (fitted to measured steps) or `derived`.
`"async_scheduling": false` says that the engine plans a step when the one before has ended, as on CPUs; a file that
does not say stands for a GPU, where vLLM plans one step ahead.

The file that `slos-serve profile` writes is hardware too. What it does not hold is filled in and labelled
`derived`: KV room for every seat at full length (memory never binds; `kv_tokens` in the file says better),
and, where no drafter ran, the cost of a drafter step as a share of a decode step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from slos_serve.core.perf import PER_DRAFT, PerfModel
from slos_serve.core.types import Limits
from slos_serve.errors import ConfigError, unknown_name
from slos_serve.records.profile import SCHEMA as PROFILE_SCHEMA
from slos_serve.records.profile import Profile

SCHEMA = "slos-serve-hardware/1"
DRAFTER_SHARE = 0.125  # of a decode step: OPT-125M beside OPT-6.7B in the SLOs-Serve paper's constants
PROFILE_DEFAULTS = {"max-model-len": 4096, "max-num-seqs": 256}
CPU_SUFFIX = " cores"  # of the hardware in the profile of an engine that runs on a CPU
NO_ASYNC = "no-async-scheduling"  # the flag among those of a profile
KINDS = ("published", "measured", "derived")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One replica's engine; token counts, and `num_gpus` behind one replica.

    `async_scheduling`: a step is planned while the one before it runs.
    """

    name: str
    perf_model: PerfModel
    kv_tokens: int
    max_model_len: int
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    block_size: int = 16
    num_gpus: int = 1
    async_scheduling: bool = False
    description: str = ""
    provenance: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def limits(self, *, max_model_len: int | None = None, max_draft_length: int = 0) -> Limits:
        """Return the engine limits; the longest sequence never exceeds the KV room."""
        longest = min(self.max_model_len, max_model_len or self.max_model_len, self.kv_tokens)
        return Limits(
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_model_len=longest,
            block_size=self.block_size,
            num_kv_blocks=self.kv_tokens // self.block_size,
            max_draft_length=max_draft_length,
        )

    def check_seats(self, seats: int, block_size: int) -> None:
        """Raise `ConfigError` where not even one KV block for each seat fits in the memory."""
        blocks = self.kv_tokens // block_size
        if seats > blocks:
            expected = f"at most {blocks}: room for {self.kv_tokens} tokens, in blocks of {block_size}"
            raise ConfigError(where=self.name, key="--max-num-seqs", value=seats, expected=expected)

    def with_kv_tokens(self, kv_tokens: int) -> Hardware:
        """Return a copy with another KV room, in tokens."""
        return replace(self, kv_tokens=kv_tokens)

    def slower(self, factor: float) -> Hardware:
        """Return a copy whose steps take `factor` times as long."""
        return replace(self, perf_model=self.perf_model.times(factor))

    def reference_s(self, prompt_tokens: int) -> float:
        """Return the unloaded, uncached prefill time that SLOs are defined by, in seconds."""
        return self.perf_model.prefill_seconds(prompt_tokens, self.max_num_batched_tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `parse_hardware` reads."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "description": self.description,
            "num_gpus": self.num_gpus,
            "async_scheduling": self.async_scheduling,
            "perf_model": self.perf_model.to_json(),
            "kv_tokens": self.kv_tokens,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_num_seqs": self.max_num_seqs,
            "block_size": self.block_size,
            "provenance": {key: dict(value) for key, value in self.provenance.items()},
        }


def hardware_names() -> list[str]:
    """Return the names of the shipped hardware files, sorted."""
    folder = files("slos_serve.sim") / "hardware"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_hardware(name_or_file: str) -> Hardware:
    """Return shipped hardware by name, or read a JSON file. `ConfigError` says what is wrong."""
    names = hardware_names()
    if name_or_file in names:
        text = (files("slos_serve.sim") / "hardware" / f"{name_or_file}.json").read_text(encoding="utf-8")
        return parse_hardware(json.loads(text), where=name_or_file)
    path = Path(name_or_file)
    if not path.is_file():
        if path.suffix == ".json" and not path.exists():
            expected = "a JSON file that exists (this one does not)"
            raise ConfigError(where="hardware", key="file", value=name_or_file, expected=expected)
        raise unknown_name(where="hardware", key="name", value=name_or_file, names=names, expected="a JSON file or ")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(where=name_or_file, key="file", value=str(error), expected="readable JSON") from error
    if isinstance(document, Mapping) and document.get("schema") == PROFILE_SCHEMA:
        document = hardware_of_profile(document, name=path.stem, where=name_or_file)
    return parse_hardware(document, where=name_or_file)


def hardware_of_profile(document: Mapping[str, Any], *, name: str, where: str) -> dict[str, Any]:
    """Return a profile as a hardware document. `ConfigError` names the key that does not fit."""
    profile = Profile.from_json(document, where=where)
    key = document.get("key")
    key = key if isinstance(key, Mapping) else {}
    texts = [flag.partition("=") for flag in key.get("flags", ()) if isinstance(flag, str)]
    flags = {flag: int(value) for flag, _, value in texts if value.isdecimal()}
    is_sync = str(key.get("hardware")).endswith(CPU_SUFFIX) or any(flag == NO_ASYNC for flag, *_ in texts)
    longest, seats = (document.get(flag.replace("-", "_"), flags.get(flag, n)) for flag, n in PROFILE_DEFAULTS.items())
    measured = f"fit to {document.get('num_steps')} steps of {key.get('model')} on {key.get('hardware')}"
    provenance = {
        "perf_model": {"kind": "measured", "source": f"{measured}, R2 {document.get('r2')}"},
        "kv_tokens": {"kind": "measured", "source": "the profile"},
        "drafter": {"kind": "measured", "source": "the profile"},
    }
    kv_tokens = document.get("kv_tokens")
    if kv_tokens is None and isinstance(longest, int) and isinstance(seats, int):
        kv_tokens = longest * seats
        provenance["kv_tokens"] = {"kind": "derived", "source": "room for every seat at full length: not measured"}
    model = profile.perf_model
    lines = model.lines
    if not any(line[PER_DRAFT] for line in lines):
        step_s = DRAFTER_SHARE * model.seconds(1, 1)
        lines = tuple((*line[:PER_DRAFT], step_s, *line[PER_DRAFT + 1 :]) for line in lines)
        source = f"no drafter was measured: {DRAFTER_SHARE:g} of a decode step, as OPT-125M beside OPT-6.7B"
        provenance["drafter"] = {"kind": "derived", "source": source}
    return {
        "schema": SCHEMA,
        "name": name,
        "description": f"{key.get('model')} on {key.get('hardware')}, as profiled",
        "perf_model": PerfModel(lines=lines).to_json(),
        "kv_tokens": kv_tokens,
        "max_model_len": longest,
        "max_num_seqs": seats,
        "max_num_batched_tokens": profile.max_num_batched_tokens,
        "async_scheduling": not is_sync,
        "provenance": provenance,
    }


def parse_hardware(document: object, *, where: str) -> Hardware:
    """Build hardware from a JSON document. `ConfigError` names the key that does not fit."""
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        value = document.get("schema") if isinstance(document, Mapping) else document
        raise ConfigError(where=where, key="schema", value=value, expected=repr(SCHEMA))
    values = {key: value for key, value in document.items() if key != "schema"}
    unknown = sorted(set(values) - set(Hardware.__slots__))
    if unknown:
        expected = f"keys among {', '.join(Hardware.__slots__)}"
        raise ConfigError(where=where, key=unknown[0], value=values[unknown[0]], expected=expected)
    for key in ("name", "perf_model", "kv_tokens", "max_model_len"):
        if key not in values:
            raise ConfigError(where=where, key=key, value=None, expected="a value")
    for key in ("kv_tokens", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "block_size", "num_gpus"):
        value = values.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(where=where, key=key, value=value, expected="a whole number of at least 1")
    if not isinstance(values.setdefault("async_scheduling", True), bool):
        raise ConfigError(
            where=where, key="async_scheduling", value=values["async_scheduling"], expected="true or false"
        )
    if values["kv_tokens"] < values.get("block_size", 16):
        raise ConfigError(where=where, key="kv_tokens", value=values["kv_tokens"], expected="room for one KV block")
    for key, source in values.get("provenance", {}).items():
        if not isinstance(source, Mapping) or source.get("kind") not in KINDS:
            raise ConfigError(
                where=where, key=f"provenance.{key}.kind", value=source, expected=f"one of {', '.join(KINDS)}"
            )
    try:
        values["perf_model"] = PerfModel.from_json(values["perf_model"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(where=where, key="perf_model", value=str(error), expected="lines of named terms") from error
    return Hardware(**values)
