"""What became of every request of a run in which something breaks: nobody may be left without an end.

`lost` is what must not happen: a stream that ended as if it were whole and was not, or that never ended. `doubled`:
more tokens than were asked for, so that something was sent twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slos_serve.bench.client import BenchRequest, StreamResult
from slos_serve.bench.grade import grade_run

COMPLETED, REFUSED, FAILED, UNFINISHED, LOST = "completed", "refused", "failed_clearly", "unfinished", "lost"
CUT_OFF = "cut off"  # by the client, at the end of the run
SILENT = "the stream ended without a finish reason"
GONE = ("Connect", "Disconnect", "ClientOSError", "ClientPayloadError", "ConnectionReset")  # the transport says so


def ending(request: BenchRequest, result: StreamResult, *, server_may_go: bool = False) -> str:
    """Return how one request ended. `server_may_go`: a connection that breaks says what happened, and is no loss."""
    if result.error is None:
        return COMPLETED if result.num_output_tokens == request.output_tokens else LOST
    if result.status in (429, 503) and not result.chunks:
        return REFUSED
    if result.error.startswith(CUT_OFF):
        return UNFINISHED
    kind = result.error.partition(":")[0]
    if result.error.startswith(SILENT) or "Timeout" in kind:
        return LOST
    if any(word in kind for word in GONE):
        return FAILED if server_may_go else LOST
    return FAILED


def account(requests: Sequence[BenchRequest], results: Sequence[StreamResult]) -> dict[str, Any]:
    """Return the ends of a run in numbers; those after `offered` and before `doubled` add up to it.

    `met`, `missed`, `declined` (served as best effort) and `rejected` as graded; the rest did not complete. A request
    that still ran when the run was over is lost: who starts the next run waited long enough.
    """
    counts = dict.fromkeys(("met", "missed", "declined", "rejected", "failed_clearly", "lost"), 0)
    doubled = 0
    for stream in grade_run(requests, results):
        end = ending(stream.request, stream.result, server_may_go=True)
        doubled += stream.result.num_output_tokens > stream.request.output_tokens
        if end == COMPLETED:
            outcome = stream.graded.outcome
            counts[outcome if outcome in counts else "missed"] += 1
        else:
            counts[{REFUSED: "rejected", FAILED: "failed_clearly"}.get(end, "lost")] += 1
    return {"offered": len(results), **counts, "doubled": doubled}
