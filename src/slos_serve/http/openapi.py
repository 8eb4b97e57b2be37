"""What the server's OpenAPI document says of SLOs: `slo` in requests, its headers, the 429, and the pages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slos_serve.config import OVERRIDES, PROMISES, STAGES, SloConfig
from slos_serve.core.words import MEANINGS, Outcome, Reason, Said
from slos_serve.http.health import ALIVE, READY
from slos_serve.http.routes import ROUTES, VLLM_XARGS

PREFIX = "#/components/schemas/"
NUMBER = {"type": "number", "exclusiveMinimum": 0}
SUMMARIES = {
    "/v1/slo/classes": "The latency classes of this server",
    "/v1/slo/status": "Mode, profile and load of the engine",
    "/v1/slo/requests": "The last requests, newest first",
    "/v1/slo/requests/{id}": "What is known of a recent request, by any of its ids",
    "/v1/slo/mode": "Whether plans are carried out",
}
PROBES = {ALIVE: "Does the server live?", READY: "May requests be sent to it?"}


def augmented(raw: bytes, config: SloConfig) -> bytes:
    """Return the OpenAPI document of the server inside with ours in it; anything else as it is."""
    try:
        document = json.loads(raw)
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components |= schemas(config)
        for path, route in ROUTES.items():
            operation = document["paths"].get(path, {}).get("post")
            if operation is not None and route.place:
                _augment(operation, components, in_body=route.place == VLLM_XARGS)
        document["paths"] |= _pages()
    except (ValueError, KeyError, TypeError, AttributeError):
        return raw
    return json.dumps(document, separators=(",", ":")).encode()


def schemas(config: SloConfig) -> dict[str, Any]:
    """Return the schemas of a request's and an answer's `slo`."""
    said: dict[str, Any] = {"class": {"type": "string", "enum": list(config.classes)}}
    said |= dict.fromkeys(OVERRIDES, NUMBER)
    said |= {"stage": {"type": "string", "enum": list(STAGES)}, "tenant": {"type": "string", "maxLength": 128}}
    promise = {"type": "object", "properties": dict.fromkeys(PROMISES, NUMBER)}
    answered: dict[str, Any] = {"id": {"type": "string"}, "class": {"type": "string"}}
    answered |= {name: _words(words) for name, words in (("verdict", Said), ("reason", Reason), ("outcome", Outcome))}
    answered |= {"promise": promise, "asked": promise, "predicted_ttft_ms": NUMBER, "slack_ms": {"type": "number"}}
    return {
        "Slo": {
            "type": "object",
            "description": "What a request asks of its latency: a class, numbers, or both.",
            "properties": said,
            "additionalProperties": False,
        },
        "SloAnswer": {"type": "object", "description": "The verdict on a request.", "properties": answered},
    }


def _words(words: type[Said | Reason | Outcome]) -> dict[str, Any]:
    text = "; ".join(f"{word or '(empty)'}: {meaning}" for word, meaning in MEANINGS[words].items())
    return {"type": "string", "enum": list(words), "description": text}


def _augment(operation: dict[str, Any], components: Mapping[str, Any], *, in_body: bool) -> None:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = components.get(str(content.get("schema", {}).get("$ref", "")).removeprefix(PREFIX), {})
    if in_body and "properties" in schema:
        schema["properties"]["slo"] = {"anyOf": [{"$ref": PREFIX + "Slo"}, {"type": "null"}]}
    names = {"x-slo-class": "string", **{f"x-slo-{key.replace('_', '-')}": "number" for key in OVERRIDES}}
    operation.setdefault("parameters", []).extend(
        {"name": name, "in": "header", "required": False, "schema": {"type": kind}} for name, kind in names.items()
    )
    operation.setdefault("responses", {})["429"] = {
        "description": "Refused: no promise can be given, or the queue is full. See retry-after and x-slo-reason."
    }


def _pages() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for path, summary in PROBES.items():
        answers = {"200": {"description": "yes"}, "503": {"description": "no, and `status` says why"}}
        paths[path] = {"get": {"summary": summary, "tags": ["slo"], "responses": answers}}
    for path, summary in SUMMARIES.items():
        page: dict[str, Any] = {"summary": summary, "tags": ["slo"], "responses": {"200": {"description": "JSON"}}}
        if "{id}" in path:
            page["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": page}
    order = {
        "type": "object",
        "required": ["mode"],
        "additionalProperties": False,
        "properties": {
            "mode": {"enum": ["observe", "enforce", None]},
            "class": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    }
    paths["/v1/slo/mode"]["post"] = {
        "summary": "Switch it (an admin's key, or this machine)",
        "tags": ["slo"],
        "requestBody": {"required": True, "content": {"application/json": {"schema": order}}},
        "responses": {status: {"description": text} for status, text in _MODE_ANSWERS.items()},
    }
    return paths


_MODE_ANSWERS = {
    "200": "every engine has taken the order up",
    "400": "the order makes no sense, or enforcing was never verified",
    "403": "not an operator's",
    "415": "not JSON",
    "503": "an engine did not answer",
}
