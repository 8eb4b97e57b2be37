"""A tour of plans: three requests, what the planner promises and when, what it runs, and why.

    python examples/tour_of_a_plan.py

The state is made by hand, so that every number can be followed. What to look for in the output:

- `big` is declined at once: even alone, 4,000 prompt tokens take 0.41 s, and its first token is due after 0.2 s.
- `tight` comes first, as its deadline does. It is promised with the batch that ends its prompt: a promise is final,
  and until then a newcomer might be worth more.
- Batches are brief although longer ones would do: a newcomer waits for the end of the batch that runs.
- What is declined is served all the same, in what the promised requests leave.
"""

from dataclasses import replace

from slos_serve import (
    Limits,
    PerfModel,
    Plan,
    ReplicaState,
    Request,
    RequestTable,
    Slo,
    SloPlanner,
    Status,
    Tier,
)

# How long a step takes: 10 ms, and 0.1 ms for each token in it. 1,000 prompt tokens alone take 110 ms.
MODEL = PerfModel.from_terms([{"per_token_s": 1e-4, "fixed_s": 1e-2}])
LIMITS = Limits(max_num_batched_tokens=2048, max_num_seqs=64, max_model_len=8192, block_size=16, num_kv_blocks=2000)


def request(name: str, prompt: int, ttft_s: float) -> Request:
    """Return a request that has just come: its first token is due after `ttft_s`, then one every 50 ms."""
    return Request(
        request_id=name, arrival_s=0.0, num_prompt_tokens=prompt, max_output_tokens=200,
        slo=Slo(ttft_s=ttft_s, tpot_s=0.05), slo_class="chat",
    )  # fmt: skip


def show(plan: Plan, state: ReplicaState) -> None:
    """Print what a plan says."""
    print(f"At {state.now_s:.3f} s:")
    for verdict in plan.verdicts:
        said = f"promised, with {1000 * verdict.slack_s:.0f} ms to spare" if verdict.promised else "declined"
        print(f"  {verdict.request_id} is {said}{f' ({verdict.reason})' if verdict.reason else ''}")
    batch = ", ".join(f"{entry.num_tokens} of {entry.request_id}" for entry in plan.batch.entries)
    print(f"  runs {batch}: {1000 * plan.batch.predicted_s:.0f} ms")


def execute(plan: Plan, state: ReplicaState) -> ReplicaState:
    """Do what an engine does: compute the batch, put out a token where a prompt has ended, keep verdicts."""
    rows = state.requests.rows
    for verdict in plan.verdicts:
        tier = Tier.PROMISED if verdict.promised else Tier.BEST_EFFORT
        rows["tier"][state.requests.index(verdict.request_id)] = tier
    for entry in plan.batch.entries:
        row = state.requests.index(entry.request_id)
        rows["status"][row] = Status.RUNNING
        rows["num_computed_tokens"][row] += entry.num_tokens
        if rows["num_computed_tokens"][row] >= rows["num_prompt_tokens"][row]:
            rows["num_output_tokens"][row] += 1
    return replace(state, now_s=state.now_s + plan.batch.predicted_s)


if __name__ == "__main__":
    table = RequestTable()
    for one in (request("easy", 500, ttft_s=1.0), request("tight", 1500, ttft_s=0.3), request("big", 4000, ttft_s=0.2)):
        table.add(one, predicted_output_tokens=50)
    state = ReplicaState(now_s=0.0, requests=table, num_free_kv_blocks=2000, limits=LIMITS, perf_model=MODEL)
    planner = SloPlanner()
    for _ in range(7):
        plan = planner.plan(state)
        show(plan, state)
        assert planner.plan(state).to_json() == plan.to_json(), "the same state gives the same plan"
        state = execute(plan, state)
