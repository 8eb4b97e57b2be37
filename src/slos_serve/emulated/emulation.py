"""Which device is emulated and how it misbehaves, as one line of text: `NAME|FILE[,SWITCH=VALUE,...]`.

The text travels to vLLM's processes in one environment variable, `SLOS_SERVE_EMULATE`. Where it is not set nothing
of this package is active. What such an engine cannot show is said in `LEAVES_OUT`, wherever the device is named.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from slos_serve.emulated import asked_for
from slos_serve.errors import ConfigError, unknown_name
from slos_serve.sim.hardware import Hardware, load_hardware

PREFIX = "emulated "  # of the name of the hardware in profiles, verifications and reports
LEAVES_OUT = (
    "no model runs: tokens are made up, a step lasts as long as the file says, and there are no kernels, captured "
    "graphs, collectives or memory traffic; nothing measured here is a claim about a GPU"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """How the device departs from its file.

    `slower` multiplies every step; `noise` is the standard deviation of the logarithm of a step's time; `slow` is
    (every, for, times): every so many seconds, for so many, steps take so many times as long; `stall` is (every, for):
    every so many seconds one step takes that much longer. `acceptance`: the chance that one drafted token is accepted.
    `output_tokens`: the mean length after which requests end by themselves, 0 for never. `log`: a file that takes one
    JSON line for each batch.
    """

    slower: float = 1.0
    noise: float = 0.0
    slow: tuple[float, ...] = ()
    stall: tuple[float, ...] = ()
    acceptance: float = 0.7
    output_tokens: float = 256.0
    seed: int = 0
    log: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """One emulated device: its hardware and its switches; `text` is what `parse` reads again."""

    hardware: Hardware
    switches: Switches
    text: str

    @property
    def name(self) -> str:
        """Return what pages, logs and reports call the device."""
        return PREFIX + self.text

    def key(self) -> str:
        """Return a name that differs wherever steps may take another time: it holds a digest of the file."""
        document = json.dumps(self.hardware.to_json(), sort_keys=True)
        return f"{self.name} #{hashlib.sha256(document.encode()).hexdigest()[:12]}"

    def describe(self) -> dict[str, Any]:
        """Return what statuses and reports say about the device, as plain JSON."""
        provenance = self.hardware.provenance.get("perf_model", {})
        return {
            "emulated": self.text,
            "hardware": self.hardware.name,
            "description": self.hardware.description,
            "step_times": dict(provenance),
            "leaves_out": LEAVES_OUT,
        }


def parse(text: str) -> Emulation:
    """Read `NAME|FILE[,SWITCH=VALUE,...]`; `ConfigError` names the part that does not fit."""
    place, *parts = text.split(",")
    hardware = load_hardware(place)
    given = dict(_switch(part) for part in parts if part)
    switches = Switches(**given)
    if Path(place).is_file() and hardware.name != place:
        place = str(Path(place).resolve())
    return Emulation(hardware=hardware, switches=switches, text=",".join([place, *(part for part in parts if part)]))


def notice(key: object) -> str:
    """Return what a report says of an engine whose key (see `serving.profiles`) is an emulated device's; else ""."""
    hardware = key.get("hardware") if isinstance(key, Mapping) else None
    return f"The device is EMULATED: {LEAVES_OUT}." if str(hardware).startswith(PREFIX) else ""


def notice_of(device: object) -> str:
    """Return what a report says of a server that describes its device like that (see `Emulation.describe`); else ""."""
    name = device.get("emulated") if isinstance(device, Mapping) else None
    return f"The device is EMULATED ({name}): {LEAVES_OUT}." if name else ""


def serve_flags(text: str | None) -> list[str]:
    """Return the flags of `slos-serve serve` for a device, none for None; `ConfigError` as `parse`."""
    return [] if text is None else ["--emulate", parse(text).text]


def current() -> Emulation | None:
    """Return the device that the environment asks for; None, and nothing is emulated, where it asks for none."""
    text = asked_for()
    return parse(text) if text else None


def _switch(part: str) -> tuple[str, Any]:
    key, equals, value = part.partition("=")
    names = [f.name for f in fields(Switches)]
    if key not in names or not equals:
        raise unknown_name(where="emulate", key="switch", value=part, names=names, expected="SWITCH=VALUE with ")
    if key == "log":
        return key, str(Path(value).resolve())
    if key == "seed":
        return key, int(_numbers(key, value, 1)[0])
    if key in ("slow", "stall"):
        return key, _numbers(key, value, 3 if key == "slow" else 2)
    number = _numbers(key, value, 1)[0]
    most = {"acceptance": 1.0, "noise": 2.0}.get(key, math.inf)
    if number > most or (key == "slower" and number == 0):
        expected = f"a number of at most {most:g}" if number > most else "a number above 0"
        raise ConfigError(where="emulate", key=key, value=value, expected=expected)
    return key, number


def _numbers(key: str, value: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in value.split(":"))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(math.isfinite(number) and number >= 0 for number in numbers):
        form = "EVERY:FOR:TIMES" if count == 3 else "EVERY:FOR" if count == 2 else "a number, 0 or more"
        raise ConfigError(where="emulate", key=key, value=value, expected=form)
    if count > 1 and numbers[0] == 0:
        raise ConfigError(where="emulate", key=key, value=value, expected="EVERY above 0 seconds")
    return numbers
