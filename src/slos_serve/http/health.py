"""What probes ask: does the server live, and may requests be sent to it? Two questions, as a supervisor acts on each.

A server that is being profiled, or that its operator has paused, lives and is not ready: whoever would restart it
because of that must not. It does not live where its engine, once heard, has fallen silent (its process is stopped or
gone), or has made no step for long although it has requests.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import Response

from slos_serve.http.hub import Hub
from slos_serve.http.replies import Json

ALIVE, READY = "/livez", "/readyz"
PATHS = frozenset({"/health", "/ping", ALIVE, READY})
PROBE_HEADER = (b"x-slos-serve-probe", b"1")
SILENT_S = 30.0  # the engine says something every second
STALLED_S = 120.0  # no step of any engine takes so long


def answer(hub: Hub, path: str, *, is_own: bool) -> Response | None:
    """Return what a probe is told; None where the server inside knows. `is_own`: our own start asks, while it measures.

    `/health` and `/ping` are what they are on vLLM, but for 503 while the engine is being profiled.
    """
    problem = ailment(hub) if path in {ALIVE, READY} else ""
    if path == ALIVE and not problem:
        return Json({"status": "alive"})
    if path != ALIVE and hub.is_profiling and not is_own:
        problem = problem or "profiling"
    if path == READY and (hub.snapshot or {}).get("paused"):
        problem = problem or "paused"
    return Json({"status": problem}, status_code=HTTPStatus.SERVICE_UNAVAILABLE) if problem else None


def ailment(hub: Hub) -> str:
    """Return why the engine counts as hung, "" where it does not; an engine never heard of is not judged."""
    snapshot = hub.snapshot
    if snapshot is None or hub.is_front:
        return ""
    if hub.snapshot_age_s > SILENT_S:
        return "silent"
    has_work = bool(snapshot.get("num_running") or snapshot.get("num_waiting"))
    is_waiting = hub.is_profiling or bool(snapshot.get("paused"))
    return "stalled" if has_work and not is_waiting and hub.stalled_s > STALLED_S else ""
