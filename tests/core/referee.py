"""An independent referee: it serves requests by a planner's plans, and refuses a plan that no engine could run.

It shares nothing with the planner but the nouns, the performance model that both are given, and
`StreamGrader`, which owns the rule by which promises are kept.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from slos_serve.core.slo.deadlines import StreamGrader
from slos_serve.core.types import Limits, ReplicaState, RequestTable, Status, Tier

POLL_S = 0.001


class IllegalPlanError(AssertionError):
    """A plan that no engine could carry out, or that says two things about one request."""


def refuse(condition, text):
    if condition:
        raise IllegalPlanError(text)


def computed_tokens(rows):
    """Return the tokens of each row whose keys and values are there when it next runs."""
    fresh = rows["num_computed_tokens"] == 0
    return rows["num_computed_tokens"] + np.where(fresh, rows["num_cached_tokens"], 0)


def remaining_tokens(rows):
    """Return the tokens each row must compute before its next output token."""
    return rows["num_prompt_tokens"] + rows["num_output_tokens"] - computed_tokens(rows)


def check_plan(state, plan):
    """Raise `IllegalPlanError` unless an engine can run the batch and the verdicts make sense."""
    limits, table, batch = state.limits, state.requests, plan.batch
    ids = list(batch.request_ids)
    refuse(len(set(ids)) != len(ids), "a request is twice in the batch")
    refuse(len(batch.num_tokens) != len(ids) or len(batch.draft_lengths) != len(ids), "columns of different lengths")
    index = [table.index(name) for name in ids]
    rows = table.rows[index]
    tokens, drafts = np.asarray(batch.num_tokens), np.asarray(batch.draft_lengths)
    left = remaining_tokens(rows)
    refuse((tokens < 1).any(), "an entry without tokens")
    refuse((tokens > left).any(), "more tokens than the request has left")
    refuse((drafts < 0).any() or (drafts > limits.max_draft_length).any(), "a draft length that was not allowed")
    refuse((drafts[(left != 1) | (rows["num_output_tokens"] == 0)] > 0).any(), "drafts without a decode")
    total = int(tokens.sum() + drafts.sum())
    refuse(total > limits.max_num_batched_tokens, f"{total} tokens > {limits.max_num_batched_tokens}")

    out = list(batch.preempted)
    refuse(len(set(out)) != len(out) or set(out) & set(ids), "preempted twice, or preempted and in the batch")
    victims = table.rows[[table.index(name) for name in out]]
    refuse((victims["status"] != Status.RUNNING).any(), "preempted while waiting")
    running = table.rows["status"] == Status.RUNNING
    seats = int(running.sum()) - len(out) + int((~running[index]).sum())
    refuse(seats > limits.max_num_seqs, f"{seats} requests > {limits.max_num_seqs}")
    after = -(-(computed_tokens(rows) + tokens + drafts) // limits.block_size)
    taken = int((after - rows["num_kv_blocks"]).clip(min=0).sum())
    free = state.num_free_kv_blocks + int(victims["num_kv_blocks"].sum())
    refuse(taken > free, f"{taken} KV blocks taken, {free} free")

    told = [verdict.request_id for verdict in plan.verdicts]
    refuse(len(set(told)) != len(told), "two verdicts for one request")
    for verdict in plan.verdicts:
        tier = table.rows["tier"][table.index(verdict.request_id)]
        refuse(tier == Tier.PROMISED, f"{verdict.request_id}: a verdict about a promise already given")
        refuse(tier == Tier.BEST_EFFORT and not verdict.promised, f"{verdict.request_id}: declined twice")
        refuse(verdict.promised and verdict.reason != "", "a promise with a reason against it")
        refuse(not verdict.promised and verdict.reason == "", "a refusal without a reason")
    promised = {table.request_ids[i] for i in np.flatnonzero(table.rows["tier"] == Tier.PROMISED)}
    refuse(not set(plan.at_risk) <= promised, "at risk without a promise")


def batch_shape(state, batch):
    """Return tokens, requests, context of decodes, drafter steps and attention pairs of a batch."""
    rows = state.requests.rows[[state.requests.index(name) for name in batch.request_ids]]
    tokens, drafts, start = np.asarray(batch.num_tokens), np.asarray(batch.draft_lengths), computed_tokens(rows)
    decode = (remaining_tokens(rows) == 1) & (rows["num_output_tokens"] > 0)
    pairs = (tokens * (start + 0.5 * tokens))[~decode].sum()
    return {
        "num_tokens": float(tokens.sum() + drafts.sum()),
        "num_requests": float(len(rows)),
        "context_tokens": float(start[decode].sum()),
        "draft_steps": float(drafts.max(initial=0)),
        "attention_pairs": float(pairs),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one request ended. `promised_s` is inf where no promise came before the first token."""

    met: bool
    promised_s: float
    finished_s: float
    num_preemptions: int

    @property
    def promised(self):
        return math.isfinite(self.promised_s)

    @property
    def broken(self):
        return self.promised and not self.met


@dataclass(slots=True)
class Live:
    request: object
    output_tokens: int
    grader: StreamGrader
    promised_s: float = math.inf
    num_preemptions: int = 0


@dataclass(slots=True, kw_only=True)
class Referee:
    """Serve requests by a planner's plans on a true performance model, and note how each one ended.

    `model` rules the clock; the planner sees `plan_model` (the same unless given). Speculation: every draft
    token is accepted with chance `acceptance` (`rng`). `observe` is called with every state and plan.
    """

    planner: object
    limits: Limits
    model: object
    plan_model: object = None
    acceptance: float = 0.0
    rng: object = None
    observe: object = None
    now_s: float = 0.0
    table: RequestTable = field(default_factory=RequestTable)
    live: dict = field(default_factory=dict)
    outcomes: dict = field(default_factory=dict)
    at_risk: set = field(default_factory=set)
    num_steps: int = 0
    num_idle: int = 0
    most_work: int = 0

    def add(self, request, output_tokens, *, predicted=None, tier=Tier.PENDING):
        expected = float(output_tokens if predicted is None else predicted)
        self.table.add(request, predicted_output_tokens=expected, tier=tier)
        self.live[request.request_id] = Live(
            request, output_tokens, StreamGrader(request.arrival_s, request.slo, request.thinks)
        )

    def state(self):
        held = int(self.table.rows["num_kv_blocks"].sum())
        return ReplicaState(
            now_s=self.now_s,
            requests=self.table,
            num_free_kv_blocks=self.limits.num_kv_blocks - held,
            limits=self.limits,
            perf_model=self.plan_model or self.model,
            acceptance=dict.fromkeys(self.table.classes, self.acceptance),
        )

    def serve(self, arrivals=(), *, max_steps=20_000):
        """Serve until everyone has ended; `arrivals` is a list of (request, output tokens[, predicted])."""
        waiting = sorted(arrivals, key=lambda arrival: arrival[0].arrival_s)
        idle = 0
        while waiting or self.live:
            while waiting and waiting[0][0].arrival_s <= self.now_s:
                arrival = waiting.pop(0)
                self.add(arrival[0], arrival[1], predicted=arrival[2] if len(arrival) > 2 else None)
            if not self.live:
                self.now_s = waiting[0][0].arrival_s
                continue
            ran = self.step()
            idle = 0 if ran else idle + 1
            refuse(idle > 5000, f"nothing ran for {idle} plans while {len(self.live)} requests were live")
            refuse(self.num_steps > max_steps, f"{len(self.live)} requests live after {max_steps} steps")
            if not ran and waiting:
                self.now_s = min(self.now_s, max(waiting[0][0].arrival_s, self.now_s - POLL_S))
        return self.outcomes

    def step(self):
        """Plan, check and run one step; False where the batch was empty."""
        state = self.state()
        plan = self.planner.plan(state)
        check_plan(state, plan)
        if self.observe is not None:
            self.observe(state, plan)
        self.num_steps += 1
        self.most_work = max(self.most_work, plan.work)
        self.at_risk.update(plan.at_risk)
        rows = self.table.rows
        for verdict in plan.verdicts:
            rows["tier"][self.table.index(verdict.request_id)] = Tier.PROMISED if verdict.promised else Tier.BEST_EFFORT
            live = self.live[verdict.request_id]
            if verdict.promised and live.grader.num_output_tokens == 0:
                live.promised_s = self.now_s
        for name in plan.batch.preempted:
            self.preempt(name)
        if not len(plan.batch.request_ids):
            self.num_idle += 1
            self.now_s += POLL_S
            return False
        shape = batch_shape(state, plan.batch)
        self.now_s += self.model.seconds(
            shape["num_tokens"],
            shape["num_requests"],
            context_tokens=shape["context_tokens"],
            draft_steps=shape["draft_steps"],
            attention_pairs=shape["attention_pairs"],
        )
        for entry in plan.batch.entries:
            self.advance(entry)
        return True

    def preempt(self, name):
        row = self.table.index(name)
        for column in ("num_kv_blocks", "num_computed_tokens", "num_cached_tokens"):
            self.table.rows[column][row] = 0
        self.table.rows["status"][row] = Status.WAITING
        self.live[name].num_preemptions += 1

    def advance(self, entry):
        """Account for one request's share of the batch that just ended."""
        name, rows, i = entry.request_id, self.table.rows, self.table.index(entry.request_id)
        row = rows[i : i + 1]
        ready = int(computed_tokens(row)[0]) + entry.num_tokens
        emits = entry.num_tokens == int(remaining_tokens(row)[0])
        rows["status"][i] = Status.RUNNING
        rows["num_computed_tokens"][i] = ready
        blocks = -(-(ready + entry.draft_length) // self.limits.block_size)
        rows["num_kv_blocks"][i] = max(int(rows["num_kv_blocks"][i]), blocks)
        if not emits:
            return
        live = self.live[name]
        new = 1
        while new <= entry.draft_length and self.rng.random() < self.acceptance:
            new += 1
        new = min(new, live.output_tokens - live.grader.num_output_tokens)
        live.grader.feed(self.now_s, new)
        rows["num_computed_tokens"][i] += new - 1
        produced = rows["num_output_tokens"][i] = live.grader.num_output_tokens
        rows["first_token_s"][i], rows["last_token_s"][i] = live.grader.first_token_s, self.now_s
        rows["missed"][i] = int(live.grader.missed)
        if produced >= live.output_tokens:
            self.outcomes[name] = Outcome(
                met=live.grader.finish(self.now_s).met,
                promised_s=live.promised_s,
                finished_s=self.now_s,
                num_preemptions=live.num_preemptions,
            )
            self.table.remove(name)
            del self.live[name]
        elif produced >= rows["predicted_output_tokens"][i]:
            rows["predicted_output_tokens"][i] = produced * 1.25 + 8

    @property
    def broken(self):
        return sorted(name for name, outcome in self.outcomes.items() if outcome.broken)

    @property
    def kept_share(self):
        promised = [outcome for outcome in self.outcomes.values() if outcome.promised]
        return sum(outcome.met for outcome in promised) / max(1, len(promised))
