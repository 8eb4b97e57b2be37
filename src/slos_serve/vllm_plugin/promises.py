"""What is said about each request, and what became of it.

A verdict is told once and changes at most from best-effort to promoted. Where plans are not carried out
nothing is promised: every request that wants a promise is told so (reason `observe`) and still graded, and
what the plans would have said is counted beside it. A request that ends is graded, counted, and told.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from slos_serve.config import short
from slos_serve.core.slo import deadlines
from slos_serve.core.tight import is_too_tight
from slos_serve.core.types import Plan, Tier, Verdict
from slos_serve.core.words import EndTold, Reason, RequestTold, VerdictTold
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.report import Tally

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from slos_serve.core.types import Limits
    from slos_serve.vllm_plugin.engine.live import Live
    from slos_serve.vllm_plugin.engine.tracking import Tracker
    from slos_serve.vllm_plugin.learning.learner import Learner
    from slos_serve.vllm_plugin.progress import TokenTimes
    from slos_serve.vllm_plugin.safety.faults import Faults
    from slos_serve.vllm_plugin.safety.rules import StepDown
    from slos_serve.vllm_plugin.wire.outbox import Outbox


BUSY = frozenset({Reason.COMPUTE, Reason.DEADLINE_PASSED})  # or it asks for more than an idle engine can do


class Promises:
    """Apply verdicts to the table and to what clients hear; grade what ends."""

    def __init__(
        self,
        tracker: Tracker,
        learner: Learner,
        limits: Limits,
        safety: StepDown,
        *,
        outbox: Outbox,
        faults: Faults,
        progress: TokenTimes,
    ) -> None:
        self._learner = learner
        self._limits = limits
        self._progress = progress
        self.tally = Tally()
        self.would_be: dict[str, Counter[str]] = {}
        self.num_outrun = 0  # broken by outputs longer than predicted: nothing that planning did wrong
        self._tracker = tracker
        self._safety = safety
        self._outbox = outbox
        self._faults = faults

    def first_verdict(self, live: Live, *, enforcing: bool, is_paused: bool = False) -> None:
        """Say at once what no plan can change, or that no plan is made."""
        if not live.has_slo and live.is_resolved:
            live.verdict = "best-effort"
            self._tell(live, "best-effort", live.reason)
        elif is_paused and live.is_resolved and not live.is_set_aside:
            live.verdict, live.reason, live.is_declined = "best-effort", "paused", True  # until a plan promotes it
            self._tell(live, "best-effort", "paused")
        elif not enforcing or live.is_set_aside:
            self._tell(live, "best-effort", "share" if live.is_over_share and enforcing else "observe")

    def apply(self, plan: Plan, now_s: float, *, enforcing: bool) -> None:
        """Write a plan's verdicts into the table; tell them where plans are carried out."""
        table = self._tracker.table
        tiers = table.rows["tier"]
        for verdict in plan.verdicts:
            index = table.index(verdict.request_id)
            tiers[index] = Tier.PROMISED if verdict.promised else Tier.BEST_EFFORT
            live = self._tracker.live[verdict.request_id]
            if enforcing:
                self._change(live, verdict, now_s)
            else:
                word = "promised" if verdict.promised else "best-effort"
                self.would_be.setdefault(live.slo_class, Counter())[word] += live.would_be != word
                live.would_be = word

    def _change(self, live: Live, verdict: Verdict, now_s: float) -> None:
        if verdict.promised:
            if live.was_promised:
                return
            word = "promoted" if live.verdict == "best-effort" else "promised"
            live.was_promised = True
            row = self._tracker.table.rows[self._tracker.table.index(live.request_id)]
            live.promised_tokens = float(row["predicted_output_tokens"])
            if not live.has_begun:
                live.is_declined = False
                if live.slo.ttft_s is not None:
                    live.promise_lead_s = live.arrival_s + live.slo.ttft_s - now_s
        else:
            word = "best-effort"
            if live.verdict == word:
                return
            live.is_declined = not live.was_promised
        live.verdict, live.reason = word, verdict.reason
        if live.reason in BUSY and self._is_too_tight(live):
            live.reason = Reason.TOO_TIGHT
        slack_s = verdict.slack_s if verdict.promised else None
        self._tell(live, word, live.reason, slack_s, verdict.predicted_ttft_s)

    def _is_too_tight(self, live: Live) -> bool:
        """Tell whether a request asks for more than this engine can do at all."""
        model = self._learner.model
        if model is None or not live.has_row:
            return False
        row = self._tracker.table.rows[self._tracker.table.index(live.request_id)]
        return is_too_tight(
            live.slo,
            model,
            prompt_tokens=int(row["num_prompt_tokens"]),
            output_tokens=float(row["predicted_output_tokens"]),
            budget=self._limits.max_num_batched_tokens,
            cached_tokens=int(row["num_cached_tokens"]),
            tokens_per_step=1 + self._limits.max_draft_length,
            guard_s=self._limits.guard_s,
        )

    def _tell(
        self, live: Live, verdict: str, reason: str, slack_s: float | None = None, predicted_ttft_s: float = math.inf
    ) -> None:
        told: VerdictTold = {
            **_names(live),
            "verdict": verdict,
            "reason": reason,
            "slack_ms": _ms(slack_s),
            "predicted_ttft_ms": _ms(predicted_ttft_s),
            "asked": _asked(live),
        }
        self._outbox.verdicts.append(dict(told))

    def finish(
        self, requests: Iterable[Request], now_s: float, outputs: Mapping[int, Any] | None, *, enforcing: bool
    ) -> None:
        """Grade and forget requests that have ended; `outputs` are the step's, where a step ended them."""
        ends: dict[str, str] = {}
        gone = [(request.request_id, self._tracker.remove(request.request_id)) for request in requests]
        for request_id, live in gone:
            if live is None:
                continue
            try:
                ends[request_id] = self._grade(live, now_s, enforcing=enforcing)
            except Exception as error:  # noqa: BLE001 - one that cannot be graded takes nobody along
                self._faults.add("grade", error)
        if outputs and ends:
            _set_stop_reasons(outputs, ends)

    def _grade(self, live: Live, now_s: float, *, enforcing: bool) -> str:
        """Grade one request, tell about it, and return what its final chunk says, "" for nothing."""
        how = view.how_it_ended(live.request, live.num_output_tokens)
        grade = None if live.grader is None else live.grader.finish(now_s)
        outcome = deadlines.outcome(
            grade,
            has_slo=live.has_slo,
            promised=not live.is_declined,
            cancelled=how == "cancelled",
            failed=how == "failed",
        )
        if live.is_expired:  # a request without an SLO too: it was sent away
            outcome, live.reason = "rejected", "ttl-expired"
        if how == "finished":
            self._tracker.lengths.observe(live.slo_class, live.request.num_prompt_tokens, live.num_output_tokens)
        self.tally.add(live.slo_class, outcome, promised=live.was_promised)
        if live.was_promised and outcome in {"met", "missed"}:
            if outcome == "missed" and live.has_outrun:
                self.num_outrun += 1
            else:
                self._safety.add_promise(outcome == "met", live.tenant, arrival_s=live.arrival_s)
        first, last, count = live.first_token_s, live.last_token_s, live.num_output_tokens
        told: EndTold = {
            **_names(live),
            "outcome": outcome,
            "reason": live.reason,
            "promised": live.was_promised,
            "stages": dict(grade.stages) if grade is not None else {},
            "least_slack_ms": _all_ms(grade.least_slack_s) if grade is not None else {},
            "ttft_ms": _ms(first - live.arrival_s),
            "tpot_ms": _ms((last - first) / (count - 1)) if count > 1 else None,
            "num_prompt_tokens": live.request.num_prompt_tokens,
            "num_output_tokens": count,
            "promise_lead_ms": _ms(live.promise_lead_s),
            "tokens": self._progress.take(live),
        }
        self._outbox.finished.append(dict(told))
        if live.slo_id is not None or not live.args:
            return ""  # the HTTP edge says it better; or nobody asked
        verdict = live.verdict or ("pending" if enforcing and not live.is_set_aside else "observe")
        return f"slo:{verdict}:{live.reason if outcome == 'none' else outcome}"


def _names(live: Live) -> RequestTold:
    return {
        "slo_id": live.slo_id,
        "request_id": short(live.request_id),
        "slo_class": live.slo_class,
        "tenant": live.tenant,
        "session": live.session,
        "stamped_s": live.stamped_s,
        "client": live.request.client_index,
    }


def _asked(live: Live) -> dict[str, float]:
    """Return what a request asks for, resolved for its prompt, in milliseconds."""
    return {name.removesuffix("_s") + "_ms": round(value * 1000, 3) for name, value in live.slo.items() if value}


def _all_ms(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value * 1000, 3) for name, value in seconds.items()}


def _ms(seconds: float | None) -> float | None:
    """Return milliseconds, None for what is unknown or infinite."""
    return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1000, 3)


def _set_stop_reasons(outputs: Mapping[int, Any], ends: Mapping[str, str]) -> None:
    """Say verdict and outcome on the final chunk where nothing else is said."""
    for batch in outputs.values():
        for output in batch.outputs:
            text = ends.get(output.request_id)
            if text and output.finish_reason is not None and output.stop_reason is None:
                output.stop_reason = text
