"""What a server takes of a request's body: everything ours knows, until a plain OpenAI server refuses a field.

Strict servers answer 400 to what they do not know. The first such answer teaches the client what to leave out; the
request is then sent again, and so are those that were under way. An answer that finds fault with a value teaches
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

FIELD_STATUSES = (400, 422)
VLLM_ONLY = ("ignore_eos", "slo", "vllm_xargs", "stream_options.continuous_usage_stats", "prompt as token ids")
RENAMED = {"max_tokens": "max_completion_tokens"}
OPTIONAL = ("temperature", "stream_options")
_NAMES = frozenset({"prompt", *(field.rpartition(".")[2] for field in VLLM_ONLY), *RENAMED, *OPTIONAL})

_UNKNOWN_FIELD = re.compile(
    r"unrecogni[sz]ed|unsupported|not supported|does not support|unexpected|not (permitted|allowed)"
    r"|(unknown|extra|additional|invalid|undefined) (request |body |input )?"
    r"(argument|parameter|field|propert|key|input)",
    re.IGNORECASE,
)
_TOKEN_IDS = re.compile(r"prompt\W.*\b(string|str|token|array|list)\b", re.IGNORECASE | re.DOTALL)
_TOO_LONG = re.compile(r"context length|too (long|large)|maximum", re.IGNORECASE)


class Wire:
    """The fields that a server has refused so far, and the user's own fields. `generation` counts what was learnt.

    `extra` is put over every body; a `None` there leaves the field out. `is_plain`: begin with what every OpenAI
    server knows.
    """

    def __init__(self, extra: Mapping[str, Any] | None = None, *, is_plain: bool = False) -> None:
        self.extra = dict(extra or {})
        self.refused: set[str] = set(VLLM_ONLY) if is_plain else set()
        self.generation = int(is_plain)

    def adapt(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return a body that holds nothing that was refused."""
        adapted = {key: value for key, value in body.items() if key not in self.refused or key in RENAMED}
        if "stream_options.continuous_usage_stats" in self.refused and "stream_options" in adapted:
            adapted["stream_options"] = {"include_usage": True}
        if "prompt as token ids" in self.refused and isinstance(adapted.get("prompt"), list):
            adapted["prompt"] = words(len(adapted["prompt"]))
        for old, new in RENAMED.items():
            if old in self.refused and old in adapted:
                adapted[new] = adapted.pop(old)
        adapted.update(self.extra)
        return {key: value for key, value in adapted.items() if value is not None}

    def learn(self, status: int, answer: str, generation: int) -> bool:
        """Take in a refusal of a body of some generation; tell whether the request is worth sending again."""
        if status not in FIELD_STATUSES:
            return False
        if generation < self.generation:
            return True
        found = self._unknown(answer) - self.refused
        self.refused |= found
        self.generation += bool(found)
        return bool(found)

    def _unknown(self, answer: str) -> set[str]:
        """Return the fields that an answer refuses; those of vLLM go together, so that one answer is enough."""
        message, name = _parts(answer)
        if name == "prompt" or (not name and _TOKEN_IDS.search(message) and not _TOO_LONG.search(message)):
            return {"prompt as token ids"} if not _TOO_LONG.search(message) else set()
        if not _UNKNOWN_FIELD.search(message):
            return set()
        for field in (*RENAMED, *OPTIONAL):
            if name == field or (not name and re.search(rf"\b{field}\b", message) and not self._is_vllm(message)):
                return {field}
        return set(VLLM_ONLY)

    def _is_vllm(self, message: str) -> bool:
        return any(re.search(rf"\b{re.escape(field.rpartition('.')[2])}\b", message) for field in VLLM_ONLY)


def _parts(answer: str) -> tuple[str, str]:
    """Return an error's message and the field it names, as OpenAI or FastAPI write it; "" where it names none."""
    try:
        document = json.loads(answer)
    except ValueError:
        return answer, ""
    error = document.get("error", document) if isinstance(document, dict) else document
    detail = error.get("detail") if isinstance(error, dict) else None
    if isinstance(detail, Sequence) and detail and isinstance(detail[0], dict):
        known = [part for part in detail[0].get("loc", ()) if part in _NAMES]  # others name the types that were tried
        return str(detail[0].get("msg", "")), known[-1] if known else ""
    if isinstance(error, dict):
        return str(error.get("message", answer)), str(error.get("param") or "").rpartition(".")[2]
    return str(error), ""


def words(count: int) -> str:
    """Return a text of about so many tokens."""
    return " ".join(["word"] * count)


def parse_headers(texts: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` or `NAME: VALUE`; `ValueError` for anything else."""
    found: dict[str, str] = {}
    for text in texts:
        match = re.fullmatch(r"\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)\s*[=:]\s*([^\r\n]*)", text)
        if match is None:
            raise ValueError(f"--header {text[:40]!r}: expected NAME=VALUE")
        found[match[1]] = match[2].strip()
    return found


def parse_extra_body(text: str | None) -> dict[str, Any]:
    """Parse a JSON object; `ValueError` for anything else."""
    try:
        found = json.loads(text) if text is not None else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--extra-body {str(text)[:40]!r}: expected a JSON object")  # noqa: TRY004
    return found
