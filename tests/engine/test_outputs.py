"""The real engine: steering changes when tokens are computed, never which."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

# An engine in this process raises warnings that are not ours to mend.
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("in_process_engine")]

SYNC = "slos_serve.vllm_plugin.scheduler.SloScheduler"
TOPICS = ("rain", "bread", "the sea", "a long train journey", "maps", "honey bees", "glass", "winter")


def prompts() -> list[str]:
    shared = "You are a careful writer who answers in short sentences and never repeats a word needlessly. " * 6
    few = [f"{shared}Write about {topic}." for topic in TOPICS]
    return few + [f"Tell me something about {topic}. " * (3 * i + 1) for i, topic in enumerate(TOPICS)]


def classes() -> list[dict[str, Any] | None]:
    kinds: list[dict[str, Any] | None] = [
        {"slo_class": "chat"},
        None,
        {"slo_ttft_ms": 900, "slo_tpot_ms": 120},
        {"slo_class": "no-such-class"},
        {"slo_ttft_ms": 1, "slo_tpot_ms": 1},
    ]
    return [kinds[i % len(kinds)] for i in range(2 * len(TOPICS))]


def generate(model: str, **options: Any) -> tuple[list[tuple[int, ...]], list[Any], Any]:
    """Run all prompts at once; returns token ids, stop reasons, and the scheduler."""
    llm = vllm.LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=256 << 20,
        **options,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    if options.get("scheduler_cls"):
        time.sleep(1.0)  # the profile is picked up beside the engine's own thread
    params = [
        vllm.SamplingParams(temperature=0.0, max_tokens=20 + 2 * i, ignore_eos=True, extra_args=args)
        for i, args in enumerate(classes())
    ]
    outputs = llm.generate(prompts(), params, use_tqdm=False)
    tokens = [tuple(o.outputs[0].token_ids) for o in outputs]
    reasons = [o.outputs[0].stop_reason for o in outputs]
    llm.llm_engine.engine_core.shutdown()
    return tokens, reasons, scheduler


@pytest.fixture
def slo(tmp_path: Path) -> dict[str, Any]:
    profile = tmp_path / "profile.json"
    line = {"per_token_s": 1e-3, "per_request_s": 1e-3, "fixed_s": 40e-3}
    document = {"schema": "slos-serve-profile/1", "key": "test", "perf_model": {"lines": [line]}}
    profile.write_text(json.dumps(document))
    return {
        "mode": "enforce",
        "profile": str(profile),
        "record": str(tmp_path / "steps.jsonl"),
        "safety": {"is_enabled": False},
        "fault_dir": str(tmp_path),
    }


@pytest.fixture(scope="module")
def stock(model: str) -> list[tuple[int, ...]]:
    tokens, reasons, _ = generate(model)
    assert set(reasons) == {None}
    return tokens


def test_greedy_outputs_equal_those_of_stock_vllm(model: str, stock, slo, tmp_path: Path) -> None:
    steered, reasons, scheduler = generate(model, scheduler_cls=SYNC, additional_config={"slo": slo})
    snapshot = scheduler.slo.snapshot()
    assert snapshot["effective_mode"] == "enforce"
    assert not snapshot["planner_faults"], snapshot["planner_faults"]
    assert steered == stock
    asked = [args is not None for args in classes()]
    assert [reason is not None for reason in reasons] == asked
    steps = [json.loads(text) for text in (tmp_path / "steps.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "kind" not in step]
    assert len(steps) > 20
    assert all(step["seconds"] > 0 for step in steps)


def test_greedy_outputs_with_drafts_equal_those_without(model: str, stock, slo) -> None:
    slo |= {"planner": "slos_serve.core.baselines.EdfPlanner", "planner_options": {"draft_length": 3}}
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    steered, _, scheduler = generate(
        model, scheduler_cls=SYNC, additional_config={"slo": slo}, speculative_config=drafts
    )
    snapshot = scheduler.slo.snapshot()
    assert not snapshot["planner_faults"], snapshot["planner_faults"]
    assert snapshot["acceptance"]
    assert steered == stock
