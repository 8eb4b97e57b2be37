"""Why a request was not promised, from the very input that the plan had: kept for the last of them, planned again.

Keeping costs a copy of the table for each plan that says no to somebody for the first time, and takes a fiftieth of the
time at most: in a flood only some of the many that are declined can be explained. An explanation takes some dozens of
plans; they are made when somebody asks, on a thread of their own that rests between any two, so that the scheduler
never waits for more than one of them.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from slos_serve.core.explain import explain
from slos_serve.core.types import Plan, Planner, ReplicaState

MAX_KEPT = 256
MAX_ROWS = 20_000  # of all states that are kept, 6 MB
SHARE = 0.02  # of the scheduler's time
REST_S = 0.02


class Explainer:
    """Keep the inputs of plans that said no. `keep` belongs to the scheduler's thread, `answer` to any other."""

    def __init__(self, make_planner: Callable[[], Planner]) -> None:
        self._make_planner = make_planner
        self._kept: OrderedDict[str, ReplicaState] = OrderedDict()
        self._found: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._asked: str | None = None  # what the thread is at
        self._keeps_from_s = -math.inf

    def keep(self, state: ReplicaState, plan: Plan) -> None:
        """Keep a plan's input for requests that it gives no promise, or lets go; before anything is changed by it."""
        refused = [verdict.request_id for verdict in plan.verdicts if not verdict.promised]
        names = [name for name in (*refused, *plan.at_risk) if name not in self._kept]
        began_s = time.perf_counter() if names else 0.0
        if not names or began_s < self._keeps_from_s:
            return
        kept = replace(state, requests=state.requests.copy())
        self._kept.update(dict.fromkeys(names, kept))
        most = max(1, min(MAX_KEPT, MAX_ROWS // max(1, len(state.requests))))
        while len(self._kept) > most:
            self._kept.popitem(last=False)
        ended_s = time.perf_counter()
        self._keeps_from_s = ended_s + (ended_s - began_s) * (1.0 - SHARE) / SHARE

    def answer(self, request_id: str) -> dict[str, Any]:
        """Return `{"explanation": ...}`, `{"pending": true}` while it is made, or `{"error": ...}`; never waits."""
        if request_id in self._found:
            return {"explanation": self._found[request_id]}
        state = self._kept.get(request_id)
        if state is None:
            return {"error": "the plan about it is not kept (only the last that said no are)"}
        if self._asked is None:
            self._asked = request_id
            threading.Thread(target=self._find, args=(request_id, state), name="slos-serve-why", daemon=True).start()
        return {"pending": True}

    def _find(self, request_id: str, state: ReplicaState) -> None:
        try:
            found = asdict(explain(state, request_id, _Unhurried(self._make_planner())))
        except Exception as error:  # noqa: BLE001 - whoever asked hears of it
            found = {"request_id": request_id, "error": str(error)}
        self._found[request_id] = found
        while len(self._found) > MAX_KEPT:
            self._found.popitem(last=False)
        self._asked = None


class _Unhurried:
    """A planner that lets others have the interpreter before each plan."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def plan(self, state: ReplicaState) -> Plan:
        time.sleep(REST_S)
        return self._planner.plan(state)
