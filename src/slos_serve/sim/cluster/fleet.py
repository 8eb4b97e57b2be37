"""Which replicas there are, and what happens to them: they start, die, drain, slow down and come back.

The front door uses the *open* replicas. A dead one stays open until that is noticed, `detect_s` later; what
was sent there meanwhile is stranded, and comes back to the door with what had been waiting there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slos_serve.sim.replica.kernel import Priority

if TYPE_CHECKING:
    from slos_serve.sim.cluster.faults import Fault
    from slos_serve.sim.replica.kernel import Kernel
    from slos_serve.sim.replica.replica import Replica
    from slos_serve.sim.replica.requests import Record, SimRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What the front door does about the fleet.

    `make` builds a replica by name and number. `closed`: a replica takes nothing new. `failed`: a stream
    was cut. `again`: a request must be routed anew. `reopened`: there is a replica again.
    """

    make: Callable[[str, int], Replica]
    closed: Callable[[str], None]
    failed: Callable[[Record], None]
    again: Callable[[SimRequest], None]
    reopened: Callable[[], None]


class ReplicaSet:
    """The replicas of a run; read `replicas` (every one there has been), `live` and `is_returning`."""

    def __init__(
        self, kernel: Kernel, names: list[str], door: Door, *, faults: tuple[Fault, ...], detect_s: float
    ) -> None:
        self.kernel = kernel
        self.names = names
        self.replicas: list[Replica] = []
        self.live: dict[str, Replica] = {}
        self._door = door
        self._open: set[str] = set()
        self._detect_s = detect_s
        self._stranded: Mapping[str, list[tuple[SimRequest, Record | None]]] = {name: [] for name in names}
        self._returns = 0
        late = {names[fault.replica] for fault in faults if fault.kind == "late"}
        for name in names:
            if name not in late:
                self._start(name)
        for fault in faults:
            self._schedule(fault, names[fault.replica])

    @property
    def is_returning(self) -> bool:
        """Tell whether a replica is to come (back)."""
        return self._returns > 0

    def is_open(self, name: str) -> bool:
        """Tell whether the front door uses a replica."""
        return name in self._open

    def submit(self, name: str, sim: SimRequest, record: Record | None) -> None:
        """Hand a request to a replica, or strand it where that is dead."""
        replica = self.live.get(name)
        if replica is None:
            self._stranded[name].append((sim, record))
        else:
            replica.submit(sim, record)

    def _start(self, name: str) -> None:
        replica = self._door.make(name, len(self.replicas))
        self.replicas.append(replica)
        self.live[name] = replica
        self._open.add(name)

    def _close(self, name: str) -> None:
        self._open.discard(name)
        self._door.closed(name)

    def _schedule(self, fault: Fault, name: str) -> None:
        def at(time_s: float, action: Callable[[], None]) -> None:
            if math.isfinite(time_s):
                self.kernel.schedule(time_s, Priority.STEP_END, action)

        def back_at(time_s: float, action: Callable[[str], None]) -> None:
            self._returns += math.isfinite(time_s)
            at(time_s, lambda: self._come_back(action, name))

        if fault.kind == "slow":
            at(fault.at_s, lambda: self._change_speed(name, fault.factor))
            at(fault.end_s, lambda: self._change_speed(name, 1 / fault.factor))
        elif fault.kind == "late":
            back_at(fault.at_s, self._start)
        elif fault.kind == "drain":
            at(fault.at_s, lambda: self._close(name))
            back_at(fault.end_s, self._open.add)
        else:
            at(fault.at_s, lambda: self._crash(name))
            back_at(fault.end_s, self._start)

    def _change_speed(self, name: str, factor: float) -> None:
        if name in self.live:
            self.live[name].change_speed(factor)

    def _come_back(self, action: Callable[[str], None], name: str) -> None:
        if name not in self.live:
            self._close(name)
        if action != self._start or name not in self.live:
            action(name)
        self._notice(name)
        self._returns -= 1
        self._door.reopened()

    def _crash(self, name: str) -> None:
        replica = self.live.pop(name, None)
        if replica is None:
            return
        for record in replica.crash():
            if record.grader.num_output_tokens:
                self._door.failed(record)
            else:
                self._stranded[name].append((record.sim, None))
        self.kernel.schedule(self.kernel.now_s + self._detect_s, Priority.STEP_END, lambda: self._notice(name))

    def _notice(self, name: str) -> None:
        """Find out that a replica is dead, and send what it had back to the door."""
        if name not in self.live:
            self._close(name)
        stranded = self._stranded[name][:]
        self._stranded[name].clear()
        for sim, record in stranded:
            if record is None:
                self._door.again(sim)
            else:  # its KV went to a replica that is dead
                self._door.failed(record)
        if not self._open and not self.is_returning:
            self._door.reopened()  # nobody will: those who wait are told
