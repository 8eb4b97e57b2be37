"""What a client says about latency, in any of its four spellings, as one flat dictionary for the engine.

The first that matches wins: (1) the body's `slo` object, (2) `x-slo-*` or `x-llm-d-*` headers, (3) `service_tier`,
(4) `slo_*` keys the client put into `vllm_xargs` itself. A mapping by the operator (API key, model alias, tenant)
overrides them all, and who a client is, is not its own to say (see `identity`). The engine alone knows the prompt's
length, so promises are resolved there; here they are only checked. Forms 1 to 3 are checked strictly (`RequestError`,
a 400); form 4 passes as it is, and the engine serves what it cannot read as best-effort.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slos_serve.config import BEST_EFFORT, CUSTOM, MAX_TEXT, OVERRIDES, SloConfig, short
from slos_serve.core.words import Reason
from slos_serve.errors import ConfigError
from slos_serve.http.identity import Caller, Headers, Identities, RequestError, UnknownKeyError, single, text

BODY_KEYS = ("class", *OVERRIDES, "stage", "tenant")
PREFIX, LLM_D_PREFIX = b"x-slo-", b"x-llm-d-slo-"
UNITS = {b"-ms": 1.0, b"-s": 1e3, b"-us": 1e-3}  # to milliseconds
CLASS_HEADER, STAGE_HEADER, TENANT_HEADER = b"x-slo-class", b"x-slo-stage", b"x-slo-tenant"
OBJECTIVE_HEADER, FAIRNESS_HEADER = b"x-llm-d-inference-objective", b"x-llm-d-inference-fairness-id"
SESSION_HEADERS = (b"x-dynamo-session-id", b"x-session-affinity", b"x-claude-code-session-id")
UNSAID = frozenset({"default"})  # what load generators send for "no number"
OWN_KEYS = ("slo_class", "slo_stage", *("slo_" + key for key in OVERRIDES))
DEFAULT_HOLD_S = 10.0

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
# `slo`, `service_tier` and `vllm_xargs` consist of these; other escapes are left to their readers.
_ESCAPED_LETTER = re.compile(rb"\\u00[567]")


def _number_headers() -> dict[bytes, tuple[str, float]]:
    """Return the headers that carry numbers: what each means in the body, and its unit in milliseconds."""
    headers: dict[bytes, tuple[str, float]] = {}
    for key in OVERRIDES:
        name = key.replace("_", "-").encode()
        if not key.endswith("_ms"):
            headers[PREFIX + name] = key, 1.0
            continue
        for unit, factor in UNITS.items():
            headers[PREFIX + name.removesuffix(b"-ms") + unit] = key, factor
    for name in (b"ttft-ms", b"tpot-ms"):
        headers[LLM_D_PREFIX + name] = headers[PREFIX + name]
    return headers


NUMBER_HEADERS = _number_headers()
KNOWN_HEADERS = (CLASS_HEADER, STAGE_HEADER, TENANT_HEADER, *NUMBER_HEADERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SloRequest:
    """What one request asks for, checked.

    `xargs` is what the engine is told (without id and arrival time). `asked` is false where neither the
    client nor the operator said anything: such a request is served as on any other server. `shown_tenant`: the name on
    the request's own page, where nobody is told apart also what a client calls itself. `session`: what another system's
    header names it, for the engine. `reason`: why it has no promise, where `best_effort`. `hold_s` bounds how
    long after arrival the response's headers wait for a verdict: until the first token is due, where that is known,
    but a class that wants to be rejected rather than served late waits for its verdict. `ttl_s` is how long it may
    wait in the queue before the engine sends it away.
    """

    slo_class: str
    xargs: Mapping[str, str | float] = field(default_factory=dict)
    asked: bool = True
    best_effort: bool = False
    rejects: bool = False
    tenant: str = ""
    shown_tenant: str = ""
    session: str = ""
    tier: str | None = None
    reason: str = Reason.REQUESTED
    hold_s: float = DEFAULT_HOLD_S
    ttl_s: float | None = None


class Operator:
    """The operator's configuration, indexed for one look-up per request.

    `model` is what a request means that names none.
    """

    def __init__(self, config: SloConfig, model: str | None = None) -> None:
        self.config = config
        self.identities = Identities(config)
        self._model = model
        mapped = bool(config.tenants or config.models or config.api_keys or config.max_requests_per_tenant is not None)
        self._always = config.default_class != BEST_EFFORT or mapped or self._ttl_s(BEST_EFFORT) is not None

    def _ttl_s(self, label: str) -> float | None:
        ttl_ms = self.config.ttl_ms(label)
        return None if ttl_ms is None else ttl_ms / 1000

    def concerns(self, headers: Headers, body: bytes) -> bool:
        """Tell cheaply whether a request can be about an SLO at all; its body need not be parsed otherwise."""
        if self._always or b"\0" in body[:4]:  # the last: not UTF-8
            return True
        if any(word in body for word in (b'"slo', b'"service_tier"', b'"vllm_xargs"', b'"extra_args"')):
            return True
        if b"\\u00" in body and _ESCAPED_LETTER.search(body):
            return True
        return any(_is_ours(name) for name, _ in headers)

    def read(self, headers: Headers, body: Mapping[str, Any], peer: str | None = "") -> SloRequest:
        """Apply the first-match rule. `RequestError` names what is malformed in forms 1 to 3.

        `peer` is the address the request came from, None for a Unix socket. `UnknownKeyError` where the operator
        wants a known API key and there is none.
        """
        named = single(headers)
        _refuse_unknown(named)
        caller = self.identities.caller(named, peer)
        if not caller.is_known and self.config.unknown_keys == "refuse":
            raise UnknownKeyError("this server serves known API keys only")
        slo = _slo_object(body)
        _refuse_misplaced(body)
        claimed = _named_tenant(named, slo)
        tenant = (claimed if caller.names_tenants else "") or caller.tenant
        stage = self._stage(named, slo) or ("loop" if body.get("tools") else "final")
        said = self._body(slo) or self._headers(named) or self._tier(body.get("service_tier"))
        own = _own_xargs(body)
        is_unheard = not caller.is_known and bool(said or own)
        if not caller.is_known:
            said, own = None, {}
        mapped = self._mapped(caller, body.get("model"), tenant)
        if mapped is not None:
            said = (mapped, {})
        xargs: dict[str, str | float] = {"slo_tenant": tenant} if tenant else {}
        session = _session(named, body)
        if said is None and own:
            return self._form_4(own, xargs, tenant, session, body.get("service_tier"))
        class_name, overrides = said or (None, {})
        label = self.config.label(class_name, overrides)
        ttl_s = self._ttl_s(label)
        is_unnamed = label == BEST_EFFORT and class_name is None and self._is_unnamed_priority(body, caller)
        is_told = is_unheard or is_unnamed or (said is not None and class_name == BEST_EFFORT)
        asked = is_told or label != BEST_EFFORT or ttl_s is not None
        if asked:
            # `custom` is a name for people: the engine gets the numbers and falls back on the default class.
            xargs |= {"slo_class": label} if label != CUSTOM else {}
            xargs |= {"slo_" + key: value for key, value in overrides.items()}
            xargs["slo_stage"] = stage
        base = self.config.classes.get(class_name or self.config.default_class)
        rejects = base is not None and base.on_unattainable == "reject" and label != BEST_EFFORT
        return SloRequest(
            slo_class=label,
            xargs=xargs,
            asked=asked,
            best_effort=label == BEST_EFFORT,
            rejects=rejects,
            tenant=tenant,
            shown_tenant=self._shown(tenant, claimed),
            session=session,
            tier=self._used_tier(body.get("service_tier")),
            reason=Reason.UNKNOWN_KEY if is_unheard else Reason.NO_PRIORITY_CLASS if is_unnamed else Reason.REQUESTED,
            hold_s=DEFAULT_HOLD_S if rejects else _hold_s(overrides.get("ttft_ms") or (base.ttft_ms if base else None)),
            ttl_s=ttl_s,
        )

    def wishes(self, headers: Headers, body: Mapping[str, Any]) -> bool:
        """Tell whether a client asks for anything: a class or a number."""
        named = single(headers)
        return bool(self._body(_slo_object(body)) or self._headers(named))

    def caller(self, headers: Headers, peer: str | None) -> Caller:
        """Return who asks for a page; `RequestError` where that can be read in two ways."""
        return self.identities.caller(single(headers), peer)

    def _form_4(
        self, own: Mapping[str, Any], xargs: dict[str, str | float], tenant: str, session: str, tier: Any
    ) -> SloRequest:
        name = own.get("slo_class")
        known = isinstance(name, str) and name in self.config.classes
        numbers = {key: own.get("slo_" + key) for key in OVERRIDES}
        label = str(name) if known else self.config.label(None, numbers)
        slo_class = self.config.classes[label] if known else None
        return SloRequest(
            slo_class=label,
            xargs={**own, **xargs},
            best_effort=label == BEST_EFFORT,
            rejects=slo_class is not None and slo_class.on_unattainable == "reject" and label != BEST_EFFORT,
            tenant=tenant,
            session=session,
            tier=tier if isinstance(tier, str) else None,
            reason=Reason.REQUESTED if known or name is None else Reason.INVALID,
            ttl_s=self._ttl_s(label),
        )

    def _body(self, slo: Mapping[str, Any]) -> tuple[str | None, dict[str, float]] | None:
        class_name = slo.get("class")
        overrides = {key: slo[key] for key in OVERRIDES if slo.get(key) is not None}
        if class_name is None and not overrides:
            return None
        self._check("slo.", class_name, overrides)
        return class_name, overrides

    def _headers(self, named: Mapping[bytes, bytes]) -> tuple[str | None, dict[str, float]] | None:
        class_name = text(named[CLASS_HEADER]) if CLASS_HEADER in named else self._objective(named)
        overrides: dict[str, float] = {}
        for header in (name for name in NUMBER_HEADERS if name in named):
            key, factor = NUMBER_HEADERS[header]
            value = text(named[header])
            if value in UNSAID or (key in overrides and header.startswith(LLM_D_PREFIX)):
                continue  # the client's own word goes before that of a gateway
            if key in overrides:
                raise RequestError(
                    param=header.decode(), value=value, expected=f"{key} in one unit, and it came in two"
                )
            overrides[key] = self._number(header.decode(), key, value, factor)
        if class_name is None and not overrides:
            return None
        self._check("x-slo-", class_name, overrides)
        return class_name, overrides

    def _objective(self, named: Mapping[bytes, bytes]) -> str | None:
        """Return the class that a gateway's objective names; it may also be one that only the gateway knows."""
        name = text(named.get(OBJECTIVE_HEADER, b""))
        return name if name in self.config.classes else None

    def _stage(self, named: Mapping[bytes, bytes], slo: Mapping[str, Any]) -> str | None:
        stage = slo.get("stage")
        self._check("slo.", None, {"stage": stage})
        if stage is None and STAGE_HEADER in named:
            stage = text(named[STAGE_HEADER])
            self._check("x-slo-", None, {"stage": stage})
        return stage

    def _tier(self, tier: object) -> tuple[str | None, dict[str, float]] | None:
        match tier:
            case "flex":
                return BEST_EFFORT, {}
            case "auto" | "default":
                return None, {}
            case "priority":
                return self.config.priority_class, {}
        return None  # not ours to refuse: vLLM knows which tiers exist

    def _shown(self, tenant: str, claimed: str) -> str:
        config = self.config
        is_open = not (config.api_keys or config.tenants or config.trusted_proxies)
        return tenant or (claimed if is_open else "")

    def _used_tier(self, tier: object) -> str | None:
        if tier == "priority" and self.config.priority_class is None:
            return "default"
        return tier if isinstance(tier, str) else None

    def _is_unnamed_priority(self, body: Mapping[str, Any], caller: Caller) -> bool:
        """Tell whether a client pays for a tier that the operator has given no meaning, so that it hears of that."""
        return body.get("service_tier") == "priority" and self.config.priority_class is None and caller.is_known

    def _mapped(self, caller: Caller, model: object, tenant: str) -> str | None:
        if caller.key is not None and caller.key.slo_class is not None:
            return caller.key.slo_class
        name = model or self._model
        if isinstance(name, str) and name in self.config.models:
            return self.config.models[name]
        return self.config.tenants.get(tenant)

    def _number(self, header: str, key: str, said: str, factor: float) -> float:
        value = float(said) * factor if _NUMBER.fullmatch(said) else None
        try:
            self.config.check_overrides(None, {key: said if value is None else value})
        except ConfigError as error:
            raise RequestError(param=header, value=said, expected=error.expected) from error
        return float(said) * factor

    def _check(self, prefix: str, class_name: object, overrides: Mapping[str, object]) -> None:
        try:
            self.config.check_overrides(class_name, overrides)  # type: ignore[arg-type] # checked there
        except ConfigError as error:
            key = error.key.replace("_", "-") if prefix == "x-slo-" else error.key
            raise RequestError(param=prefix + key, value=error.value, expected=error.expected) from error


def _slo_object(body: Mapping[str, Any]) -> Mapping[str, Any]:
    slo = body.get("slo")
    if slo is None:
        return {}
    if not isinstance(slo, dict):
        expected = 'an object such as {"class": "chat"} or {"ttft_ms": 400, "tpot_ms": 50}'
        raise RequestError(param="slo", value=slo, expected=expected)
    for key, value in slo.items():
        if key not in BODY_KEYS:
            raise RequestError(param=f"slo.{key[:64]}", value=value, expected=f"one of the keys {', '.join(BODY_KEYS)}")
    return slo


def _is_ours(header: bytes) -> bool:
    return header.startswith(b"x-") and (header.startswith((PREFIX, b"x-llm-d-")) or header in SESSION_HEADERS)


def _refuse_unknown(named: Mapping[bytes, bytes]) -> None:
    for header, value in named.items():
        if header.startswith(PREFIX) and header not in KNOWN_HEADERS:
            expected = f"one of the headers {', '.join(name.decode() for name in KNOWN_HEADERS if name[-3:] != b'-us')}"
            raise RequestError(param=header[:64].decode("latin-1"), value=text(value), expected=expected)


def _refuse_misplaced(body: Mapping[str, Any]) -> None:
    """Refuse what belongs into `slo` or `vllm_xargs` and stands beside them, where nobody would read it."""
    for key in OWN_KEYS:
        if key in body:
            expected = f'it inside: {{"slo": {{"{key.removeprefix("slo_")}": ...}}}}'
            raise RequestError(param=key, value=body[key], expected=expected)


def _own_xargs(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a client may say in `vllm_xargs` itself, texts bounded in size; vLLM and the engine judge it."""
    xargs = body.get("vllm_xargs")
    found = {key: xargs[key] for key in OWN_KEYS if key in xargs} if isinstance(xargs, dict) else {}
    is_long = {key: isinstance(value, str | list) and len(value) > MAX_TEXT for key, value in found.items()}
    return {key: "(unreadable)" if is_long[key] else value for key, value in found.items()}


def _named_tenant(named: Mapping[bytes, bytes], slo: Mapping[str, Any]) -> str:
    """Return the tenant that a request names, believed or not; a name that is none is refused from anybody."""
    name = _tenant("slo.tenant", slo.get("tenant"))
    if TENANT_HEADER in named:
        name = name or _tenant(TENANT_HEADER.decode(), text(named[TENANT_HEADER]))
    return name or short(text(named.get(FAIRNESS_HEADER, b"")))


def _session(named: Mapping[bytes, bytes], body: Mapping[str, Any]) -> str:
    """Return the session that other systems' headers name, where a client says none in vLLM's way; "" for none."""
    if body.get("session_id") or b"x-session-id" in named:
        return ""
    return next((short(text(named[name])) for name in SESSION_HEADERS if name in named), "")


def _tenant(param: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT or not value.isprintable():
        raise RequestError(param=param, value=value, expected=f"a name of 1 to {MAX_TEXT} characters that print")
    return value.strip()


def _hold_s(ttft_ms: float | None) -> float:
    return DEFAULT_HOLD_S if ttft_ms is None else min(ttft_ms / 1000, DEFAULT_HOLD_S)
