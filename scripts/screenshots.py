"""Take pictures of the live page in all its states and of the documentation site: docs/assets/slo-*.png, site-*.png.

    python scripts/screenshots.py [NAME ...]

A headless Chromium takes them. What the live page shows is made up: a server of these pages is fed what an engine would
say. No engine runs, nothing is measured. The site is built anew, its warnings are errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.http.browser import browser, chromium  # noqa: E402

from slos_serve.config import SloConfig  # noqa: E402
from slos_serve.http.hub import Hub  # noqa: E402
from slos_serve.http.metrics import SloMetrics  # noqa: E402
from slos_serve.http.middleware import SloMiddleware  # noqa: E402
from slos_serve.http.slo import Operator  # noqa: E402

ASSETS = ROOT / "docs" / "assets"
HOUR_S, STEP_S = 3600, 10
CLASSES = {"chat": (400.0, 50.0), "coding": (900.0, 100.0), "summarization": (3000.0, 120.0)}
SNAPSHOT: dict[str, Any] = {
    "mode": "enforce",
    "effective_mode": "enforce",
    "class_modes": {},
    "reason": "",
    "num_promised": 17,
    "num_best_effort": 4,
    "num_pending": 1,
    "num_running": 19,
    "num_waiting": 3,
    "free_kv_blocks": 2100,
    "num_kv_blocks": 6400,
    "headroom_tokens_per_s": 5210.0,
    "margin_coverage": 0.961,
    "plan_s": {"p50": 0.0007, "p99": 0.003},
    "clock_error_s": {"p50": 0.0004, "p99": 0.002},
    "device_time_lost": 0.006,
    "step_downs": 0,
    "planner_faults": {},
    "steps": 148230,
    "draft_lengths": {"chat": 3, "coding": 2},
    "profile": {
        "created": "2026-11-30T18:02:11+00:00",
        "r2": 0.997,
        "mape_heldout": 0.028,
        "num_steps": 1840,
        "max_num_batched_tokens": 4096,
    },
}
WHY = {
    "is_promised": False,
    "let_go": False,
    "binding": "compute",
    "later_s": 0.061,
    "fits_alone": True,
    "without": [],
    "alone_s": 0.182,
}


def load(part: float) -> float:
    """Return how busy the made-up hour is, 0 to 1, at a part of it."""
    return 0.45 + 0.25 * math.sin(9 * part) + 0.3 * math.exp(-(((part - 0.8) / 0.06) ** 2))


def hour(hub: Hub, *, mode: str = "enforce", away: tuple[float, float] = (2.0, 2.0)) -> None:
    """Fill the last hour of a server; between the parts `away` it is stepped down."""
    random.seed(7)
    now = time.time()
    for at_s in range(-HOUR_S, 0, STEP_S):
        part = 1 + at_s / HOUR_S
        busy, is_away = load(part), away[0] <= part < away[1]
        state = {
            **SNAPSHOT,
            "effective_mode": "observe" if is_away else mode,
            "draft_lengths": {"chat": 4 - round(2 * busy)},
        }
        state |= {
            "num_promised": 0 if is_away else round(26 * busy),
            "num_best_effort": round(9 * busy**3),
            "num_waiting": round(7 * busy**4),
        }
        hub.history.take_load(now + at_s, state)
        seconds = 0.018 + 0.02 * busy * random.uniform(0.85, 1.15)
        row = (seconds, seconds * random.uniform(0.95, 1.05), seconds * 1.12, int(900 * busy), int(780 * busy), 20, 30)
        hub.history.take_steps(now + at_s, [row] * int(STEP_S / seconds / 10))
        for name, (ttft, _) in CLASSES.items():
            for _ in range(int(random.expovariate(1 / (4 * busy)))):
                is_no = random.random() < (0.12 * busy**3 if not is_away else 0)
                is_late = not is_no and random.random() < (0.25 if is_away else 0.001)
                outcome = "declined" if is_no else "missed" if is_late else "met"
                end = {
                    "outcome": outcome,
                    "promised": mode == "enforce" and not (is_no or is_away),
                    "asked": {"ttft_ms": ttft},
                }
                end |= {
                    "ttft_ms": ttft * random.uniform(0.3, 0.95) * (1.6 if is_late else 1),
                    "stages": stages(is_late),
                }
                hub.history.take_end(now + at_s, name, end)


def stages(is_late: bool) -> dict[str, str]:
    """Return the stages of a request."""
    return {"prefill": "missed" if is_late else "met", "thinking": "", "answer": "met"}


def request(hub: Hub, number: int, name: str, outcome: str, ago_s: float, **more: Any) -> None:
    """Have a request served."""
    ttft, tpot = CLASSES[name]
    slo_id, count = f"{number:032x}", 120 + 40 * (number % 5)
    is_promised = outcome in {"met", "missed"}
    hub.open(slo_id, slo_class=name, tenant="", arrival_s=time.time() - ago_s)
    verdict = {"verdict": "promised" if is_promised else "best-effort", "reason": "" if is_promised else "compute"}
    told = {"slo_id": slo_id, "request_id": f"chatcmpl-{number:08x}", "slo_class": name, "tenant": ""}
    times = {"asked": {"ttft_ms": ttft, "tpot_ms": tpot}, "predicted_ttft_ms": 0.8 * ttft, "slack_ms": 0.2 * ttft}
    hub.feed({"verdicts": [{**told, **times, **verdict}]})
    came = {"met": 0.78, "missed": 1.34, "declined": 1.9}[outcome] * ttft
    points = [(round(came + tpot * n * 0.55 + 4 * tpot * math.sin(n / 40), 1), n) for n in range(9, count, 9)]
    end = {"outcome": outcome, "promised": is_promised, "stages": stages(outcome == "missed"), "ttft_ms": came}
    end |= {"tpot_ms": 0.58 * tpot, "num_prompt_tokens": 911, "num_output_tokens": count, "tokens": points}
    hub.feed({"finished": [{**told, **end, **more}]})


def requests(hub: Hub, *outcomes: str) -> None:
    """Have some requests served, the last outcome the latest."""
    for number, outcome in enumerate(outcomes):
        request(hub, number + 1, list(CLASSES)[number % 3], outcome, 4.0 * (len(outcomes) - number))


def idle(hub: Hub) -> None:
    """Show a server that has just begun."""
    nothing = dict.fromkeys(
        ("num_promised", "num_best_effort", "num_pending", "num_running", "num_waiting", "steps"), 0
    )
    full = {"free_kv_blocks": 6400, "headroom_tokens_per_s": None, "margin_coverage": None, "draft_lengths": {}}
    times = {"plan_s": {}, "clock_error_s": {}, "device_time_lost": None}
    hub.feed({"snapshot": {**SNAPSHOT, **nothing, **full, **times}})


def healthy(hub: Hub) -> None:
    """Show an hour in which almost everything was kept."""
    hour(hub)
    requests(hub, "met", "declined", "met", "missed", "met")
    hub.feed({"snapshot": SNAPSHOT})


def declined(hub: Hub) -> None:
    """Show why a request was declined."""
    hub.controls.append(lambda _: {"explanation": WHY})
    requests(hub, "met", "met", "missed", "declined")
    hub.feed({"snapshot": {**SNAPSHOT, "device": "a100-80g-7b-measured"}})


def stepped_down(hub: Hub) -> None:
    """Show a server that has given up steering by itself."""
    hour(hub, away=(0.86, 2.0))
    requests(hub, "missed", "missed")
    off = {"effective_mode": "observe", "reason": "4 of the last 40 promises were broken", "num_promised": 0}
    hub.feed({"snapshot": {**SNAPSHOT, **off, "step_downs": 1}})


def observing(hub: Hub) -> None:
    """Show a server that is asked to observe."""
    hour(hub, mode="observe", away=(0.0, 2.0))
    hub.feed({"snapshot": {**SNAPSHOT, "mode": "observe", "effective_mode": "observe", "num_promised": 0}})


def down(hub: Hub) -> None:
    """Show a server whose engine has been silent for a while."""
    hour(hub)
    hub.feed({"snapshot": SNAPSHOT})
    hub._snapshots._taken_s -= 34.0  # noqa: SLF001 - as if that had been some time ago


def cluster(hub: Hub) -> None:
    """Show replicas side by side."""
    hour(hub)
    lines = [
        {"id": f"replica-{name}", "usable": name != "d", "age_s": age, "effective_mode": "enforce", "reason": "",
         "num_promised": 4 + i, "num_best_effort": i, "num_waiting": i // 2, "num_kv_blocks": 6400,
         "free_kv_blocks": 3900 - 700 * i, "headroom_tokens_per_s": 5200.0 - 900 * i,
         "margin_coverage": 0.96 - 0.004 * i}
        for i, (name, age) in enumerate((("a", 0.3), ("b", 0.4), ("c", 0.2), ("d", 12.0)))
    ]  # fmt: skip
    hub.feed({"snapshot": {**SNAPSHOT, "replicas": lines, "profile": None}})


@contextlib.contextmanager
def served(hub: Hub) -> Iterator[str]:
    """Serve the pages of a hub; yield the address."""

    async def lost(_request: Any, _error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": "Not Found"}}, status_code=404)

    app = Starlette(middleware=[Middleware(SloMiddleware, hub=hub)], exception_handlers={404: lost})
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/slo"
        server.should_exit = server.force_exit = True
        thread.join()


def record(folder: Path) -> str:
    """Make the page of a short simulated run; return its address."""
    from slos_serve import cli  # noqa: PLC0415 - heavy

    run = ["--scenario", "coding", "--rate", "2.4", "--out", str(folder / "coding at 2.4 requests a second")]
    assert cli.main(["simulate", *run]) == 0
    assert cli.main(["show", run[-1], "--out", str(folder / "page.html")]) == 0
    return (folder / "page.html").as_uri()


STATES = {
    "light": healthy,
    "phone-dark": healthy,
    "idle": idle,
    "declined": declined,
    "stepped-down": stepped_down,
    "observe": observing,
    "down": down,
    "cluster": cluster,
}
SITE = {
    "site-light": "index.html",
    "site-dark": "concepts/planning.html",
    "site-phone": "guide/slos-and-classes.html",
    "site-phone-dark": "results.html",
}
HEIGHTS = {
    "phone-dark": 1500,
    "observe": 900,
    "down": 700,
    "stepped-down": 1000,
    "cluster": 900,
    "idle": 900,
    "record": 1500,
    **dict.fromkeys(SITE, 1400),
}


PAGE_IS_SHOWN = "document.querySelector('#mode').textContent !== '' && document.querySelector('figure, #list') !== null"
SITE_IS_SHOWN = "document.readyState === 'complete' && document.querySelector('article h1') !== null"


async def shoot(name: str, address: str, folder: Path) -> None:
    """Take one picture."""
    program = chromium() or sys.exit("no Chromium is installed")
    profile = folder / f"profile-{name}"
    profile.mkdir()
    async with browser(program, profile) as tab:
        is_phone = "phone" in name
        await tab.look(390 if is_phone else 1280 if name in SITE else 1180, 900, mobile=is_phone, dark="dark" in name)
        await tab.open(address)
        await tab.until(SITE_IS_SHOWN if name in SITE else PAGE_IS_SHOWN)
        if name in {"declined", "record"}:
            await tab.value("document.querySelector('details summary').click()")
            await tab.until("document.querySelectorAll('svg.tokens').length > 0")
        await asyncio.sleep(1.2)
        picture = await tab.picture(most_px=HEIGHTS.get(name, 2200))
        if tab.errors:
            sys.exit(f"{name}: {tab.errors}")
    path = ASSETS / f"{name if name in SITE else f'slo-{name}'}.png"
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(96).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def site(folder: Path) -> Path:
    """Build the documentation site, once; return where it is."""
    target = folder / "site"
    if not target.is_dir():
        build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(target)]
        subprocess.run(build, cwd=ROOT, check=True)
    return target


def main(names: list[str]) -> None:
    """Take the pictures of these names, all without any."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names or [*STATES, "record", *SITE]:
            if name in SITE:
                asyncio.run(shoot(name, (site(Path(folder)) / SITE[name]).as_uri(), Path(folder)))
                continue
            if name == "record":
                asyncio.run(shoot(name, record(Path(folder)), Path(folder)))
                continue
            hub = Hub(SloMetrics(CollectorRegistry()))
            hub.operator, hub.model = Operator(SloConfig()), "Qwen/Qwen3-8B"
            STATES[name](hub)
            with served(hub) as address:
                asyncio.run(shoot(name, address, Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
