"""A scheduler of your own: shortest remaining prompt first, decodes always.

    python examples/own_scheduler.py
    cd examples && slos-serve simulate --system own_scheduler:ShortestPromptFirst,vllm --rate 3
    cd examples && slos-serve capacity --systems own_scheduler:ShortestPromptFirst --scenarios chatbot --quick

In vLLM, started in a folder with this file or where Python can import it:

    slos-serve serve MODEL --additional-config '{"slo": {"planner": "own_scheduler:ShortestPromptFirst"}}'

A scheduler is one method. It gets the state of a replica: requests as the rows of a table, free KV blocks, limits, how
long steps take. It returns the next batch. What does not fit (blocks, seats) the engine leaves out.
"""

import numpy as np

import slos_serve
from slos_serve import BatchPlan, Plan, ReplicaState


class ShortestPromptFirst:
    """Run every decode, then fill `token_budget` tokens with prompts, the shortest remainder first."""

    def __init__(self, token_budget: int = 2048) -> None:
        self.token_budget = token_budget

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch."""
        rows = state.requests.rows
        left = rows["num_prompt_tokens"] + rows["num_output_tokens"] - rows["num_computed_tokens"]
        order = np.argsort(left, kind="stable")  # a decode has one token left, so decodes come first
        before = np.cumsum(left[order]) - left[order]
        tokens = np.minimum(left[order], self.token_budget - before)
        order, tokens = order[tokens > 0], tokens[tokens > 0]
        batch = BatchPlan(
            request_ids=[state.requests.request_ids[i] for i in order],
            num_tokens=tokens,
            draft_lengths=np.zeros(len(order), dtype=np.int64),
        )
        return Plan(batch=batch)


if __name__ == "__main__":
    for system in (ShortestPromptFirst, "vllm", "slos-serve"):
        run = slos_serve.simulate(system, slos_serve.SMALL_TRACE, rate_rps=4.0, max_requests=100)
        name = system if isinstance(system, str) else system.__name__
        print(f"{name:20} meets the SLOs of {100 * (run.attainment or 0.0):.1f} % of {len(run.graded)} requests")
