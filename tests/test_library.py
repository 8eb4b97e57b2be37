"""The front door: what `import slos_serve` offers, and planners and routers of one's own everywhere."""

import ast
import importlib
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest

import slos_serve
from slos_serve import cli, named
from slos_serve.errors import ConfigError
from slos_serve.library import windows_of, workload_of
from slos_serve.sim.capacity.runs import Cell

MINE = """
import numpy as np
from slos_serve import BatchPlan, LeastLoad, Plan, Verdict

class Fcfs:
    def __init__(self, width: int = 4):
        self.width = width

    def plan(self, state):
        ids = state.requests.request_ids[: self.width]
        rows = state.requests.rows[: self.width]
        left = rows["num_prompt_tokens"] + rows["num_output_tokens"] - rows["num_computed_tokens"]
        return Plan(batch=BatchPlan(request_ids=ids, num_tokens=left, draft_lengths=np.zeros(len(ids), np.int64)))

class SaysNo(Fcfs):
    makes_promises = True

    def plan(self, state):
        table = state.requests
        undecided = [name for name in table.request_ids if not table.rows["tier"][table.index(name)]]
        no = tuple(Verdict(request_id=name, promised=False, reason="compute") for name in undecided)
        return Plan(batch=super().plan(state).batch, verdicts=no)

class Silent(SaysNo):
    makes_promises = False

class Last(LeastLoad):
    def rank(self, arrival, replica_ids, now_s):
        route = super().rank(arrival, replica_ids, now_s)
        choices = sorted(route.choices, key=lambda choice: choice.replica_id, reverse=True)
        return type(route)(choices=tuple(choices), reason="mine")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Give a module of somebody's own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(MINE)
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)


def test_the_package_offers_what_it_says_and_no_more():
    tree = ast.parse(inspect.getsource(slos_serve))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in checked.body for alias in node.names}
    homes = {name: f"slos_serve.{module}" for module, names in slos_serve._HOMES.items() for name in names}
    assert typed == homes
    assert sorted([*homes, "__version__"]) == sorted(slos_serve.__all__)
    for name, module in homes.items():
        assert getattr(slos_serve, name) is getattr(importlib.import_module(module), name)
    assert set(slos_serve.__all__) <= set(dir(slos_serve))
    with pytest.raises(AttributeError, match="nothing_such"):
        slos_serve.nothing_such  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, slos_serve; sys.exit(', '.join({'numpy', 'numba', 'yaml', 'scipy'} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_planner_class_its_name_and_an_instance_give_the_same_run(mine):
    fcfs = named.find_class("mine:Fcfs", where="test", key="planner")
    runs = [
        slos_serve.simulate(planner, slos_serve.SMALL_TRACE, rate_rps=3.0, max_requests=30)
        for planner in (fcfs, fcfs(), "mine:Fcfs")
    ]
    assert runs[0].graded == runs[1].graded == runs[2].graded
    wider = slos_serve.simulate(
        "mine:Fcfs", slos_serve.SMALL_TRACE, rate_rps=3.0, max_requests=30, settings={"width": 9}
    )
    assert wider.graded != runs[0].graded


def test_whether_a_planner_promises_is_said_by_the_planner(mine):
    run = slos_serve.simulate("mine:SaysNo", slos_serve.SMALL_TRACE, rate_rps=3.0, max_requests=20)
    assert {grade.outcome for grade in run.graded} == {"declined"}
    assert run.attainment == 0.0


def test_a_planner_that_gives_verdicts_without_saying_so_is_refused(mine):
    with pytest.raises(ConfigError, match=r"Silent\.makes_promises"):
        slos_serve.simulate("mine:Silent", slos_serve.SMALL_TRACE, rate_rps=3.0, max_requests=20)


def test_the_verbs_run_a_planner_and_a_router_of_ones_own(mine, capsys):
    arguments = ["--rate", "6", "--replicas", "2", "--trace", f"{slos_serve.SMALL_TRACE}@0:40", "--json"]
    assert cli.main(["simulate", "--system", "mine:Fcfs", "--router", "mine:Last", *arguments]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert (entry["system"], entry["router"]) == ("mine:Fcfs", "mine:Last")


def test_capacity_searches_with_a_planner_of_ones_own_in_other_processes(mine, tmp_path, capsys):
    command = ["capacity", "--systems", "mine:Fcfs", "--scenarios", "chatbot", "--hardware", "measured", "--quick"]
    command += ["--windows", "1", "--requests", "15", "--jobs", "2", "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)["hardware"]["measured"]["scenarios"]["chatbot"]["capacity_rps"]
    assert found["mine:Fcfs"] > 0


def test_a_run_is_known_by_what_is_in_the_module_of_a_planner_of_ones_own(mine):
    values = {"scenario": "chatbot", "hardware": "a100-80g-7b-measured", "part": "report", "window": 0, "rate_rps": 1.0}
    cell = Cell(system="mine:Fcfs", data=str(mine.parent), **values)
    before = cell.key()
    mine.write_text(MINE.replace("width: int = 4", "width: int = 5"))
    assert cell.key() != before
    assert (
        Cell(system="vllm", data=str(mine.parent), **values).key()
        == Cell(system="vllm", data=str(mine.parent), **values).key()
    )


@pytest.mark.parametrize("name", ["mine:Nothing", "nothing:Fcfs", "mine:", ":Fcfs"])
@pytest.mark.parametrize("flag", ["--system", "--router"])
def test_a_class_that_cannot_be_imported_is_one_line(mine, capsys, flag, name):
    assert cli.main(["simulate", flag, name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert name in said
    assert "package.module:Class" in said


def test_the_capacity_of_a_trace_lies_between_the_rates_that_pass_and_fail():
    trace = slos_serve.Trace.build(
        arrived_at_s=[0.5 * i for i in range(30)], prompt_tokens=[400] * 30, output_tokens=[50] * 30
    )
    found = slos_serve.capacity("vllm", trace)
    passing = [rate for rate, share in found.attainment.items() if share >= 0.9]
    failing = [rate for rate, share in found.attainment.items() if share < 0.9]
    assert max(passing) <= found.rate_rps <= min(failing)
    assert found.low_rps == pytest.approx(found.high_rps)


def test_each_window_of_a_capacity_is_offered_the_rate_that_is_said():
    trace = slos_serve.Trace.build(
        arrived_at_s=[0.5 * i for i in range(60)], prompt_tokens=[400] * 60, output_tokens=[50] * 60
    )
    parts = windows_of(trace, 3)
    assert [len(part) for part in parts] == [20, 20, 20]
    assert [part.rate_rps for part in parts] == pytest.approx([2.0, 2.0, 2.0])
    assert [part.arrived_at_s[0] for part in parts] == [0.0, 0.0, 0.0]
    offered = workload_of(parts[1], slos_serve.load_hardware("a100-80g-7b-measured"), rate_rps=8.0)
    times = [sim.request.arrival_s for sim in offered.arrivals]
    assert np.diff(times) == pytest.approx(1 / 8.0)


def test_windows_of_even_traffic_have_the_capacity_of_the_whole():
    trace = slos_serve.Trace.build(
        arrived_at_s=[0.5 * i for i in range(80)], prompt_tokens=[400] * 80, output_tokens=[50] * 80
    )
    whole, halves = (slos_serve.capacity("vllm", trace, windows=count).rate_rps for count in (1, 2))
    assert halves == pytest.approx(whole, rel=0.3)  # shorter windows tire a queue less
