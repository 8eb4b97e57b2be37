"""Real vLLM behind two API servers, of one engine or of two: whichever is asked, it says the same."""

import concurrent.futures
import contextlib

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.emulated.small import serve_small_device
from tests.servers import is_healthy, running, wait_for, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
WAYS = {"one engine": ["--api-server-count", "2"], "two engines": ["--data-parallel-size", "2"]}
KV_TOKENS, BLOCK_SIZE = 4096, 16
PROMISED = {"ttft_ms": 5000, "tpot_ms": 200}


@pytest.fixture(scope="module", params=WAYS)
def servers(request, tmp_path_factory):
    """Return a client of each API server, which keeps its connection and so its server."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("several")
    command, port = serve_small_device(folder, kv_tokens=KV_TOKENS, output_tokens=8)
    log, url = folder / "server.log", f"http://127.0.0.1:{port}"
    keep = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"}
    with (
        running([*command, *WAYS[request.param]], log, environment=keep) as process,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
        contextlib.ExitStack() as stack,
    ):
        wait_until(lambda: is_healthy(client), process, log, patience_s=400)
        clients = one_client_each(url, process, 2)
        for one in clients:
            stack.callback(one.close)
        yield clients


def one_client_each(url, process, count):
    found = {}
    for _ in range(200):
        client = httpx.Client(base_url=url, timeout=120, trust_env=False, limits=httpx.Limits(max_connections=1))
        server = served_by(client, process)
        if found.setdefault(server, client) is not client:
            client.close()
        if len(found) == count:
            return list(found.values())
    pytest.fail(f"200 connections came to {len(found)} of {count} servers")


def served_by(client, process):
    """Return the process that holds the other end of a client's connection."""
    import psutil

    stream = client.get("/livez").extensions["network_stream"]
    port = stream.get_extra_info("client_addr")[1]
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(one.raddr and one.raddr.port == port for one in child.net_connections("tcp")):
                return child.pid
    return pytest.fail("nobody holds the connection")


def ask_all(servers, name, **body):
    """Ask each server four things, the servers at once; return the answers by the ids that the client gave."""

    def four(number):
        return {f"{name}-{number}-{one}": ask(servers[number], f"{name}-{number}-{one}", **body) for one in range(4)}

    with concurrent.futures.ThreadPoolExecutor(len(servers)) as pool:
        return {given: answer for part in pool.map(four, range(len(servers))) for given, answer in part.items()}


def ask(client, name, **body):
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 5, "ignore_eos": True, "slo": PROMISED, **body}
    answer = client.post("/v1/completions", json=body, headers={"x-request-id": name})
    assert answer.status_code == 200, answer.text
    return answer.json()


def get(client, page):
    return client.get(f"/v1/slo/{page}").json()


def counted(client):
    """Return the counters of ours that a server shows."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    ours = [one for one in families if one.name.startswith("slos_serve_") and one.type in {"counter", "histogram"}]
    return {(one.name, *sorted(one.labels.items())): one.value for family in ours for one in family.samples}


def test_every_server_tells_the_same_of_every_request_by_any_of_its_ids(servers):
    for given, answer in ask_all(servers, "told").items():
        assert (answer["slo"]["verdict"], answer["slo"]["outcome"]) == ("promised", "met")
        for name in (given, answer["id"], answer["slo"]["id"]):
            wait_for(lambda name=name: all(get(client, f"requests/{name}").get("outcome") for client in servers))
            one, other = (get(client, f"requests/{name}") for client in servers)
            assert one["id"] == other["id"] == answer["slo"]["id"]
            same = ("class", "tenant", "verdict", "reason", "outcome", "promise", "stages", "ttft_ms", "tpot_ms")
            assert {key: one[key] for key in same} == {key: other[key] for key in same}
            # elsewhere its time is the one that the engine was told: less what tokens take on their way
            assert other["arrival_s"] == pytest.approx(one["arrival_s"], abs=0.2)
            due = [record["deadlines"]["first_token_s"] - record["arrival_s"] for record in (one, other)]
            assert due == pytest.approx([PROMISED["ttft_ms"] / 1000] * 2, abs=2e-3)


def test_the_live_page_lists_all_requests_whichever_server_it_came_from(servers):
    ids = {answer["slo"]["id"] for answer in ask_all(servers, "listed").values()}

    def listed(client):
        return {row["id"]: row["state"] for row in get(client, "live")["requests"] if row["id"] in ids}

    wait_for(lambda: all(listed(client) == dict.fromkeys(ids, "met") for client in servers))
    wait_for(lambda: get(servers[0], "live")["totals"] == get(servers[1], "live")["totals"])


def test_metrics_of_any_server_count_every_request_once(servers):
    before = counted(servers[0])
    answers = ask_all(servers, "counted")
    kept = ("slos_serve_promises_total", ("class", "custom"), ("result", "kept"))
    wait_for(lambda: counted(servers[0])[kept] - before[kept] >= len(answers))
    wait_for(lambda: counted(servers[0]) == counted(servers[1]))
    after = counted(servers[1])
    assert after[kept] - before[kept] == len(answers)
    promised = ("slos_serve_verdicts_total", ("class", "custom"), ("reason", ""), ("verdict", "promised"))
    assert after[promised] - before[promised] == len(answers)


def test_what_one_server_is_told_of_the_mode_holds_for_all(servers):
    for asked, teller, verdict in (("observe", 0, "best-effort"), ("enforce", 1, "promised")):
        assert servers[teller].post("/v1/slo/mode", json={"mode": asked}).status_code == 200
        wait_for(lambda asked=asked: [get(one, "status")["effective_mode"] for one in servers] == [asked] * 2)
        assert [ask(client, asked)["slo"]["verdict"] for client in servers] == [verdict] * 2


def test_every_server_knows_all_engines(servers, request):
    num_engines = {"one engine": 1, "two engines": 2}[request.node.callspec.params["servers"]]
    one, other = (get(client, "status")["snapshot"] for client in servers)
    assert (
        one["num_kv_blocks"] == other["num_kv_blocks"] == num_engines * (KV_TOKENS // BLOCK_SIZE - 1)
    )  # one block is vLLM's own
