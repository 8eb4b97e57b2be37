"""What goes wrong with replicas in a run, as scheduled events.

kill:0@30:20       replica 0 dies at 30 s and is back, empty, 20 s later (without the last part: never)
slow:1@30:60       replica 1 takes twice as long for 60 s; slow:1@30:60:1.5 one and a half times
late:2@15          replica 2 joins at 15 s
drain:3@40:30      replica 3 takes nothing new from 40 s on, for 30 s
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slos_serve.errors import ConfigError

KINDS = ("kill", "slow", "late", "drain")
FORM = "kill|slow|late|drain:REPLICA@START[:DURATION[:FACTOR]], times in seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One event. `duration_s` is `inf` where it never ends; `factor` is that of `slow`."""

    kind: str
    replica: int
    at_s: float
    duration_s: float = math.inf
    factor: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.replica < 0:
            raise ValueError(f"fault {self.kind!r} of replica {self.replica}: expected one of {KINDS}, and 0 or more")
        if not (math.isfinite(self.at_s) and self.at_s >= 0 and self.duration_s > 0):
            raise ValueError(f"fault at {self.at_s!r} s for {self.duration_s!r} s: expected times of 0 or more")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ValueError(f"fault factor = {self.factor!r}: expected a positive number")

    @property
    def end_s(self) -> float:
        """When it is over."""
        return self.at_s + self.duration_s


def parse_fault(text: str) -> Fault:
    """Read the form that the command line takes. `ConfigError` for anything else."""
    try:
        kind, rest = text.split(":", 1)
        replica, times = rest.split("@")
        at_s, *more = (float(part) for part in times.split(":"))
        names = ("duration_s", "factor")[: len(more)]
        return Fault(kind=kind, replica=int(replica), at_s=at_s, **dict(zip(names, more, strict=True)))
    except ValueError as error:
        expected = f"{FORM}; REPLICA and START 0 or more, the others positive"
        raise ConfigError(where="arguments", key="fault", value=text, expected=expected) from error
