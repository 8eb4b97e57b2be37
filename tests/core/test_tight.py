"""What is too tight is late on an idle engine, and what is not is in time there."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core.perf import PerfModel
from slos_serve.core.slo.deadlines import StreamGrader
from slos_serve.core.tight import is_too_tight
from slos_serve.core.types import Slo

MODEL = PerfModel.from_terms([{"per_token_s": 1e-4, "per_request_s": 1e-3, "fixed_s": 9e-3}])
TIMES = st.one_of(st.none(), st.floats(1e-4, 5))


@settings(deadline=None)
@given(ttft_s=TIMES, tpot_s=TIMES, e2e_s=TIMES, max_gap_s=TIMES, prompt=st.integers(1, 5000), output=st.integers(1, 60))
def test_it_says_what_grading_a_run_alone_says(ttft_s, tpot_s, e2e_s, max_gap_s, prompt, output):
    slo = Slo(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s, max_gap_s=max_gap_s)
    grader = StreamGrader(0.0, slo, False)
    now = MODEL.prefill_seconds(prompt, 512)
    grader.feed(now, 1, 0)
    for _ in range(output - 1):
        now += MODEL.seconds(1, 1, context_tokens=prompt)
        grader.feed(now, 1, 0)
    is_met = grader.finish(now).met
    said = is_too_tight(slo, MODEL, prompt_tokens=prompt, output_tokens=output, budget=512)
    margins = [limit - time for limit, time in ((ttft_s, MODEL.prefill_seconds(prompt, 512)), (e2e_s, now)) if limit]
    if any(math.isclose(margin, 0, abs_tol=1e-5) for margin in margins):
        return  # a tie within the grader's tolerance
    assert said is not is_met


def test_cached_prompts_and_drafts_count():
    slow = Slo(ttft_s=0.02)
    assert is_too_tight(slow, MODEL, prompt_tokens=2000, output_tokens=1, budget=512)
    assert not is_too_tight(slow, MODEL, prompt_tokens=2000, output_tokens=1, budget=512, cached_tokens=1999)
    pace = Slo(tpot_s=0.006)
    assert is_too_tight(pace, MODEL, prompt_tokens=10, output_tokens=50, budget=512)
    assert not is_too_tight(pace, MODEL, prompt_tokens=10, output_tokens=50, budget=512, tokens_per_step=3)
