"""Small hardware and workloads whose results can be worked out by hand."""

from slos_serve.core.perf import PerfModel
from slos_serve.core.types import Request, Slo
from slos_serve.sim.hardware import Hardware
from slos_serve.sim.replica.requests import SimRequest
from slos_serve.sim.workloads.workload import Workload

MODEL = PerfModel.from_terms(
    [{"per_token_s": 1e-3, "per_context_token_s": 1e-6, "per_draft_step_s": 2e-3, "fixed_s": 0.01}]
)


def hardware(**changes):
    values = {
        "name": "toy",
        "perf_model": MODEL,
        "kv_tokens": 16_000,
        "max_model_len": 2000,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
    }
    return Hardware(**{**values, **changes})


def sim(name, prompt, output, *, at_s=0.0, ttft_s=1.0, tpot_s=0.05, slo_class="chat", **more):
    slo = Slo(
        ttft_s=ttft_s, tpot_s=tpot_s, thinking_tpot_s=more.pop("thinking_tpot_s", None), e2e_s=more.pop("e2e_s", None)
    )
    request = Request(
        request_id=name,
        arrival_s=at_s,
        num_prompt_tokens=prompt,
        max_output_tokens=more.pop("max_output_tokens", 1000),
        slo=slo,
        slo_class=slo_class,
        thinks=more.pop("thinks", False),
    )
    return SimRequest(request=request, num_output_tokens=output, **more)


def workload(*arrivals, **more):
    return Workload(name="toy", arrivals=arrivals, duration_s=more.pop("duration_s", 10.0), **more)
