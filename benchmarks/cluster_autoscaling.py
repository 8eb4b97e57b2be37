"""Replicas by headroom: from one to two under load and back to one, with the times and what became of promises."""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from typing import Any

from cluster_bed import MODEL, POLL_S, App, Bed, capacity_rps, measure, requests_of
from cluster_terminal import say

from slos_serve.bench.client import offer
from slos_serve.bench.grade import entry, grade_run

CALM, BUSY, AFTER = 0.15, 0.9, 0.05  # of what one replica can serve alone on the machine: two that start share it
CALM_S, BUSY_S, AFTER_S = 10.0, 120.0, 120.0
SCALING = {"min_replicas": 1, "initial_replicas": 1, "upscale_delay_s": 2.0, "downscale_delay_s": 15.0,
           "metrics_interval_s": 1.0, "look_back_period_s": 3.0}  # fmt: skip


class Watcher(threading.Thread):
    """Note when the number of usable replicas changes."""

    def __init__(self, app: App) -> None:
        super().__init__(daemon=True)
        self.changes: list[tuple[float, int]] = []
        self.start_s = time.perf_counter()
        self._app = app
        self._is_over = threading.Event()

    def run(self) -> None:
        """Look until told that it is over."""
        while not self._is_over.wait(POLL_S):
            found = self._app.num_usable()
            if found and (not self.changes or self.changes[-1][1] != found):
                self.changes.append((round(time.perf_counter() - self.start_s, 1), found))
                say(f"  {self.changes[-1][0]:6.1f} s: {found} replica{'s' * (found != 1)}")

    def close(self) -> None:
        """Stop looking."""
        self._is_over.set()
        self.join()


def autoscaling(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Offer little, much, and less; return one row for each part of the load."""
    scaled = measure(options)
    most = options.replicas
    capacity = capacity_rps(scaled, 1)
    busy_s = options.seconds or BUSY_S
    parts = (("calm", CALM, CALM_S), ("busy", BUSY, busy_s), ("after", AFTER, AFTER_S))
    rows = []
    with Bed(options) as bed:
        say(f"starting one replica, at most {most}")
        app = bed.deploy(scaling={**SCALING, "max_replicas": most})
        app.warm(1)
        watcher = Watcher(app)
        watcher.start()
        try:
            for name, share, seconds in parts:
                say(f"{name}: {share * capacity:.2f} requests/s for {seconds:.0f} s")
                requests = requests_of(scaled, share * capacity, seconds, options.seed, "poisson")
                begun_s = time.perf_counter() - watcher.start_s
                results = asyncio.run(offer(app.url, MODEL, requests, drain_timeout_s=90.0))
                graded = entry(grade_run(requests, results), system="slo", scenario=name, span_s=seconds)
                keys = ("num_requests", "met", "declined", "failed", "promised", "kept", "attainment")
                rows.append({"load": name, "from_s": round(begun_s, 1), **{key: graded[key] for key in keys}})
                say(json.dumps(rows[-1]))
        finally:
            watcher.close()
    for row, until in zip(rows, [*(row["from_s"] for row in rows[1:]), float("inf")], strict=True):
        row["replicas"] = {f"{at_s:g} s": count for at_s, count in watcher.changes if row["from_s"] <= at_s < until}
    return rows
