from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from slos_serve.bench.compare import best_setting, load_run, pooled, save_run
from slos_serve.bench.demo import DemoResult, Options, read_overhead, systems_of, write_report
from slos_serve.bench.scaled import Scaled
from slos_serve.bench.study import (
    StudyOptions,
    as_text,
    bootstrap_interval,
    compare_at,
    first_rate_below,
    saved_runs,
    summarise,
    verdict,
    write_study,
)
from slos_serve.cache import write_json
from slos_serve.emulated.emulation import parse
from slos_serve.records.profile import Profile


def part(met, offered, promised=0):
    return {
        "num_requests": offered, "met": met, "missed": offered - met, "declined": 0, "rejected": 0, "failed": 0,
        "cancelled": 0, "promised": promised, "kept": promised, "attainment": met / offered, "goodput_rps": met / 10,
        "ttft_s": {"p50": 0.1, "p90": 0.2, "p99": 0.3}, "tpot_s": {"p50": 0.02, "p90": 0.03, "p99": None},
    }  # fmt: skip


def request_rows(late_s):
    base = {"slo": {"ttft_s": 1.0, "tpot_s": 0.1}, "ttft_s": 0.4, "lateness_s": late_s, "outcome": "met"}
    return [{**base, "sent_s": float(i), "outcome": "declined" if i == 3 else "met"} for i in range(5)]


def run(system, budget, rate, seed, met, offered=100):
    ours = system == "slos-serve"
    entry = {"system": system, "rate_rps": rate, **part(met, offered, met if ours else 0)}
    entry["by_class"] = {"chat": part(met, offered, met if ours else 0)}
    return {
        "schema": "slos-serve-run/1", "setting": f"{system}-{budget}", "system": system, "budget": budget,
        "rate_rps": rate, "duration_s": 40.0, "seed": seed, "entry": entry, "max_lag_s": 0.01, "errors": [],
        "requests": request_rows(-0.1),
    }  # fmt: skip


@pytest.fixture
def runs():
    found = []
    for seed in range(6):
        found += [run("slos-serve", 512, rate, seed, 95) for rate in (1.0, 2.0)]
        found += [run("vllm", 2048, 1.0, seed, 92), run("vllm", 208, 1.0, seed, 93 + seed % 2)]
        found += [run("vllm", 2048, 2.0, seed, 60 + seed), run("vllm", 208, 2.0, seed, 50)]
    return found


def test_the_opponent_is_the_setting_that_did_best_over_all_seeds(runs):
    assert best_setting(r for r in runs if r["system"] == "vllm" and r["rate_rps"] == 2.0) == "vllm-2048"
    with pytest.raises(ValueError, match="no runs"):
        best_setting([])


def test_a_comparison_is_paired_and_has_an_interval(runs):
    found = compare_at(runs, 2.0, np.random.default_rng(0))
    assert found["best_setting"] == "vllm-2048"
    assert found["num_seeds"] == 6
    assert found["difference"] == pytest.approx(0.95 - 0.625)
    assert found["low"] < found["difference"] < found["high"]
    assert found["by_class"]["slos-serve"]["chat"]["kept"] == 570


def test_only_seeds_that_every_setting_has_run_count(runs):
    incomplete = [r for r in runs if not (r["setting"] == "vllm-208" and r["seed"] > 1)]
    assert compare_at(incomplete, 2.0, np.random.default_rng(0))["num_seeds"] == 2
    assert compare_at([r for r in runs if r["system"] == "vllm"], 2.0, np.random.default_rng(0)) is None


def test_the_claim_is_made_at_the_first_rate_that_stock_does_not_hold(runs):
    found = summarise(runs)
    assert [c["rate_rps"] for c in found] == [1.0, 2.0]
    assert first_rate_below(found)["rate_rps"] == 2.0
    assert "At 2.00 requests/s" in verdict(found)
    assert "no claim" in verdict(found[:1])


def test_equal_systems_have_an_interval_around_zero():
    rng = np.random.default_rng(1)
    rows = np.column_stack([rng.integers(40, 60, 12), np.full(12, 100)]).astype(float)
    other = np.column_stack([rng.integers(40, 60, 12), np.full(12, 100)]).astype(float)
    low, high = bootstrap_interval(rows, [other], rng)
    assert low < 0 < high


def test_choosing_the_best_of_several_opponents_costs_us():
    rng = np.random.default_rng(2)
    ours = np.column_stack([np.full(8, 70), np.full(8, 100)]).astype(float)
    weak, strong = (np.column_stack([np.full(8, met), np.full(8, 100)]).astype(float) for met in (40, 65))
    assert bootstrap_interval(ours, [weak, strong], rng) == pytest.approx((0.05, 0.05))


def test_an_interrupted_study_goes_on_from_what_is_saved(runs, tmp_path):
    for one in runs[:3]:
        save_run(one, tmp_path / "runs")
    (tmp_path / "runs" / "half-written.json").write_text('{"schema":')
    (tmp_path / "runs" / "another.json").write_text('{"schema": "something else"}')
    assert len(saved_runs(tmp_path)) == 3
    assert load_run(tmp_path / "absent.json") is None


def test_counts_are_pooled_by_class(runs):
    counts = pooled(runs[:2])
    assert counts[""] == {"offered": 200, "met": 190, "promised": 190, "kept": 190}
    assert counts["chat"] == counts[""]


@pytest.fixture
def profile(true_model):
    document = {"schema": "slos-serve-profile/1", "perf_model": true_model.to_json(), "max_num_batched_tokens": 512}
    return document | {
        "r2": 0.99,
        "mape_heldout": 0.05,
        "margin_coverage": 0.95,
        "num_steps": 100,
        "terms": ["fixed_s"],
    }


def test_the_study_is_written_as_json_and_as_a_page(runs, tmp_path, profile, monkeypatch):
    monkeypatch.setattr("slos_serve.bench.study.describe_engine", lambda model, _: {"vllm": "x", "model": model})
    write_json(profile, tmp_path / "profile.json")
    found = write_study(runs, StudyOptions(model="m", out=tmp_path))
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["num_runs"] == len(runs)
    assert len(document["comparisons"]) == len(found) == 2
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "difference.png").exists()
    assert "vLLM" in as_text(found)


def test_the_demo_compares_with_the_better_budget_at_each_rate(runs):
    chosen, best = systems_of([r for r in runs if r["seed"] == 0])
    assert best == {1.0: "vllm-208", 2.0: "vllm-2048"}
    assert [r["setting"] for r in chosen["vllm"]] == ["vllm-208", "vllm-2048"]


def test_the_demo_writes_its_report(runs, tmp_path, profile):
    scaled = Scaled(profile=Profile.from_json(profile, where="here"))
    outcome = DemoResult(
        scaled=scaled,
        rates_rps=[1.0, 2.0],
        runs=[r for r in runs if r["seed"] == 0],
        engine={"vllm": "0.29.0", "model": "small", "device": "CPU"},
        overhead={"stock_p50": 3e-4, "ours_p50": 8e-4},
        status={"effective_mode": "enforce", "snapshot": {"plan_s": {"p50": 1e-3, "p99": 2e-3}}},
    )
    write_report(outcome, Options(model="small", out=tmp_path))
    document = json.loads((tmp_path / "report.json").read_text())
    assert {"engine", "profile", "workload", "systems", "step_overhead_s"} <= set(document)
    assert [entry["rate_rps"] for entry in document["systems"]["slos-serve"]] == [1.0, 2.0]
    assert [entry["rate_rps"] for entry in document["systems"]["vllm"]] == [1.0, 2.0]
    for name in ("report.html", "attainment.png", "timeline.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert Path(tmp_path / "report.html").read_text().count("<svg") == 2


def test_the_demos_page_of_an_emulated_device_says_so_in_its_heading_and_before_any_number(runs, tmp_path, profile):
    scaled = Scaled(profile=Profile.from_json(profile, where="here"))
    engine = {"vllm": "0.29.0", "model": "small", "device": "emulated h100-8b-derived"}
    outcome = DemoResult(
        scaled=scaled,
        rates_rps=[1.0, 2.0],
        runs=[r for r in runs if r["seed"] == 0],
        engine=engine | parse("h100-8b-derived").describe(),
        overhead={"stock_p50": None, "ours_p50": None},
    )
    write_report(outcome, Options(model="small", out=tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "on an emulated device</h1>" in page
    assert page.index("nothing measured here is a claim about a GPU") < page.index('class="lead"')


def test_the_studys_page_of_an_emulated_device_says_so_too(runs, tmp_path, profile, monkeypatch):
    monkeypatch.setattr("slos_serve.bench.study.describe_engine", lambda model, _: {"vllm": "x", "model": model})
    write_json(profile | {"key": {"hardware": "emulated h100 #1"}}, tmp_path / "profile.json")
    write_study(runs, StudyOptions(model="m", out=tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "on an emulated device</h1>" in page
    assert "EMULATED" in page


def test_the_step_overhead_is_that_of_equal_batches():
    steady = {"case": "steady", "stock": {"p50": 300.0}, "enforce": {"p50": 470.0}}
    churn = {"case": "churn", "stock": {"p50": 260.0}, "enforce": {"p50": 900.0}}
    assert read_overhead({"rows": [churn, steady]}) == pytest.approx({"stock_p50": 3e-4, "ours_p50": 4.7e-4})
