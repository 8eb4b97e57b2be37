"""The live page: who may open it, that it runs nothing foreign, and what a browser shows of a server."""

import re
import socket
import threading
import time

import pytest
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tests.http.browser import browser, chromium

from slos_serve.config import ApiKey, SloConfig
from slos_serve.http.live import document, served_policy
from slos_serve.http.middleware import SloMiddleware
from slos_serve.http.slo import Operator

SNAPSHOT = {
    "mode": "enforce",
    "effective_mode": "enforce",
    "class_modes": {},
    "reason": "",
    "profile": {"key": "k"},
    "num_promised": 7,
    "num_best_effort": 3,
    "num_pending": 1,
    "num_waiting": 2,
    "steps": 42,
    "margin_coverage": 0.97,
    "model_error": {"mape": 0.03},
    "planner_faults": {"plan": 2},
}


def test_the_page_is_open_where_pages_are_and_nowhere_with_pages_off(client, hub):
    answer = client.get("/slo")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert client.get("/slo/").text == answer.text
    assert client.post("/slo").status_code == 404
    hub.operator = Operator(SloConfig(pages="off"))
    assert client.get("/slo").status_code == 404


def test_where_pages_are_the_operators_the_page_opens_without_data_and_its_questions_are_refused(client, hub):
    key = ApiKey(key_sha256="a" * 64, admin=True)
    hub.operator = Operator(SloConfig(pages="admin", api_keys={"ops": key}))
    hub.feed({"snapshot": SNAPSHOT})
    assert client.get("/slo").status_code == 200
    assert client.get("/v1/slo/status").status_code == 404


def test_the_page_names_no_other_host_and_lets_its_own_script_alone_run():
    assert not re.findall(r"(?:src|href)=\"(?!data:,\")", document())
    assert not re.sub(r"http://www\.w3\.org/2000/svg", "", document()).count("://")
    assert "style=" not in document()
    assert "unsafe" not in served_policy()
    assert served_policy().startswith("default-src 'none'; script-src 'sha256-")


# -- in a browser ------------------------------------------------------------------------------------


@pytest.fixture
def server(hub, registry):
    """The address of a server with these pages and `/metrics`."""
    uvicorn = pytest.importorskip("uvicorn")

    async def lost(request, error):
        return JSONResponse({"error": {"message": "Not Found"}}, status_code=404)

    metrics = Route("/metrics", lambda request: Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST))
    app = Starlette(routes=[metrics], middleware=[Middleware(SloMiddleware, hub=hub)], exception_handlers={404: lost})
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
async def tab(tmp_path):
    pytest.importorskip("aiohttp")
    path = chromium() or pytest.skip("no Chromium is installed")
    async with browser(path, tmp_path) as tab:
        yield tab


def feed(hub, say, slo_id, verdict="promised", reason="", outcome="met", **more):
    hub.open(slo_id, slo_class="chat", tenant="", arrival_s=time.time())
    asked = {"ttft_ms": 400.0, "tpot_ms": 50.0}
    hub.feed({"verdicts": [say.verdict(slo_id, verdict, reason, asked=asked)]})
    hub.feed({"finished": [say.finished(slo_id, outcome, promised=verdict == "promised", **more)]})


@pytest.mark.timeout(60)
async def test_a_browser_shows_the_load_the_attainment_and_why_a_request_was_late(hub, say, server, tab):
    hub.metrics.know(hub.config)
    hub.feed({"snapshot": {**SNAPSHOT, "device": {"emulated": "h100", "description": "a device of the mind"}}})
    feed(hub, say, "good", ttft_ms=180.0)
    feed(hub, say, "late", outcome="missed", ttft_ms=612.0, stages={"prefill": "missed", "answer": "met"})
    feed(hub, say, "busy", "best-effort", "compute", "declined")
    await tab.open(f"{server}/slo")
    await tab.until("document.querySelectorAll('#list details').length === 2")
    text = await tab.value("document.body.innerText")
    assert "Enforcing: plans are carried out." in text
    assert "(h100: a device of the mind)" in text
    assert "33.3 % of 3" in text
    assert "50.0 %, 1 broken" in text
    assert "97.0 %" in text

    assert await tab.value("[...document.querySelectorAll('summary')].map(one => one.textContent)[1].slice(0, 16)") == (
        "✗ broken promise"
    )
    await tab.value("document.querySelectorAll('summary')[1].focus()")
    await tab.press("Enter", 13)
    await tab.until("document.querySelectorAll('details')[1].children.length > 3")
    story = await tab.value("document.querySelectorAll('details')[1].innerText")
    assert "promised within 400 ms" in story
    assert "came after 612 ms, 212 ms late" in story
    assert "Late in: prefill." in story
    assert await tab.value("document.querySelectorAll('details')[1].querySelector('svg.tokens title').textContent") == (
        "first token after 612 ms, due after 400 ms"
    )

    feed(hub, say, "newer", "best-effort", "too-tight", "declined")
    await tab.until("document.querySelectorAll('#list details').length === 3")
    assert await tab.value("document.querySelectorAll('details')[2].open"), "what was opened stays open"
    assert await tab.value("document.activeElement.textContent.startsWith('✗ broken')"), "and keeps the focus"
    assert not tab.errors


@pytest.mark.timeout(60)
async def test_what_clients_say_is_shown_as_text(hub, say, server, tab):
    name = "<img src=x onerror=alert(1)>"
    hub.open("evil", slo_class="chat", tenant="", shown_tenant=name, arrival_s=time.time())
    hub.feed({"verdicts": [say.verdict("evil", "best-effort", "compute")]})
    await tab.open(f"{server}/slo")
    await tab.until("document.querySelectorAll('#list details').length === 1")
    assert name in await tab.value("document.querySelector('summary').textContent")
    assert await tab.value("document.images.length") == 0
    assert not tab.errors


@pytest.mark.timeout(60)
async def test_a_phone_reads_the_page_without_scrolling_sideways(hub, say, server, tab):
    hub.feed({"snapshot": SNAPSHOT})
    feed(hub, say, "a" * 32, "best-effort", "compute", "declined")
    await tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    await tab.open(f"{server}/slo")
    await tab.until("document.querySelectorAll('#list details').length === 1")
    await tab.value("document.querySelector('details').open = true")
    assert await tab.value("document.documentElement.scrollWidth") <= 360


@pytest.mark.timeout(60)
async def test_a_page_for_operators_asks_for_a_key(hub, server, tab):
    hub.operator = Operator(SloConfig(pages="admin", api_keys={"ops": ApiKey(key_sha256="a" * 64, admin=True)}))
    await tab.open(f"{server}/slo")
    await tab.until("!document.getElementById('ask').hidden")
    assert "keys of its own" in await tab.value("document.getElementById('problem').textContent")


@pytest.mark.timeout(60)
async def test_a_server_that_is_away_is_told_and_what_is_shown_goes_on_when_it_is_back(hub, server, tab):
    hub.feed({"snapshot": SNAPSHOT})
    promised = "document.querySelectorAll('#tiles b')[2]"
    away = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    await tab.open(f"{server}/slo")
    await tab.until("document.querySelector('#tiles b') !== null")
    await tab.call("Network.enable")
    await tab.call("Network.emulateNetworkConditions", offline=True, **away)
    await tab.until("document.getElementById('problem').textContent.includes('does not answer')")
    assert await tab.value(f"{promised}.textContent") == "7"
    hub.feed({"snapshot": {**SNAPSHOT, "num_promised": 9}})
    await tab.call("Network.emulateNetworkConditions", offline=False, **away)
    await tab.until(f"{promised}.textContent === '9'")
    assert await tab.value("document.getElementById('problem').hidden")
