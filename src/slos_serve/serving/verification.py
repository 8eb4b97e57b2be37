"""The verification of one engine: what `slos-serve verify` writes and `serve` asks for before it enforces on a GPU.

A file is valid for the key of a profile: model, hardware, flags that bear on speed, version of vLLM. It passes when no
check failed and none of `REQUIRED` was left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slos_serve.cache import cache_path
from slos_serve.errors import ConfigError
from slos_serve.serving.profiles import key_digest

SCHEMA = "slos-serve-verification/1"
PASS, FAIL, SKIPPED = "pass", "fail", "skipped"
REQUIRED = ("hook", "enforcing", "margin-coverage", "faults", "throughput", "outputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a verification: what was found, and the numbers behind it."""

    name: str
    status: str
    detail: str
    values: Mapping[str, Any] = field(default_factory=dict)


def document_of(checks: Sequence[Check], *, key: Mapping[str, Any], vllm: str, quick: bool) -> dict[str, Any]:
    """Return the verification as a JSON document."""
    failed = [check.name for check in checks if check.status == FAIL]
    done = {check.name for check in checks if check.status != SKIPPED}
    missing = [name for name in REQUIRED if name not in done]
    return {
        "schema": SCHEMA,
        "key": dict(key),
        "vllm": vllm,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "passed": not failed and not missing,
        "failed": failed,
        "missing": missing,
        "checks": [asdict(check) for check in checks],
    }


def verification_path(key: Mapping[str, Any]) -> Path:
    """Return where `serve` looks for the verification of an engine."""
    return cache_path("verifications", f"{key_digest(key)}.json")


def read_verification(path: Path) -> dict[str, Any]:
    """Return a verification; `ConfigError` where the file is none."""
    try:
        document = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        expected = f"what slos-serve verify writes ({' '.join(str(error).split())})"
        raise ConfigError(where=str(path), key="file", value="...", expected=expected) from None
    if document.get("schema") != SCHEMA:
        raise ConfigError(where=str(path), key="schema", value=document.get("schema"), expected=SCHEMA)
    for key in ("key", "passed", "failed", "missing"):
        if key not in document:
            raise ConfigError(where=str(path), key=key, value=None, expected="a value")
    return document


def why_not_verified(key: Mapping[str, Any]) -> str:
    """Return why an engine may not enforce yet, "" where its verification passed."""
    path = verification_path(key)
    if not path.exists():
        return "it has not been verified"
    try:
        document = read_verification(path)
    except ConfigError as error:
        return str(error)
    if document["key"] != dict(key):
        return f"{path} is about another engine"
    if not document["passed"]:
        return "its verification did not pass: " + ", ".join([*document["failed"], *document["missing"]])
    return ""
