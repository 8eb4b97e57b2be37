"""The log line that a person needs of a request that was declined, refused or late; few, however many requests are.

One line of each kind and class in ten seconds, which says how many it speaks for. The same facts go with the line as
fields (`extra`), for logs of JSON lines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from slos_serve.core.words import MEANINGS, Outcome, Reason, Said
from slos_serve.http import answers
from slos_serve.http.records import Record

logger = logging.getLogger("vllm.slos_serve")

EVERY_S = 10.0
FIELDS = (
    "id",
    "request_id",
    "class",
    "tenant",
    "verdict",
    "reason",
    "outcome",
    "ttft_ms",
    "tpot_ms",
    "slack_ms",
    "hops",
)
TIMES = {"ttft_ms": "first token after {} ms", "tpot_ms": "{} ms per token"}
ENDS: dict[str, str] = {Outcome.REJECTED: "refused", Outcome.DECLINED: "declined", Outcome.FAILED: "failed"}
WORDS = {
    "broken": (logging.WARNING, "a promise was broken"),
    "failed": (logging.WARNING, "a request failed"),
    "missed": (logging.INFO, "a request without a promise was late"),
    "declined": (logging.INFO, "a request was declined"),
    "refused": (logging.INFO, "a request was refused (429)"),
}


class Notices:
    """Tell of ended requests; safe on any thread. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_silent = False  # where another process tells of the same requests
        self._clock = clock
        self._lock = threading.Lock()
        self._told_s: dict[tuple[str, str], float] = {}
        self._left: Counter[tuple[str, str]] = Counter()

    def tell(self, record: Record) -> None:
        """Log one line about a request that ended, if it ended badly and no such line was written just now.

        Of several parts of one request the first that ends badly is told.
        """
        kind = kind_of(record)
        if not kind or self.is_silent or record.get("_is_noticed"):
            return
        record["_is_noticed"] = True
        key, now = (kind, str(record["class"])), self._clock()
        with self._lock:
            if now - self._told_s.get(key, -EVERY_S) < EVERY_S:
                self._left[key] += 1
                return
            self._told_s[key], num_left = now, self._left.pop(key, 0)
        record = answers.told(record)
        facts = {name: record[name] for name in FIELDS if record.get(name) not in {None, ""}}
        facts |= {"event": kind, "asked": record.get("promise") or record.get("asked") or {}}
        level, _ = WORDS[kind]
        logger.log(level, "%s", line(kind, record, num_left), extra={"slos_serve": facts})


def kind_of(record: Mapping[str, Any]) -> str:
    """Return how a request ended badly, a key of `WORDS`; "" where it did not."""
    outcome = record.get("outcome")
    if outcome == Outcome.MISSED:
        return "broken" if record["verdict"] in answers.PROMISED else "missed"
    return ENDS.get(str(outcome), "")


def line(kind: str, record: Mapping[str, Any], num_more: int) -> str:
    """Return the sentence: what happened to which request, why, what it asked for and what it got."""
    who = f"class {record['class']}" + (f", tenant {record['tenant']}" if record.get("tenant") else "")
    parts = [f"{_plain(record.get('request_id') or record['id'])} ({who})"]
    reason = record.get("reason")
    if reason and record["verdict"] in {Said.BEST_EFFORT, Said.REJECTED}:
        parts.append(f"{reason}: {MEANINGS[Reason].get(reason, reason)}")
    asked = record.get("promise") or record.get("asked") or {}
    if asked:
        said = ", ".join(f"{name.removesuffix('_ms')} {value:g} ms" for name, value in asked.items())
        parts.append(f"{'promised' if kind == 'broken' else 'asked'} {said}")
    parts += [text.format(f"{record[name]:g}") for name, text in TIMES.items() if record.get(name) is not None]
    if record.get("hops"):
        parts.append(f"after {record['hops']} other replicas")
    more = f" (and {num_more} more of this class since the last such line)" if num_more else ""
    return _plain(f"SLO: {WORDS[kind][1]}: " + "; ".join(parts)) + more


def _plain(text: str) -> str:
    """Return a text of one line: clients choose names."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
