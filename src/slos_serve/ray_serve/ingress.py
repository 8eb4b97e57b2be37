"""The front door of a cluster: Ray Serve LLM's OpenAI ingress, with promises and second tries.

The same middleware as on a single server stands around it: it reads SLOs, stamps the arrival, holds the
headers for a verdict and writes the last chunk. Its hub is fed here, from the notes of the replicas and the
sum of their reports, so that a client sees one server.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from ray import serve
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from starlette.requests import Request
from starlette.responses import Response

from slos_serve.config import BEST_EFFORT, short
from slos_serve.core.warmup import warm_up_router
from slos_serve.http import replies
from slos_serve.http.explaining import first_known
from slos_serve.http.hub import HUB
from slos_serve.http.middleware import SloMiddleware
from slos_serve.http.status import FIELDS, joined
from slos_serve.ray_serve import names
from slos_serve.ray_serve.arrivals import Estimator
from slos_serve.ray_serve.fleet import Fleet, fleet_of
from slos_serve.ray_serve.hops import FINISHED, Hop, Note
from slos_serve.ray_serve.journey import Journey, LostError, RefusedError, RoutedRequest

HOPPING = ("chat", "completions")
CONTROL_S = 10.0
UNSHOWN = frozenset({"step_sums", "profile"})  # of a replica's line: they are shown for all together
SESSION_HEADER = "x-session-id"
ENGINE_FAULTS = ("EngineDeadError", "EngineLostError")  # vLLM's EngineGenerateError is about one request


class SloIngress(OpenAiIngress):
    """See the module's text.

    `slo`: classes and pinned profile; `digests`: by model, see `server.digest_of`; `traces_to`: an OTLP endpoint.
    """

    def __init__(
        self,
        llm_deployments: dict[str, Any],
        model_cards: dict[str, Any],
        *,
        slo: Mapping[str, Any] | None = None,
        digests: Mapping[str, str] | None = None,
        traces_to: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(llm_deployments, model_cards, **options)
        if traces_to:
            names.start_tracing(traces_to)
        warm_up_router()  # before anybody waits for it
        slo = dict(slo or {})
        profile = slo.pop("profile", None)
        HUB.configure(slo=slo, model=", ".join(model_cards))
        HUB.is_front = True
        HUB.metrics.know_hops()
        self._estimator = Estimator(HUB.config, profile)
        self._step_sums: dict[str, dict[str, float]] = {}  # by replica, as last reported
        self._fleets: dict[str, Fleet] = {}
        for model_id, handle in llm_deployments.items():
            fleet = self._fleets[model_id] = fleet_of(handle.app_name, handle.deployment_name)
            fleet.digest = (digests or {}).get(model_id, "")
            fleet.on_update = self._publish
            self._get_configured_serve_handle(model_id)  # its router starts listening now
            HUB.controls.append(partial(_control, handle))

    # -- what Ray's ingress calls -------------------------------------------------------------------

    async def _process_llm_request(self, body: Any, call_method: str, raw_request: Request | None = None) -> Response:
        try:
            response: Response = await super()._process_llm_request(body, call_method, raw_request)
        except RefusedError as refused:
            count = raw_request.headers.get(replies.RETRIES_HEADER) if raw_request is not None else None
            return self._refuse(body, str(refused), is_retry=replies.is_retry(count))
        except LostError as lost:
            return replies.error(HTTPStatus.SERVICE_UNAVAILABLE, str(lost), headers={"retry-after": "5"})
        return response

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> AsyncIterator[Any]:
        if call_method not in HOPPING:
            async for item in super()._get_response(body=body, call_method=call_method, raw_request=raw_request):
                yield item
            return
        journey = await self._journey(body, call_method, raw_request)
        async with contextlib.aclosing(journey.items()) as items:
            async for item in items:
                yield item

    async def _journey(self, body: Any, call_method: str, raw_request: Request | None) -> Journey:
        model_id = await self._get_model_id(body.model)
        handle = self._get_configured_serve_handle(model_id)
        headers = raw_request.headers if raw_request is not None else {}
        session_id = short((headers and names.session_id_from_headers(headers)) or headers.get(SESSION_HEADER) or "")
        if session_id:
            handle = handle.options(session_id=session_id)
        if isinstance(body, names.ChatCompletionRequest):
            body = names.sanitize_chat(body)
        info = names.RawRequestInfo.from_starlette_request(raw_request) if raw_request is not None else None
        method = getattr(handle, call_method)

        def send(hop: Hop) -> Reply:
            return Reply(method.remote(body, info, hop=hop))

        def tell(note: Note, num_hops: int) -> None:
            self._tell(note, num_hops, body)

        fleet = self._fleets[names.base_model_id(model_id)]
        asked = getattr(body, "vllm_xargs", None) or {}
        slo_id = str(asked.get("slo_id") or "")
        record = (HUB.find(slo_id) if slo_id else None) or {"class": BEST_EFFORT, "verdict": "pending", "tenant": ""}
        slo_class = HUB.config.classes.get(str(asked.get("slo_class") or HUB.config.default_class))
        best_effort = record["verdict"] == "best-effort"
        arrival = self._estimator.arrival(
            body,
            fleet,
            request_id=slo_id or names.request_id(),
            slo_class=record["class"],
            session_id=short(str(getattr(body, "session_id", None) or session_id)),
        )
        routed = RoutedRequest(
            arrival=arrival,
            send=send,
            tell=tell,
            is_fault=is_fault,
            count=HUB.metrics.count_hop,
            slo_id=slo_id,
            slo_class=record["class"],
            tenant=record["tenant"],
            best_effort=best_effort,
            rejects=bool(slo_id and not best_effort and slo_class and slo_class.on_unattainable == "reject"),
            num_parts=0 if getattr(body, "stop", None) else 1,  # a stop text ends it before the engine hears of it
        )
        return Journey(routed, fleet)

    # -- what clients see ---------------------------------------------------------------------------

    def _tell(self, note: Note, num_hops: int, body: Any) -> None:
        record = {**note.record, "slo_class": note.record.get("class"), "slo_id": note.record.get("id")}
        HUB.annotate(str(record["slo_id"]), hops=num_hops, replica=note.replica_id)
        if note.kind == FINISHED:
            self._estimator.learn(body, note.record)
            HUB.feed({"finished": [record]})
        else:
            HUB.feed({"verdicts": [record]})

    def _refuse(self, body: Any, reason: str, *, is_retry: bool) -> Response:
        slo_id = str(body.vllm_xargs["slo_id"])
        record = HUB.find(slo_id) or {"class": BEST_EFFORT, "tenant": ""}
        HUB.reject(slo_id, slo_class=record["class"], tenant=record["tenant"], reason=reason, is_retry=is_retry)
        HUB.metrics.count_hop("refused")
        return replies.refusal(reason, HUB.retry_after_s)

    def _publish(self) -> None:
        """Show the fleets as one engine: their sum for the hub's rules, each replica for people."""
        replicas = [line for fleet in self._fleets.values() for line in fleet.status()]
        sums = {line["id"]: line.get("step_sums") or {} for line in replicas}
        for name, now in sums.items():
            if before := self._step_sums.get(name):  # of what was before this ingress nothing is known
                HUB.history.take_step_sums(time.time(), {key: now[key] - before.get(key, 0) for key in now})
        self._step_sums = sums
        HUB.feed({"snapshot": summed(replicas)})

    async def health(self) -> Response:
        """Answer 200 while a replica can serve, else 503; behind Ray's own router, only Serve knows which can."""
        if any(fleet.num_usable or fleet.is_unwatched for fleet in self._fleets.values()):
            return Response(status_code=HTTPStatus.OK)
        return replies.Json({"status": "no replica"}, status_code=HTTPStatus.SERVICE_UNAVAILABLE)

    async def metrics(self) -> Response:
        """Answer what Prometheus asks of this ingress: SLO counters; Ray exports the engines' own metrics."""
        return replies.metrics()


class Reply:
    """What a replica yields. Where Ray says that the request was cancelled, so is whoever waits for it."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    async def __anext__(self) -> Any:
        try:
            return await self._generator.__anext__()
        except names.TaskCancelledError:
            raise asyncio.CancelledError from None

    def cancel(self) -> None:
        """Give the request up at the replica."""
        self._generator.cancel()


def _control(handle: Any, order: dict[str, Any]) -> Mapping[str, Any]:
    """Give an order to every replica that runs now; `TimeoutError` where one does not answer."""
    if "explain" in order:
        return first_known(handle.broadcast("explain", order).results(timeout_s=CONTROL_S))
    said: list[dict[str, Any]] = handle.broadcast("set_mode", order).results(timeout_s=CONTROL_S)
    refused = [one for one in said if "error" in one]
    return (refused or said or [{"error": "no replica runs"}])[0]


def is_fault(error: BaseException) -> bool:
    """Tell whether an error means that the replica is lost, rather than that the request is wrong."""
    if isinstance(error, names.RayTaskError):
        return isinstance(error.cause, names.RayActorError) or type(error.cause).__name__ in ENGINE_FAULTS
    return isinstance(error, names.RayError)


def summed(replicas: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one snapshot for many replicas; see `http.hub` for who reads which key."""
    heard = [one for one in replicas if one["usable"] and one.get("effective_mode")]
    whole = joined(heard, is_routed=True)
    mode = "enforce" if whole["effective_mode"] == "enforce" else "observe"
    # A replica that leaves takes its counts along: what only grows is nothing to add up here, but for the steps.
    now = {field.key: whole[field.key] for field in FIELDS if not field.counts}
    profiles = [one.get("profile") for one in heard]
    counts = {key: now[key] or 0 for key in now if key.startswith("num_")}
    return {
        **now,
        **counts,
        "steps": whole["steps"] or 0,
        "mode": mode,
        "effective_mode": mode,
        "drain_s": now["drain_s"] or 0.0,
        **({"device": whole["device"]} if "device" in whole else {}),
        "profile": profiles[0] if profiles and all(profiles) else None,
        "replicas": [{key: value for key, value in line.items() if key not in UNSHOWN} for line in replicas],
    }


def make_ingress() -> Any:
    """Return the ingress class with its routes, for `serve.deployment`."""
    app = names.init()
    app.add_middleware(SloMiddleware)
    endpoints = {
        **names.DEFAULT_ENDPOINTS,
        "health": lambda app: app.get("/health"),
        "metrics": lambda app: app.get("/metrics"),
    }
    return make_fastapi_ingress(SloIngress, endpoint_map=endpoints, app=app)


def deployment(options: Mapping[str, Any]) -> Any:
    """Return the ingress as a Serve deployment."""
    return serve.deployment(make_ingress(), **options)
