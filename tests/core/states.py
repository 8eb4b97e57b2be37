"""Requests, engines and whole states to plan for, and how Hypothesis draws them."""

import math
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from slos_serve.core.perf import PerfModel
from slos_serve.core.types import Limits, ReplicaState, Request, RequestTable, Slo, Status, Tier

# Three kinds of hardware: a dear step and cheap tokens; the same with context; a slow one that feels attention.
STEPPED = PerfModel.from_terms(
    [{"per_token_s": 6.878e-5, "fixed_s": 2.480e-2}, {"per_token_s": 7.523e-5, "fixed_s": 3.03e-3}]
)
CONTEXT = PerfModel.from_terms(
    [
        {"per_token_s": 3.89e-5, "per_context_token_s": 3.99e-7, "fixed_s": 1.133e-2},
        {"per_token_s": 7.26e-5, "per_context_token_s": 3.99e-7, "fixed_s": 5.36e-3},
    ]
)
ATTENTION = PerfModel.from_terms(
    [
        {
            "per_token_s": 2e-4,
            "per_request_s": 1e-4,
            "per_context_token_s": 1e-6,
            "per_draft_step_s": 1e-3,
            "per_pair_s": 5e-8,
            "fixed_s": 5e-3,
        }
    ]
)
MODELS = {"stepped": STEPPED, "context": CONTEXT, "attention": ATTENTION}
TPOTS = (0.03, 0.05, 0.1)


def make_limits(**changes):
    values = {
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
        "max_model_len": 8192,
        "block_size": 16,
        "num_kv_blocks": 20_000,
        "work_limit": 200_000,
    }
    return Limits(**(values | changes))


def make_request(name, *, arrival_s=0.0, prompt=500, most=256, weight=1.0, slo_class="chat", thinks=False, **slo):
    return Request(
        request_id=name,
        arrival_s=arrival_s,
        num_prompt_tokens=prompt,
        max_output_tokens=most,
        slo=Slo(**slo),
        slo_class=slo_class,
        weight=weight,
        thinks=thinks,
    )


def make_state(table, *, now_s=0.0, model=STEPPED, limits=None, **changes):
    limits = limits or make_limits()
    free = limits.num_kv_blocks - int(table.rows["num_kv_blocks"].sum())
    return ReplicaState(
        **(
            {"now_s": now_s, "requests": table, "num_free_kv_blocks": free, "limits": limits, "perf_model": model}
            | changes
        )
    )


def add_decode(
    table, name, *, now_s=0.0, prompt=500, produced=20, ahead_s=0.0, predicted=200, tier=Tier.PROMISED, **slo
):
    """Add a running request in decode whose next token is due `ahead_s` seconds after one TPOT from now."""
    slo = {"ttft_s": 1.0, "tpot_s": 0.1} | slo
    pace = slo["tpot_s"] or 0.0
    first = now_s + ahead_s - (produced - 1) * pace
    index = table.add(
        make_request(name, arrival_s=first - (slo["ttft_s"] or 0.0), prompt=prompt, most=4096, **slo),
        tier=tier,
        predicted_output_tokens=predicted,
    )
    row = table.rows[index]
    row["status"], row["tier"] = Status.RUNNING, tier
    row["num_computed_tokens"] = prompt + produced - 1
    row["num_output_tokens"] = produced
    row["num_kv_blocks"] = -(-(prompt + produced - 1) // 16)
    row["first_token_s"], row["last_token_s"] = first, now_s
    return index


def shuffled(table, order):
    """Return a copy of the table with its rows in another order; seq and every other column stay."""
    data = table.to_json()
    data["request_ids"] = [data["request_ids"][i] for i in order]
    data["columns"] = {name: [values[i] for i in order] for name, values in data["columns"].items()}
    return RequestTable.from_json(data)


def by_name(plan):
    """Return what a plan says, without its order of rows."""
    batch = plan.batch
    return {
        "batch": {entry.request_id: (entry.num_tokens, entry.draft_length) for entry in batch.entries},
        "preempted": list(batch.preempted),
        "verdicts": {verdict.request_id: verdict for verdict in plan.verdicts},
        "at_risk": plan.at_risk,
        "work": plan.work,
        "predicted_s": batch.predicted_s,
        "headroom_tokens_per_s": plan.headroom_tokens_per_s,
    }


def random_state(seed, *, num_requests=24, model="stepped", blocks=20_000, seqs=64, budget=2048, tight=True):
    """Return a state in the middle of things: decodes, started prompts, candidates, declined and missed ones."""
    rng = np.random.default_rng(seed)
    table = RequestTable()
    now = float(rng.uniform(0, 1000))
    free, running = blocks, 0
    for i in range(num_requests):
        tpot = float(rng.choice(TPOTS))
        prompt = int(np.clip(rng.lognormal(6.0, 1.0), 1, 6000))
        need = -(-(prompt + 301) // 16)
        kind = rng.choice(
            ["decode", "started", "candidate", "declined", "free", "missed"], p=[0.3, 0.1, 0.35, 0.1, 0.1, 0.05]
        )
        if kind in ("decode", "missed", "started") and (need > free or running >= seqs):
            kind = "candidate"
        if kind in ("decode", "missed"):
            index = add_decode(
                table, f"r{i}", now_s=now, prompt=prompt, produced=int(rng.integers(1, 100)), tpot_s=tpot,
                ahead_s=float(rng.uniform(0, 1)), predicted=300,
            )  # fmt: skip
            table.rows["missed"][index] = int(kind == "missed")
        else:
            waited = float(rng.uniform(0, 0.5))
            ttft = float(rng.uniform(0.3, 1.5) if tight else rng.uniform(1.0, 6.0))
            slo = {} if kind == "free" else {"ttft_s": ttft, "tpot_s": tpot}
            request = make_request(
                f"r{i}",
                arrival_s=now - waited,
                prompt=prompt,
                most=2048,
                weight=float(rng.choice([1.0, 1.0, 2.5])),
                **slo,
            )
            tier = Tier.BEST_EFFORT if kind == "declined" else Tier.PROMISED if kind == "started" else Tier.PENDING
            index = table.add(request, tier=tier, predicted_output_tokens=300)
            if kind == "started" and prompt > 1:
                done = int(rng.integers(1, prompt))
                table.rows["status"][index] = Status.RUNNING
                table.rows["num_computed_tokens"][index] = done
                table.rows["num_kv_blocks"][index] = -(-done // 16)
        held = int(table.rows["num_kv_blocks"][index])
        free -= need if held else 0
        running += held > 0
    table.rows["drawn_output_tokens"] = np.random.default_rng([seed, 1]).uniform(1, 400, num_requests)
    limits = make_limits(num_kv_blocks=blocks, max_num_seqs=seqs, max_num_batched_tokens=budget)
    return make_state(table, now_s=now, model=MODELS[model], limits=limits)


def roughen(state, seed):
    """Change a few requests of a state to what hosts may bring: odd promises, preemptions, wrong predictions."""
    rng, rows, now = np.random.default_rng(seed), state.requests.rows, state.now_s
    for _ in range(int(rng.integers(1, 8))):
        row = rows[int(rng.integers(len(rows)))]
        name = str(
            rng.choice(
                ["e2e", "gap", "think", "short", "long", "free", "cached", "preempted", "weight", "late", "pace"]
            )
        )
        if name == "e2e":
            begun = row["first_token_s"] if row["num_output_tokens"] else row["arrival_s"]
            row["e2e_deadline_s"] = max(begun + 0.05, now + rng.uniform(-2, 10))
        elif name == "gap":
            row["max_gap_s"] = rng.uniform(0.001, 1)
        elif name == "think":
            row["thinking_tpot_s"], row["is_thinking"] = rng.uniform(0.01, 0.1), 1
            row["num_thinking_tokens"] = row["num_output_tokens"]
        elif name in ("short", "long"):
            row["predicted_output_tokens"] = rng.uniform(0, 5) if name == "short" else 1e6
        elif name == "free":
            row["tpot_s" if rng.random() < 0.5 else "ttft_deadline_s"] = math.inf
        elif name == "cached":
            row["num_cached_tokens"] = int(rng.integers(0, row["num_prompt_tokens"]))
        elif name == "preempted":
            row["status"], row["num_computed_tokens"], row["num_kv_blocks"] = Status.WAITING, 0, 0
        elif name == "weight":
            row["weight"] = 10 ** rng.uniform(-6, 6)
        elif name == "late":
            row["last_token_s"] = row["ttft_deadline_s"] = now - rng.uniform(0, 30)
        else:
            row["tpot_s"] = 10 ** rng.uniform(-7, 4)
    free = state.limits.num_kv_blocks - int(rows["num_kv_blocks"].sum())
    drafts = int(rng.choice([0, 4]))
    limits = replace(state.limits, max_draft_length=drafts, guard_s=float(rng.choice([0.0, 0.005])))
    return replace(
        state, limits=limits, num_free_kv_blocks=free, acceptance={"chat": float(rng.choice([0.0, 0.7, 1.0]))}
    )


@st.composite
def states(draw, **fixed):
    """Draw a state in the middle of things."""
    options = {
        "num_requests": draw(st.integers(1, 40)),
        "model": draw(st.sampled_from(sorted(MODELS))),
        "blocks": draw(st.sampled_from([600, 1500, 20_000])),
        "seqs": draw(st.sampled_from([4, 16, 64])),
        "budget": draw(st.sampled_from([256, 2048, 8192])),
        "tight": draw(st.booleans()),
    }
    seed = draw(st.integers(0, 10**6))
    state = random_state(seed, **(options | fixed))
    return roughen(state, seed) if draw(st.booleans()) else state


@st.composite
def arrival_lists(draw, *, most=16, kinds=("plain",), longest_prompt=3000):
    """Draw (request, output tokens) in order of arrival, for a referee that starts at 0 s."""
    count = draw(st.integers(1, most))
    now, arrivals = 0.0, []
    for i in range(count):
        now += draw(st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.7]))
        kind = draw(st.sampled_from(kinds))
        slo = {"ttft_s": draw(st.sampled_from([0.2, 0.5, 1.0, 3.0])), "tpot_s": draw(st.sampled_from(TPOTS))}
        if kind == "gap":
            slo["max_gap_s"] = 0.3
        elif kind == "e2e":
            slo = {"e2e_s": draw(st.sampled_from([2.0, 5.0, 15.0]))}
        elif kind == "ttft":
            del slo["tpot_s"]
        elif kind == "tpot":
            del slo["ttft_s"]
        elif kind == "none":
            slo = {}
        prompt = draw(st.integers(1, longest_prompt))
        weight = draw(st.sampled_from([1.0, 2.0]))
        request = make_request(f"r{i}", arrival_s=now, prompt=prompt, most=512, weight=weight, **slo)
        arrivals.append((request, draw(st.integers(1, 120))))
    return arrivals
