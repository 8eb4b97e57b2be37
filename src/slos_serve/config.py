"""What the operator writes: latency classes, who gets which, and the limits of the queue.

One YAML file (`--slo-config`) is read once, checked whole, and travels as JSON to every process that
needs it, so that the HTTP edge, the engine and the benchmark resolve a request to the same promise.
A class in the file replaces the shipped class of that name entirely (`name: null` removes it); the other
shipped classes stay. Milliseconds here and in HTTP, seconds in `core.types.Slo`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from slos_serve.core.types import Slo
from slos_serve.errors import ConfigError

BEST_EFFORT = "best-effort"
CUSTOM = "custom"  # label of a request that brings numbers of its own and names no class
STAGES = ("loop", "final")
ON_UNATTAINABLE = (BEST_EFFORT, "reject")
PROMISES = tuple(f"{one.name.removesuffix('_s')}_ms" for one in fields(Slo))  # as people write them, in milliseconds
SAME = {"ttlt_ms": "e2e_ms"}  # other words for a promise: time to last token
OVERRIDES = (*PROMISES, "ttft_slowdown", *SAME)  # what a request may bring in numbers
EXCLUSIVE = (("ttft_ms", "ttft_slowdown"), *((promise, word) for word, promise in SAME.items()))

UNKNOWN_KEYS = ("default", "refuse")
PAGES = ("open", "admin", "off")
MAX_TEXT = 128  # characters of what a client names: tenants, sessions, ids

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_MS = 1e12  # three decades; keeps every later sum finite
DAY_MS = 86_400_000.0
# What a client's own numbers may be unless the operator says otherwise: what no engine can mean is refused.
SLO_LIMITS: Mapping[str, tuple[float, float]] = {
    key: (1.0, DAY_MS) if key.endswith("_ms") else (1.0, 1000.0) for key in OVERRIDES
}


def short(text: str) -> str:
    """Return a client's name for something, bounded in length; different names stay different."""
    if len(text) <= MAX_TEXT:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{text[: MAX_TEXT - 33]}-{digest}"


def check_number(where: str, key: str, value: object, *, unit: str, zero: bool = False) -> None:
    """Raise `ConfigError` unless `value` is a positive (or zero) finite number; `unit` is for the reader."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if good and (0 < value <= _MAX_MS or (zero and value == 0)):  # type: ignore[operator]
        return
    kind = "non-negative" if zero else "positive"
    raise ConfigError(where=where, key=key, value=value, expected=f"a {kind} finite number{unit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClass:
    """One latency class. `None` means not promised; times in milliseconds.

    TTFT is absolute (`ttft_ms`) or `max(floor, ttft_slowdown * reference(prompt) + allowance)`, never
    both. `final_tpot_ms` replaces `tpot_ms` in the last round of a tool conversation. `ttlt_ms` is another word for
    `e2e_ms`, and is read back as that. `ttl_ms` is the longest wait in the queue. Raises `ConfigError` for a bad value.
    """

    name: str
    ttft_ms: float | None = None
    ttft_slowdown: float | None = None
    floor_ms: float | None = None
    allowance_ms: float | None = None
    tpot_ms: float | None = None
    final_tpot_ms: float | None = None
    thinking_tpot_ms: float | None = None
    e2e_ms: float | None = None
    ttlt_ms: float | None = None
    max_gap_ms: float | None = None
    weight: float = 1.0
    output_tokens_hint: int | None = None
    on_unattainable: str = BEST_EFFORT
    ttl_ms: float | None = None

    def __post_init__(self) -> None:
        where = f"class {self.name!r}"
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)) or self.name == CUSTOM:
            expected = f"1 to 64 letters, digits, '.', '_' or '-', and not {CUSTOM!r}"
            raise ConfigError(where="classes", key="name", value=self.name, expected=expected)
        for key in (*OVERRIDES, "final_tpot_ms", "ttl_ms", "floor_ms", "allowance_ms", "weight"):
            value = getattr(self, key)
            if value is not None or key == "weight":
                unit = " of milliseconds" if key.endswith("_ms") else ""
                check_number(where, key, value, unit=unit, zero=key in {"floor_ms", "allowance_ms"})
        hint = self.output_tokens_hint
        if hint is not None and (isinstance(hint, bool) or not isinstance(hint, int) or hint < 1):
            raise ConfigError(
                where=where, key="output_tokens_hint", value=hint, expected="a whole number of at least 1"
            )
        if self.on_unattainable not in ON_UNATTAINABLE:
            expected = f"one of {', '.join(ON_UNATTAINABLE)}"
            raise ConfigError(where=where, key="on_unattainable", value=self.on_unattainable, expected=expected)
        _check_exclusive(where, {key: getattr(self, key) for key in OVERRIDES})
        for word, promise in SAME.items():
            if getattr(self, word) is not None:
                object.__setattr__(self, promise, getattr(self, word))
                object.__setattr__(self, word, None)
        if self.name == BEST_EFFORT and self.promises:
            key = next(key for key in _PROMISES if getattr(self, key) is not None)
            raise ConfigError(where=where, key=key, value=getattr(self, key), expected="no promise in this class")
        if self.name != BEST_EFFORT and not self.promises:
            expected = f"at least one of {', '.join(_PROMISES)} (a class in the file replaces the shipped one entirely)"
            raise ConfigError(where=where, key="promises", value=None, expected=expected)

    @property
    def promises(self) -> bool:
        """Tell whether the class promises anything."""
        return any(getattr(self, key) is not None for key in _PROMISES)

    def to_json(self) -> dict[str, Any]:
        """Return the keys that are set, without the name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return {key: value for key, value in values.items() if value is not None}


_PROMISES = (*OVERRIDES, "final_tpot_ms")


def default_classes() -> dict[str, SloClass]:
    """Return the shipped classes by name."""
    shipped = (
        SloClass(name="chat", ttft_slowdown=5, tpot_ms=100),
        SloClass(name="coding", ttft_slowdown=5, tpot_ms=50),
        SloClass(name="summarization", ttft_slowdown=3, tpot_ms=100),
        SloClass(name="tool", ttft_slowdown=3, tpot_ms=50, final_tpot_ms=100),
        SloClass(name="reasoning", ttft_slowdown=3, thinking_tpot_ms=50, tpot_ms=100),
        SloClass(name=BEST_EFFORT),
    )
    return {slo_class.name: slo_class for slo_class in shipped}


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One API key, by the SHA-256 of its text (the key itself is never kept), and what its holder may do.

    `slo_class`: the class its requests are tied to. `admin`: it may switch the mode and see every tenant's requests.
    `proxy`: it belongs to a gateway, whose word about the tenant is taken.
    """

    key_sha256: str
    slo_class: str | None = None
    admin: bool = False
    proxy: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.key_sha256, str) and _SHA256.fullmatch(self.key_sha256)):
            expected = "the SHA-256 of the key as 64 hexadecimal digits"
            raise ConfigError(where="api_keys", key="key_sha256", value="(hidden)", expected=expected)
        for key in ("admin", "proxy"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(where="api_keys", key=key, value=getattr(self, key), expected="true or false")

    @staticmethod
    def digest(key: str) -> str:
        """Return what stands for `key` in a configuration."""
        return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class SloConfig:
    """The whole configuration. `ConfigError` names the key of anything that does not fit.

    `tenants`, `models` (aliases) and `api_keys` (by the tenant's name) tie requests to classes and
    override what the client says. `max_best_effort_queue` is the longest queue of best-effort requests
    before new ones get a 429 (`None`: no limit). `max_promises_per_tenant`: how many live requests of one tenant may
    hold or ask for a promise (`None`: no limit); more are served as best-effort work. `max_requests_per_tenant`: how
    many answers of one tenant an API server works on at once; more get a 429. `client_numbers`: whether
    clients may bring numbers of their own; `slo_limits` bounds each of those, as (least, most).

    Who may say what: where `api_keys` is not empty, a request without one of them is served in the default class
    whatever it asks for, or gets a 401 (`unknown_keys: refuse`). `trusted_proxies` are the addresses or networks of
    gateways whose word about the tenant is taken. `pages` says who may read `/v1/slo/*`: `open`, `admin`, or nobody
    (`off`). `max_body_bytes` bounds a request's body (413 beyond).
    """

    classes: Mapping[str, SloClass] = field(default_factory=default_classes)
    default_class: str = BEST_EFFORT
    priority_class: str | None = None
    tenants: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    api_keys: Mapping[str, ApiKey] = field(default_factory=dict)
    max_best_effort_queue: int | None = None
    unknown_keys: str = "default"
    trusted_proxies: tuple[str, ...] = ()
    pages: str = "open"
    max_body_bytes: int = 256 << 20
    max_promises_per_tenant: int | None = None
    max_requests_per_tenant: int | None = None
    client_numbers: bool = True
    slo_limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    ttft_floor_ms: float = 200.0
    ttft_allowance_ms: float = 30.0

    def __post_init__(self) -> None:
        if BEST_EFFORT not in self.classes:
            raise ConfigError(
                where="slo", key="classes", value=sorted(self.classes), expected=f"{BEST_EFFORT!r} present"
            )
        for key in ("ttft_floor_ms", "ttft_allowance_ms"):
            check_number("slo", key, getattr(self, key), unit=" of milliseconds", zero=True)
        for key in ("max_best_effort_queue", "max_promises_per_tenant", "max_requests_per_tenant"):
            limit = getattr(self, key)
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
                raise ConfigError(where="slo", key=key, value=limit, expected="a whole number, 0 or more")
        if not isinstance(self.client_numbers, bool):
            raise ConfigError(where="slo", key="client_numbers", value=self.client_numbers, expected="true or false")
        for key, bounds in self.slo_limits.items():
            _check_bounds(key, bounds)
        self._check_class("default_class", self.default_class)
        for key, name in self._named_classes():
            if name is not None:
                self._check_class(key, name)
        self._check_edge()

    def _check_edge(self) -> None:
        for key, choices in (("unknown_keys", UNKNOWN_KEYS), ("pages", PAGES)):
            if getattr(self, key) not in choices:
                raise ConfigError(
                    where="slo", key=key, value=getattr(self, key), expected=f"one of {', '.join(choices)}"
                )
        for tenant in (*self.tenants, *self.api_keys):
            if not tenant.strip() or len(tenant) > MAX_TEXT:
                expected = f"a name of 1 to {MAX_TEXT} characters"
                raise ConfigError(where="slo", key="tenants", value=tenant, expected=expected)
        for network in self.trusted_proxies:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                expected = "addresses or networks such as 10.0.0.0/8"
                raise ConfigError(where="slo", key="trusted_proxies", value=network, expected=expected) from error
        limit = self.max_body_bytes
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError(where="slo", key="max_body_bytes", value=limit, expected="a whole number, 1 or more")

    def _named_classes(self) -> list[tuple[str, str | None]]:
        named: list[tuple[str, str | None]] = [("priority_class", self.priority_class)]
        named += [(f"tenants.{tenant}", name) for tenant, name in self.tenants.items()]
        named += [(f"models.{model}", name) for model, name in self.models.items()]
        named += [(f"api_keys.{tenant}.class", key.slo_class) for tenant, key in self.api_keys.items()]
        return named

    def _check_class(self, key: str, name: object, where: str = "slo") -> None:
        if not (isinstance(name, str) and name in self.classes):
            raise ConfigError(where=where, key=key, value=name, expected=f"one of {', '.join(self.classes)}")

    def label(self, class_name: str | None, overrides: Mapping[str, object]) -> str:
        """Name the class a request is counted under; numbers without a class are `custom`."""
        if class_name is not None:
            return class_name
        return CUSTOM if any(overrides.get(key) is not None for key in OVERRIDES) else self.default_class

    def check_overrides(self, class_name: str | None, overrides: Mapping[str, object], where: str = "slo") -> None:
        """Raise `ConfigError` (a `ValueError`) that names the first field a request got wrong."""
        if class_name is not None:
            self._check_class("class", class_name, where)
        unknown = [key for key in overrides if key not in OVERRIDES and key != "stage"]
        if unknown:
            expected = f"one of {', '.join(('class', *OVERRIDES, 'stage'))}"
            raise ConfigError(where=where, key=str(unknown[0]), value=overrides[unknown[0]], expected=expected)
        for key in OVERRIDES:
            value = overrides.get(key)
            if value is not None:
                check_number(where, key, value, unit=" of milliseconds" if key.endswith("_ms") else "")
                self._check_client(where, key, float(value))  # type: ignore[arg-type] # checked above
        _check_exclusive(where, overrides)
        stage = overrides.get("stage")
        if stage is not None and stage not in STAGES:
            raise ConfigError(where=where, key="stage", value=stage, expected=f"one of {', '.join(STAGES)}")

    def _check_client(self, where: str, key: str, value: float) -> None:
        """Raise `ConfigError` for a client's number that the operator does not take."""
        if not self.client_numbers:
            raise ConfigError(where=where, key=key, value=value, expected="a class; this server takes no other numbers")
        known = SAME.get(key, key)
        least, most = self.slo_limits.get(known, SLO_LIMITS[known])
        if not least <= value <= most:
            raise ConfigError(where=where, key=key, value=value, expected=f"a number from {least:.15g} to {most:.15g}")

    def check_promising(self, class_name: object, where: str = "slo") -> None:
        """Raise `ConfigError` unless requests can be promised something under this name."""
        names = [name for name, slo_class in self.classes.items() if slo_class.promises] + [CUSTOM]
        if class_name not in names:
            raise ConfigError(where=where, key="class", value=class_name, expected=f"one of {', '.join(names)}")

    def ttl_ms(self, label: str) -> float | None:
        """Return how long a request counted under `label` may wait in the queue; None for no limit."""
        slo_class = self.classes.get(self.default_class if label == CUSTOM else label)
        return None if slo_class is None else slo_class.ttl_ms

    def resolve(
        self,
        class_name: str | None,
        overrides: Mapping[str, Any],
        prompt_tokens: int,
        reference: Callable[[int], float],
    ) -> tuple[Slo, float, bool]:
        """Return (promises, weight, whether it starts with a thinking span) of one request.

        Without a class the default class is the base. `overrides` are the client's numbers (`OVERRIDES`,
        milliseconds) and `stage` ("loop" unless said). `reference(prompt_tokens)` is the unloaded prefill
        time in seconds, asked only where TTFT is a slowdown. `ValueError` names a bad field.
        """
        self.check_overrides(class_name, overrides)
        base = self.classes[class_name if class_name is not None else self.default_class]
        ms = {key: overrides.get(key) for key in OVERRIDES}
        for word, promise in SAME.items():
            ms[promise] = ms[word] if ms[promise] is None else ms[promise]
        if ms["ttft_ms"] is None and ms["ttft_slowdown"] is None:
            ms["ttft_ms"], ms["ttft_slowdown"] = base.ttft_ms, base.ttft_slowdown
        if ms["tpot_ms"] is None:
            final = overrides.get("stage") == "final" and base.final_tpot_ms is not None
            ms["tpot_ms"] = base.final_tpot_ms if final else base.tpot_ms
        for key in PROMISES:
            if ms[key] is None and key not in {"ttft_ms", "tpot_ms"}:
                ms[key] = getattr(base, key)
        if ms["ttft_slowdown"] is not None:
            floor = self.ttft_floor_ms if base.floor_ms is None else base.floor_ms
            allowance = self.ttft_allowance_ms if base.allowance_ms is None else base.allowance_ms
            ms["ttft_ms"] = max(floor, ms["ttft_slowdown"] * reference(prompt_tokens) * 1000 + allowance)
        slo = Slo(**{f"{key.removesuffix('_ms')}_s": _seconds(ms[key]) for key in PROMISES})
        return slo, base.weight, slo.thinking_tpot_s is not None

    def to_json(self) -> dict[str, Any]:
        """Return a complete document that `from_json` turns back into an equal configuration."""
        document: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        document["classes"] = {name: slo_class.to_json() for name, slo_class in self.classes.items()}
        document["tenants"], document["models"] = dict(self.tenants), dict(self.models)
        document["trusted_proxies"] = list(self.trusted_proxies)
        document["slo_limits"] = {key: list(bounds) for key, bounds in self.slo_limits.items()}
        document["api_keys"] = {
            tenant: {"key_sha256": key.key_sha256, "class": key.slo_class, "admin": key.admin, "proxy": key.proxy}
            for tenant, key in self.api_keys.items()
        }
        return document

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str, *, where: str = "slo config") -> SloConfig:
        """Rebuild from `to_json`; nothing is added to what the document says."""
        return _parse(json.loads(data) if isinstance(data, str) else data, where, {})


def load_slo_config(source: Mapping[str, Any] | str | Path | None = None) -> SloConfig:
    """Read a YAML file; a mapping is a `to_json` document, `None` the shipped defaults."""
    if source is None:
        return SloConfig()
    if isinstance(source, Mapping):
        return SloConfig.from_json(source)
    where = str(source)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(where=where, key="file", value=reason, expected="a file that can be read") from error
    loader = _UniqueKeyLoader(text)
    loader.name = where
    try:
        document = loader.get_single_data()
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ConfigError(where=where, key="file", value=message, expected="valid YAML") from error
    finally:
        loader.dispose()
    return _parse({} if document is None else document, where, default_classes())


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuse a key written twice: YAML would silently keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                where = f"{self.name}, line {key.start_mark.line + 1}"
                raise ConfigError(where=where, key=key.value, value="(written twice)", expected="each key once")
            seen.add(key.value)
        return node


def _check_bounds(key: str, bounds: object) -> None:
    """Raise `ConfigError` unless `bounds` are the least and the most that a client may ask for under `key`."""
    if key not in OVERRIDES:
        expected = f"one of the keys {', '.join(OVERRIDES)}"
        raise ConfigError(where="slo", key=f"slo_limits.{key}", value=bounds, expected=expected)
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        raise ConfigError(where="slo", key=f"slo_limits.{key}", value=bounds, expected="two numbers: least and most")
    for bound in bounds:
        check_number("slo", f"slo_limits.{key}", bound, unit="")
    if bounds[0] > bounds[1]:
        raise ConfigError(where="slo", key=f"slo_limits.{key}", value=bounds, expected="least before most")


def _check_exclusive(where: str, values: Mapping[str, Any]) -> None:
    for one, other in EXCLUSIVE:
        if values.get(one) is not None and values.get(other) is not None:
            expected = f"either {one} or {other}, not both"
            raise ConfigError(where=where, key=other, value=values[other], expected=expected)


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def _mapping(where: str, key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(where=where, key=key, value=value, expected="a mapping")
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(where=where, key=key, value=name, expected="keys that are strings (quote it)")
    return dict(value)


def _known(where: str, prefix: str, values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for key, value in values.items():
        if key not in names:
            raise ConfigError(
                where=where, key=prefix + key, value=value, expected=f"one of the keys {', '.join(names)}"
            )


def _parse(document: object, where: str, shipped: Mapping[str, SloClass]) -> SloConfig:
    values = _mapping(where, "top level", document)
    _known(where, "", values, tuple(f.name for f in fields(SloConfig)))
    values = {key: value for key, value in values.items() if value is not None}
    proxies = values.get("trusted_proxies", ())
    if not isinstance(proxies, list | tuple) or not all(isinstance(one, str) for one in proxies):
        expected = "a list of addresses or networks such as 10.0.0.0/8"
        raise ConfigError(where=where, key="trusted_proxies", value=proxies, expected=expected)
    values["trusted_proxies"] = tuple(proxies)
    classes = dict(shipped)
    for name, section in _mapping(where, "classes", values.get("classes", {})).items():
        classes.pop(name, None)
        if section is not None:
            classes[name] = _parse_class(where, name, section)
    classes.setdefault(BEST_EFFORT, SloClass(name=BEST_EFFORT))
    values["classes"] = classes
    for key in ("tenants", "models", "slo_limits"):
        values[key] = _mapping(where, key, values.get(key, {}))
    values["slo_limits"] = {
        key: tuple(bounds) if isinstance(bounds, list) else bounds for key, bounds in values["slo_limits"].items()
    }
    api_keys = _mapping(where, "api_keys", values.get("api_keys", {}))
    values["api_keys"] = {tenant: _parse_api_key(where, tenant, section) for tenant, section in api_keys.items()}
    try:
        return SloConfig(**values)
    except ConfigError as error:
        raise ConfigError(where=where, key=error.key, value=error.value, expected=error.expected) from error


def _parse_class(where: str, name: str, section: object) -> SloClass:
    values = _mapping(where, f"classes.{name}", section)
    _known(where, f"classes.{name}.", values, tuple(f.name for f in fields(SloClass) if f.name != "name"))
    values = {key: value for key, value in values.items() if value is not None}
    try:
        return SloClass(name=name, **values)
    except ConfigError as error:
        key = f"classes.{name}.{error.key}"
        raise ConfigError(where=where, key=key, value=error.value, expected=error.expected) from error


def _parse_api_key(where: str, tenant: str, section: object) -> ApiKey:
    prefix = f"api_keys.{tenant}"
    if not isinstance(section, Mapping):
        raise ConfigError(where=where, key=prefix, value="(hidden)", expected="a mapping with key and class")
    values = _mapping(where, prefix, section)
    _known(where, f"{prefix}.", dict.fromkeys(values, "(hidden)"), ("key", "key_sha256", "class", "admin", "proxy"))
    text = values.get("key")
    if (text is None) == (values.get("key_sha256") is None) or not isinstance(text or "", str):
        expected = "a string key, or key_sha256 instead"
        raise ConfigError(where=where, key=f"{prefix}.key", value="(hidden)", expected=expected)
    digest = values.get("key_sha256") if text is None else ApiKey.digest(text)
    try:
        return ApiKey(
            key_sha256=digest,  # type: ignore[arg-type] # checked there
            slo_class=values.get("class"),
            admin=values.get("admin", False),
            proxy=values.get("proxy", False),
        )
    except ConfigError as error:
        key = f"{prefix}.{error.key}"
        raise ConfigError(where=where, key=key, value=error.value, expected=error.expected) from error
