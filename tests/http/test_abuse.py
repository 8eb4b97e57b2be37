"""Ten thousand hostile requests beside promised ones, over sockets: the promised do not notice, and nothing grows."""

import asyncio
import importlib.util
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from slos_serve.config import SloConfig
from slos_serve.http.hub import MAX_RECORDS
from slos_serve.http.middleware import SloMiddleware

uvicorn = pytest.importorskip("uvicorn")
pytestmark = pytest.mark.abuse

NUM_REQUESTS = 10_000
LIMIT_S = 60.0  # half a minute of a busy core
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "abuse.py"


@pytest.fixture(scope="module")
def hostile():
    spec = importlib.util.spec_from_file_location("abuse", SCRIPT)
    module = sys.modules["abuse"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def port(vllm, hub, say):
    """Serve on a loopback port, with an engine that promises and keeps whatever it can read."""
    hub.configure(slo={"config": SloConfig(max_body_bytes=1 << 20).to_json()}, model="m")
    hub.controls.append(lambda order: pytest.fail("somebody switched the mode"))
    hub.feed({"snapshot": {"effective_mode": "enforce", "mode": "enforce"}})

    def on_request(xargs):
        if "slo_id" in xargs:
            verdict, end = say.verdict(xargs["slo_id"]), say.finished(xargs["slo_id"], tenant="")
            hub.feed({"verdicts": [verdict], "finished": [end], "snapshot": {"effective_mode": "enforce"}})

    vllm.on_request = on_request
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(SloMiddleware(vllm.app(), hub), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()[1]
    server.should_exit = server.force_exit = True
    thread.join(30)
    listening.close()


def test_promised_requests_do_not_notice_hostile_ones(hostile, port, hub, registry, vllm):
    vllm.seen = Forgetful()
    vllm.headers = Forgetful()
    target = hostile.Target("127.0.0.1", port)
    found = asyncio.run(
        hostile.run(
            target,
            num_requests=NUM_REQUESTS,
            seed=1,
            slo={"ttft_ms": 400, "tpot_ms": 50},
            max_tokens=4,
            alone_s=1.0,
            size=2 << 20,
            limit_s=LIMIT_S,
        )
    )
    for name in ("alone", "beside"):
        counts = dict(found[name])
        assert counts.pop("offered") > 0
        assert list(counts) == ["promised, met"]
    assert set(found["abuse"]) == {*hostile.KINDS, "slow senders", "oversized bodies"}
    statuses = {status for counts in found["abuse"].values() for status in counts}
    assert not {status for status in statuses if status.startswith("5")} | (statuses & {"no answer"})
    assert found["abuse"]["oversized bodies"] == {"413": 3}
    assert hub.num_waiting == 0
    assert len(hub._records) <= MAX_RECORDS
    assert len(hub._records._aliases) <= 16 * MAX_RECORDS
    assert hub.num_malformed == 0
    series = [sample for metric in registry.collect() for sample in metric.samples]
    assert len(series) < 1000
    assert {sample.labels.get("tenant", "") for sample in series} == {""}


class Forgetful(list):
    """A list that keeps nothing, however much it is given."""

    def append(self, item):
        pass
