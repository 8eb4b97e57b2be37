"""`slos-serve compare`: a plan beside a measurement, what differs in kind is said, and the status tells who holds."""

import json

import pytest

from slos_serve import cli

PLAN = {
    "target_attainment": 0.9,
    "system": "slos-serve-ar",
    "best": "a100",
    "hardware": {
        "a100": {
            "workload": {"rate_rps": 4.0, "by_class": {"chat": 50, "coding": 50}},
            "replicas": 2,
            "attainment": 0.95,
            "attainment_by_class": {"chat": 0.99, "coding": 0.95},
        },
        "h100": {
            "workload": {"rate_rps": 4.0, "by_class": {"chat": 50, "coding": 50}},
            "replicas": None,
            "attainment": 0.5,
        },
    },
}


def entry(chat=0.98, coding=0.93, **more):
    by_class = {"chat": {"attainment": chat, "num_requests": 50}, "coding": {"attainment": coding, "num_requests": 50}}
    return {"system": "slos-serve", "rate_rps": 4.0, "by_class": by_class, **more}


def compared(capsys, tmp_path, measured, *arguments, plan=PLAN):
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "results.json").write_text(json.dumps({"target": "http://x", "systems": {"slos-serve": [measured]}}))
    status = cli.main(["compare", str(tmp_path / "plan.json"), str(tmp_path), *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_classes_stand_side_by_side_in_eighty_columns(capsys, tmp_path):
    status, out, _ = compared(capsys, tmp_path, entry())
    assert status == 0
    assert [line.split() for line in out.splitlines()[3:5]] == [
        ["chat", "50", "99.0", "%", "98.0", "%", "-1.0"],
        ["coding", "50", "95.0", "%", "93.0", "%", "-2.0"],
    ]
    assert "holds 90.0 %" in out
    assert "note" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_deployment_that_misses_the_target_is_status_one(capsys, tmp_path):
    status, out, _ = compared(capsys, tmp_path, entry(coding=0.7), "--json")
    document = json.loads(out)
    assert (status, document["holds"], document["measured"]) == (1, False, 0.7)


def test_what_makes_the_two_different_in_kind_is_said(capsys, tmp_path):
    measured = entry(rate_rps=6.0, system="vllm")
    measured["by_class"]["chat"]["num_requests"] = 150
    _, out, _ = compared(capsys, tmp_path, measured)
    assert "planned for 4.00/s, offered 6.00/s" in out
    assert "chat is 50% of the plan, 75% of what was offered" in out
    assert "planned slos-serve-ar, measured vllm" in out


@pytest.mark.parametrize("plan", [{}, {"hardware": 1}, {"hardware": {}, "target_attainment": 0.9}])
def test_what_is_no_plan_is_told_in_one_line(capsys, tmp_path, plan):
    status, out, err = compared(capsys, tmp_path, entry(), plan=plan)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_what_is_no_measurement_and_hardware_without_a_plan_are_told_in_one_line(capsys, tmp_path):
    assert compared(capsys, tmp_path, {"rate_rps": 1})[0] == 2
    status, _, err = compared(capsys, tmp_path, entry(), "--hardware", "b200")
    assert (status, err.count("\n")) == (2, 1)
    assert "a100, h100" in err
    assert cli.main(["compare", str(tmp_path / "none"), str(tmp_path)]) == 2
