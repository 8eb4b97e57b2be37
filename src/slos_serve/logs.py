"""Logs of JSON lines: `logs.json` is a logging configuration for `VLLM_LOGGING_CONFIG_PATH` that writes them.

One object a line: `time` (ISO 8601, UTC), `level`, `logger`, `message`, `process`, `process_name`; `error` holds a
traceback. What a line of ours is about (`extra={"slos_serve": ...}`) is there as `slos_serve`: the ids of a request,
its class, verdict, reason, outcome and times. Of what others add, ids of requests and traces are kept. Nothing but the
standard library is imported: each of vLLM's processes loads this.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from pathlib import Path

CONFIG = Path(__file__).with_name("logs.json")
OTHERS = ("request_id", "trace_id", "span_id")


def use_json(logger: logging.Logger) -> None:
    """Let a logger write JSON lines to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def standard_output() -> logging.Handler:
    """Return a handler that writes to this process's standard output itself.

    vLLM makes `sys.stdout` begin each line with the name of the process, which `process_name` says already.
    """
    return logging.StreamHandler(open(1, "w", encoding="utf-8", closefd=False))


class JsonFormatter(logging.Formatter):
    """Write each record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        when = dt.datetime.fromtimestamp(record.created, tz=dt.UTC)
        fields: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            "process_name": record.processName,
        }
        fields |= {name: value for name in ("slos_serve", *OTHERS) if (value := getattr(record, name, None))}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
