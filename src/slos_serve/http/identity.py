"""Who sends a request, as far as that can be known: an API key of the operator's file, or a gateway's word.

A name that a client gives itself is nobody's: tenants are those of keys, or what a trusted proxy (by its key or its
address) says. Headers that would be read in two ways (twice `Authorization`, twice the same `x-slo-*`) are refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slos_serve.config import ApiKey, SloConfig
from slos_serve.errors import SlosServeError

Headers = Iterable[tuple[bytes, bytes]]

AUTHORIZATION, API_KEY = b"authorization", b"x-api-key"
OURS = (b"x-slo-", b"x-llm-d-slo-")
FORWARDED_FOR = b"x-forwarded-for"
FORWARDED = frozenset({b"forwarded", b"via", FORWARDED_FOR, b"x-forwarded-host", b"x-real-ip"})


class RequestError(SlosServeError, ValueError):
    """Name the field of a request that is wrong, its value and what was expected."""

    def __init__(self, *, param: str, value: object, expected: str) -> None:
        self.param = param
        shown = repr(value)
        shown = shown if len(shown) <= 100 else shown[:97] + "..."
        super().__init__(f"{param} = {shown}: expected {expected}")


class UnknownKeyError(SlosServeError):
    """Say that a request brings none of the operator's API keys where it must."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends a request. `tenant` is "" for nobody known; `is_known`: what it asks for is heard.

    `names_tenants`: its word about the tenant is taken. `is_local`: it is a process on this machine, not a browser and
    not a gateway.
    """

    tenant: str = ""
    key: ApiKey | None = None
    is_known: bool = True
    names_tenants: bool = False
    is_local: bool = False


class Identities:
    """The operator's keys and proxies, indexed for one look-up per request."""

    def __init__(self, config: SloConfig) -> None:
        self._config = config
        self._keys = {key.key_sha256: (tenant, key) for tenant, key in config.api_keys.items()}
        self._networks = [ipaddress.ip_network(network) for network in config.trusted_proxies]

    @property
    def has_admin(self) -> bool:
        """Tell whether some key is an operator's."""
        return any(key.admin for _, key in self._keys.values())

    def caller(self, named: Mapping[bytes, bytes], peer: str | None) -> Caller:
        """Return who sends a request with these headers (see `single`) from the address `peer`."""
        is_proxy = self._is_proxy(peer) and not _is_hearsay(peer, named)
        tenant, key = self._keys.get(_digest(named), ("", None)) if self._keys else ("", None)
        return Caller(
            tenant=tenant,
            key=key,
            is_known=key is not None or is_proxy or not self._keys,
            names_tenants=is_proxy or (key is not None and key.proxy),
            is_local=_is_loopback(peer) and FORWARDED.isdisjoint(named) and b"origin" not in named,
        )

    def may_operate(self, caller: Caller) -> bool:
        """Tell whether a caller may switch the mode: an admin's key, or where there is none, a local process."""
        return caller.key is not None and caller.key.admin if self.has_admin else caller.is_local

    def is_operator(self, caller: Caller) -> bool:
        """Tell whether a caller may see everything: an admin, or anybody where callers are not told apart."""
        return not self._keys or (caller.key is not None and caller.key.admin)

    def may_see(self, caller: Caller, tenant: str) -> bool:
        """Tell whether a caller may see what is kept of a tenant's request."""
        return self.is_operator(caller) or caller.tenant == tenant

    def _is_proxy(self, peer: str | None) -> bool:
        address = _address(peer) if self._networks else None
        return address is not None and any(address in network for network in self._networks)


def single(headers: Headers) -> dict[bytes, bytes]:
    """Return headers by name, and refuse one that decides something and comes twice."""
    named: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in named and (name in {AUTHORIZATION, API_KEY} or name.startswith(OURS)):
            raise RequestError(param=name.decode("latin-1"), value="(written twice)", expected="this header once")
        named[name] = named[name] + b"," + value if name == FORWARDED_FOR and name in named else value
    return named


def text(value: bytes) -> str:
    """Return a header's value as its sender meant it: UTF-8, or else Latin-1."""
    try:
        return value.decode().strip()
    except UnicodeDecodeError:
        return value.decode("latin-1").strip()


def _digest(named: Mapping[bytes, bytes]) -> str:
    """Return what stands for the key of a request; "" for none. Anthropic's clients send theirs as `x-api-key`."""
    if (authorization := named.get(AUTHORIZATION)) is not None:
        scheme, _, key = authorization.decode("latin-1").partition(" ")
        return ApiKey.digest(key.strip()) if scheme.lower() == "bearer" else ""
    key = named.get(API_KEY, b"").decode("latin-1").strip()
    return ApiKey.digest(key) if key else ""


def _address(peer: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(peer or "")
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_hearsay(peer: str | None, named: Mapping[bytes, bytes]) -> bool:
    """Tell whether a peer's address may be none but what a header says: Uvicorn puts that in its place."""
    said = named.get(FORWARDED_FOR, b"").decode("latin-1").split(",")
    return any(_address(peer) in {_address(form) for form in _without_port(one.strip())} for one in said if one.strip())


def _without_port(said: str) -> tuple[str, ...]:
    """Return what may be the address in a text such as 1.2.3.4:80 or [::1]:80."""
    inside, _, after = said.removeprefix("[").partition("]")
    return (inside, said.rpartition(":")[0]) if not after or after.startswith(":") else (said,)


def _is_loopback(peer: str | None) -> bool:
    """Tell whether a peer is on this machine; one on a Unix socket has no address."""
    address = _address(peer)
    return peer is None or (address is not None and address.is_loopback)
