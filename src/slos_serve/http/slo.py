"""What a client says about latency, in any of its four spellings, as one flat dictionary for the engine.

The first that matches wins: (1) the body's `slo` object, (2) `x-slo-*` or `x-llm-d-slo-*` headers,
(3) `service_tier`, (4) `slo_*` keys the client put into `vllm_xargs` itself. A mapping by the operator
(API key, model alias, tenant) overrides them all. The engine alone knows the prompt's length, so promises
are resolved there; here they are only checked. Forms 1 to 3 are checked strictly (`RequestError`, a 400);
form 4 passes as it is, and the engine serves what it cannot read as best-effort.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slos_serve.config import BEST_EFFORT, CUSTOM, OVERRIDES, ApiKey, SloConfig
from slos_serve.errors import ConfigError, SlosServeError

Headers = Iterable[tuple[bytes, bytes]]

BODY_KEYS = ("class", *OVERRIDES, "stage", "tenant")
NUMBER_HEADERS = {
    "ttft_ms": (b"x-slo-ttft-ms", b"x-llm-d-slo-ttft-ms"),
    "tpot_ms": (b"x-slo-tpot-ms", b"x-llm-d-slo-tpot-ms"),
}
CLASS_HEADER, TENANT_HEADER = b"x-slo-class", b"x-slo-tenant"
MAX_TENANT_LENGTH = 128
DEFAULT_HOLD_S = 10.0

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d{1,3})?", re.ASCII)


class RequestError(SlosServeError, ValueError):
    """Name the field of a request that is wrong, its value and what was expected."""

    def __init__(self, *, param: str, value: object, expected: str) -> None:
        self.param = param
        shown = repr(value)
        shown = shown if len(shown) <= 100 else shown[:97] + "..."
        super().__init__(f"{param} = {shown}: expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SloRequest:
    """What one request asks for, checked.

    `xargs` is what the engine is told (without id and arrival time). `asked` is false where neither the
    client nor the operator said anything: such a request is served as on any other server. `keeps_own`: the
    client's own `slo_*` keys in `vllm_xargs` stay (form 4). `hold_s` bounds how long after arrival the
    response's headers wait for a verdict: until the first token is due, where that is known, but a class that
    wants to be rejected rather than served late waits for its verdict. `ttl_s` is how long it may wait in the
    queue before the engine sends it away.
    """

    slo_class: str
    xargs: Mapping[str, str | float] = field(default_factory=dict)
    asked: bool = True
    best_effort: bool = False
    rejects: bool = False
    keeps_own: bool = False
    tenant: str = ""
    tier: str | None = None
    hold_s: float = DEFAULT_HOLD_S
    ttl_s: float | None = None


class Operator:
    """The operator's configuration, indexed for one look-up per request."""

    def __init__(self, config: SloConfig) -> None:
        self.config = config
        self._api_keys = {key.key_sha256: (tenant, key) for tenant, key in config.api_keys.items()}
        mapped = bool(config.tenants or config.models or config.api_keys)
        self._always = config.default_class != BEST_EFFORT or mapped or self._ttl_s(BEST_EFFORT) is not None

    def _ttl_s(self, label: str) -> float | None:
        ttl_ms = self.config.ttl_ms(label)
        return None if ttl_ms is None else ttl_ms / 1000

    def concerns(self, headers: Headers, body: bytes) -> bool:
        """Tell cheaply whether a request can be about an SLO at all; its body need not be parsed otherwise."""
        if self._always or b'"slo' in body or b'"service_tier"' in body or b"\0" in body[:4]:  # the last: not UTF-8
            return True
        return any(name.startswith((b"x-slo-", b"x-llm-d-slo-")) for name, _ in headers)

    def read(self, headers: Headers, body: Mapping[str, Any]) -> SloRequest:
        """Apply the first-match rule. `RequestError` names what is malformed in forms 1 to 3."""
        named = {name: value for name, value in headers if name.startswith(b"x-") or name == b"authorization"}
        slo = _slo_object(body)
        key_tenant, api_key = self._api_key(named.get(b"authorization"))
        tenant = _tenant("slo.tenant", slo.get("tenant")) or _tenant("x-slo-tenant", _text(named.get(TENANT_HEADER)))
        tenant = tenant or key_tenant
        stage = slo.get("stage")
        self._check("slo.", None, {"stage": stage})
        if stage is None:
            stage = "loop" if body.get("tools") else "final"
        said = self._body(slo) or self._headers(named) or self._tier(body.get("service_tier"))
        mapped = self._mapped(api_key, body.get("model"), tenant)
        if mapped is not None:
            said = (mapped, {})
        xargs: dict[str, str | float] = {"slo_tenant": tenant} if tenant else {}
        if said is None and (own := _own_xargs(body)):
            return self._form_4(own, xargs, tenant, body.get("service_tier"))
        class_name, overrides = said or (None, {})
        label = self.config.label(class_name, overrides)
        ttl_s = self._ttl_s(label)
        asked = label != BEST_EFFORT or (said is not None and class_name == BEST_EFFORT) or ttl_s is not None
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
            tier=body.get("service_tier") if isinstance(body.get("service_tier"), str) else None,
            hold_s=DEFAULT_HOLD_S if rejects else _hold_s(overrides.get("ttft_ms") or (base.ttft_ms if base else None)),
            ttl_s=ttl_s,
        )

    def _form_4(self, own: Mapping[str, Any], xargs: dict[str, str | float], tenant: str, tier: Any) -> SloRequest:
        name = own.get("slo_class")
        known = isinstance(name, str) and name in self.config.classes
        numbers = {key: own.get("slo_" + key) for key in OVERRIDES}
        label = str(name) if known else self.config.label(None, numbers)
        slo_class = self.config.classes[label] if known else None
        return SloRequest(
            slo_class=label,
            xargs=xargs,
            best_effort=label == BEST_EFFORT,
            keeps_own=True,
            rejects=slo_class is not None and slo_class.on_unattainable == "reject" and label != BEST_EFFORT,
            tenant=tenant,
            tier=tier if isinstance(tier, str) else None,
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
        class_name = _text(named.get(CLASS_HEADER))
        overrides: dict[str, float] = {}
        for key, spellings in NUMBER_HEADERS.items():
            spelling = next((name for name in spellings if name in named), None)
            if spelling is not None:
                overrides[key] = self._number(spelling.decode(), key, _text(named[spelling]) or "")
        if class_name is None and not overrides:
            return None
        self._check("x-slo-", class_name, {})
        return class_name, overrides

    def _tier(self, tier: object) -> tuple[str | None, dict[str, float]] | None:
        match tier:
            case "flex":
                return BEST_EFFORT, {}
            case "auto" | "default":
                return None, {}
            case "priority":
                return self.config.priority_class, {}
        return None  # not ours to refuse: vLLM knows which tiers exist

    def _mapped(self, api_key: ApiKey | None, model: object, tenant: str) -> str | None:
        if api_key is not None and api_key.slo_class is not None:
            return api_key.slo_class
        if isinstance(model, str) and model in self.config.models:
            return self.config.models[model]
        return self.config.tenants.get(tenant)

    def _api_key(self, authorization: bytes | None) -> tuple[str, ApiKey | None]:
        if authorization is None or not self._api_keys:
            return "", None
        scheme, _, key = authorization.decode("latin-1").partition(" ")
        found = self._api_keys.get(ApiKey.digest(key.strip())) if scheme.lower() == "bearer" else None
        return found or ("", None)

    def _number(self, header: str, key: str, text: str) -> float:
        value = float(text) if _NUMBER.fullmatch(text) else None
        try:
            self.config.check_overrides(None, {key: text if value is None else value})
        except ConfigError as error:
            raise RequestError(param=header, value=text, expected=error.expected) from error
        return float(text)

    def _check(self, prefix: str, class_name: object, overrides: Mapping[str, object]) -> None:
        try:
            self.config.check_overrides(class_name, overrides)  # type: ignore[arg-type] # checked there
        except ConfigError as error:
            raise RequestError(param=prefix + error.key, value=error.value, expected=error.expected) from error


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


def _own_xargs(body: Mapping[str, Any]) -> dict[str, Any]:
    xargs = body.get("vllm_xargs")
    names = ("slo_class", "slo_stage", *("slo_" + key for key in OVERRIDES))
    return {key: xargs[key] for key in names if key in xargs} if isinstance(xargs, dict) else {}


def _tenant(param: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TENANT_LENGTH:
        expected = f"a name of 1 to {MAX_TENANT_LENGTH} characters"
        raise RequestError(param=param, value=value, expected=expected)
    return value.strip()


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1").strip()


def _hold_s(ttft_ms: float | None) -> float:
    return DEFAULT_HOLD_S if ttft_ms is None else min(ttft_ms / 1000, DEFAULT_HOLD_S)
