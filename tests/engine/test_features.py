"""The real engine: what vLLM and the plug-in can do together, on one steered engine in this process."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

# An engine in this process raises warnings that are not ours to mend.
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("in_process_engine")]

LINE = {"per_token_s": 1e-3, "per_request_s": 1e-3, "fixed_s": 40e-3}
PROFILE = {"schema": "slos-serve-profile/1", "key": "test", "perf_model": {"lines": [LINE]}}
RELAXED = {"slo_ttft_ms": 60_000, "slo_tpot_ms": 5_000}
STORY = "Once upon a time in a quiet village there lived"


class Steered:
    """An engine, and everything its plug-in has said."""

    def __init__(self, model: str, profile: str, **options: Any) -> None:
        slo = {"mode": "enforce", "profile": profile, "state": False, "safety": {"is_enabled": False}}
        slo["thinking_end"] = [0]  # tests choose their own
        self.llm = vllm.LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            block_size=32,
            kv_cache_memory_bytes=256 << 20,
            scheduler_cls="slos_serve.vllm_plugin.scheduler.SloScheduler",
            additional_config={"slo": slo},
            **options,
        )
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.slo = self.scheduler.slo
        self.said: dict[str, list[dict[str, Any]]] = defaultdict(list)
        send = self.slo.outbox.publisher.send

        def note(message: dict[str, Any]) -> None:
            for kind in ("verdicts", "finished"):
                self.said[kind] += message[kind]
            send(message)

        self.slo.outbox.publisher.send = note
        self.slo.outbox.sender.close()  # what is published is published by then
        time.sleep(1.0)  # the profile is picked up beside the engine's own thread

    def generate(self, prompts: list[str], *params: vllm.SamplingParams) -> list[Any]:
        """Serve prompts at once; what was said before is forgotten."""
        self.said.clear()
        return self.llm.generate(prompts, list(params), use_tqdm=False)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def params(args: dict[str, Any] | None = None, **options: Any) -> vllm.SamplingParams:
    return vllm.SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "extra_args": args, **options})


def ids(output: Any) -> list[tuple[int, ...]]:
    return [tuple(one.token_ids) for one in output.outputs]


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    path.write_text(json.dumps(PROFILE))
    return str(path)


@pytest.fixture(scope="module")
def engine(model, profile):
    steered = Steered(model, profile, enable_prefix_caching=True)
    yield steered
    assert steered.slo.snapshot()["planner_faults"] == {}
    steered.close()


def test_thinking_ends_at_its_token_and_changes_nothing_of_the_output(engine) -> None:
    (plain,) = engine.generate([STORY], params(ignore_eos=True))
    (tokens,) = ids(plain)
    end_at = next(n for n in range(4, 20) if tokens[n] not in tokens[:n])
    engine.slo.tracker.thinking_end = frozenset({tokens[end_at]})
    args = {"slo_ttft_ms": 60_000, "slo_thinking_tpot_ms": 4_000, "slo_tpot_ms": 5_000}
    thinking = {}
    grade = engine.slo.promises._grade
    engine.slo.promises._grade = lambda live, *a, **k: (
        thinking.update(tokens=live.num_thinking_tokens),
        grade(live, *a, **k),
    )[1]
    (thought,) = engine.generate([STORY], params(args, ignore_eos=True))
    assert ids(thought) == [tokens]
    assert thinking == {"tokens": end_at + 1}
    (ended,) = engine.said["finished"]
    assert ended["stages"] == {"prefill": "met", "thinking": "met", "answer": "met"}


def test_the_next_round_of_a_tool_session_is_promised_with_its_cached_prefix_in_mind(engine) -> None:
    seen: dict[str, int] = {}
    plan = engine.slo.planner.plan

    def look(state: Any) -> Any:
        made = plan(state)
        table = state.requests
        for verdict in made.verdicts:
            seen[verdict.request_id] = int(table.rows["num_cached_tokens"][table.index(verdict.request_id)])
        return made

    engine.slo.planner.plan = look
    try:
        args = {"slo_class": "tool", "slo_stage": "loop", **RELAXED}
        first = "You may call tools. " * 40 + "What is the weather?"
        (answer,) = engine.generate([first], params(args))
        history = first + answer.outputs[0].text + " Tool says: sunny. "
        engine.generate([history], params({**args, "slo_stage": "final"}))
        (cached,) = list(seen.values())[1:]
    finally:
        engine.slo.planner.plan = plan
    assert cached >= 150
    assert [one["promised"] for one in engine.said["finished"]] == [True]


def test_every_feature_gives_the_same_output_observed_and_enforced(engine) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    prompts = [STORY, "Is water wet? Answer:", "Count: one, two,", "The sea is", "List three fruits:", "Rain falls on"]
    wishes = (
        params(RELAXED, ignore_eos=True),
        params(RELAXED, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])),
        params(RELAXED, stop=["five"], max_tokens=40),
        params({"slo_class": "chat"}, logprobs=3, prompt_logprobs=2),
        params({"slo_ttft_ms": 1, "slo_tpot_ms": 1}, n=3, temperature=0.7, seed=3),
        params(max_tokens=1),
    )
    engine.slo.housekeeper.set_mode("observe")
    observed = engine.generate(prompts, *wishes)
    assert {one["reason"] for one in engine.said["verdicts"]} == {"observe", "requested"}
    engine.slo.housekeeper.set_mode("enforce")
    enforced = engine.generate(prompts, *wishes)
    assert [ids(output) for output in enforced] == [ids(output) for output in observed]
    assert enforced[1].outputs[0].text in {"yes", "no"}
    assert enforced[3].prompt_logprobs[-1]
    assert len(enforced[4].outputs) == 3
    assert len(engine.said["finished"]) == 8
    assert "promised" in {one["verdict"] for one in engine.said["verdicts"]}


def test_the_prefix_cache_can_be_reset_between_requests(engine) -> None:
    (before,) = engine.generate([STORY], params(RELAXED))
    assert engine.llm.llm_engine.reset_prefix_cache()
    (after,) = engine.generate([STORY], params(RELAXED))
    assert ids(after) == ids(before)


# -- speculation ------------------------------------------------------------------------------------

SPECULATION = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3},
    "draft model": {"method": "draft_model", "num_speculative_tokens": 3},  # the model drafts for itself
}
ECHOES = ["Repeat: red green blue red green blue red green", "a b c d a b c d a b c d", STORY, "one two one two one"]
ASKED = ({"slo_class": "chat"}, {"slo_class": "coding"}, None, {"slo_ttft_ms": 900, "slo_tpot_ms": 400})


@pytest.fixture(scope="module")
def greedy(engine) -> list[Any]:
    """What the engine says without speculation."""
    return [ids(output) for output in engine.generate(ECHOES, *[params(ignore_eos=True, max_tokens=60)] * 4)]


@pytest.fixture(scope="module", params=SPECULATION)
def drafting(request, greedy, model, profile):
    speculation = dict(SPECULATION[request.param])
    if speculation["method"] == "draft_model":
        speculation["model"] = model
    steered = Steered(model, profile, speculative_config=speculation)
    yield steered
    assert steered.slo.snapshot()["planner_faults"] == {}
    steered.close()


def echo(engine: Steered) -> list[Any]:
    return [
        ids(output)
        for output in engine.generate(ECHOES, *[params(args, ignore_eos=True, max_tokens=60) for args in ASKED])
    ]


def test_speculation_planned_by_class_changes_no_output_and_is_measured_by_class(drafting, greedy) -> None:
    from slos_serve.core.baselines import EdfPlanner

    assert echo(drafting) == greedy  # where drafts do not pay on this machine, none are made
    own, drafting.slo.planner = drafting.slo.planner, EdfPlanner(draft_length=3)
    assert echo(drafting) == greedy
    drafting.slo.planner = own
    snapshot = drafting.slo.snapshot()
    assert set(snapshot["acceptance"]) >= {"chat", "coding"}
    assert all(0 <= share <= 1 for share in snapshot["acceptance"].values())


def test_drafts_that_were_given_up_and_taken_up_again_are_no_stale_ones(drafting, greedy) -> None:
    from slos_serve.core.baselines import EdfPlanner

    class InTurns:
        """Draft for eight steps, for eight not at all."""

        def __init__(self) -> None:
            self.planners = [EdfPlanner(draft_length=3), EdfPlanner(draft_length=0)]
            self.steps = 0

        def plan(self, state: Any) -> Any:
            self.steps += 1
            return self.planners[self.steps // 8 % 2].plan(state)

    own, drafting.slo.planner = drafting.slo.planner, InTurns()
    lengths: list[int] = []
    schedule = drafting.scheduler.schedule

    def note(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        lengths.append(sum(map(len, output.scheduled_spec_decode_tokens.values())))
        return output

    drafting.scheduler.schedule = note
    try:
        assert echo(drafting) == greedy
    finally:
        drafting.slo.planner = own
        del drafting.scheduler.schedule
    assert 0 in lengths[8:]
    assert max(lengths) > 0
