"""What hostile clients cost those who were promised something: malformed requests, floods, slow senders, many names.

A server of one's own is offered promised traffic twice, alone and beside the abuse; the table says what every kind of
it was answered with and what became of the promised requests. Loopback addresses only: this is for one's own server.

    python benchmarks/abuse.py --target http://127.0.0.1:8000 --num-requests 10000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations")
PAGES = ("/v1/slo/classes", "/v1/slo/status", "/v1/slo/mode", "/v1/slo/requests/", "/v1/slo/", "/v1/responses/")
ANSWER_S = 20.0
IN_FLIGHT = 24
NUM_SLOW = 100
PAUSE_S = 0.25


@dataclass(frozen=True)
class Target:
    """The server, and how requests to it begin."""

    host: str
    port: int
    model: str = "m"
    key: str = ""

    def head(self, method: str, path: str, *headers: str) -> bytes:
        """Return a request's head."""
        lines = [f"{method} {path} HTTP/1.1", f"host: {self.host}", "connection: close", *headers]
        lines += [f"authorization: Bearer {self.key}"] if self.key else []
        return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"

    def post(self, path: str, body: bytes, *headers: str) -> bytes:
        """Return a request that posts JSON."""
        kind = "content-type: application/json"
        return self.head("POST", path, kind, f"content-length: {len(body)}", *headers) + body


@dataclass
class Tally:
    """What promised requests came to, or what a kind of abuse was answered with."""

    counts: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, int]:
        """Return the counts by name."""
        return dict(sorted(self.counts.items()))


def ask(target: Target, **more: object) -> dict[str, object]:
    return {"model": target.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **more}


# -- kinds of abuse: each returns the bytes of one request ------------------------------------------


def odd_value(rng: random.Random) -> object:
    deep: object = 0
    for _ in range(rng.choice((1, 50, 900))):
        deep = [deep]
    text = "".join(chr(rng.choice((0, 9, 34, 92, 233, 0x4F60, 0x1F30D))) for _ in range(rng.randrange(40)))
    numbers = (0, -1, 1e-9, 1e12, 1e308, 10**40, float("nan"), float("inf"))
    return rng.choice((None, True, [], {}, "", text, "x" * rng.choice((1, 129, 100_000)), deep, *numbers))


def bad_slo(target: Target, rng: random.Random) -> bytes:
    keys = ("class", "ttft_ms", "tpot_ms", "e2e_ms", "max_gap_ms", "stage", "tenant", "ttft_slowdown", "clas", "")
    slo = {rng.choice(keys): odd_value(rng) for _ in range(rng.randrange(4))}
    return target.post(rng.choice(PATHS), json.dumps(ask(target, slo=rng.choice((slo, odd_value(rng))))).encode())


def bad_json(target: Target, rng: random.Random) -> bytes:
    raw = json.dumps(ask(target, slo={"class": "chat"})).encode()
    cut = rng.randrange(len(raw))
    junk = bytes(rng.randrange(256) for _ in range(rng.randrange(20)))
    return target.post(rng.choice(PATHS), rng.choice((raw[:cut], raw[:cut] + junk + raw[cut:], junk, b"[" * 100_000)))


def bad_headers(target: Target, rng: random.Random) -> bytes:
    names = ("x-slo-class", "x-slo-ttft-ms", "x-slo-" + "y" * rng.randrange(300), "x-slo-tenant", "authorization")
    values = ("chat", "-1", "1e999", "\xff\xfe", "x" * 5000, "", "Bearer x", "5;5")
    headers = [f"{rng.choice(names)}: {rng.choice(values)}" for _ in range(rng.randrange(1, 9))]
    return target.post(rng.choice(PATHS), json.dumps(ask(target)).encode(), *headers)


def header_flood(target: Target, rng: random.Random) -> bytes:
    headers = [f"x-{'slo-' if rng.random() < 0.5 else ''}{i}: {'v' * rng.choice((1, 500))}" for i in range(400)]
    return target.post(rng.choice(PATHS), json.dumps(ask(target)).encode(), *headers)


def forged(target: Target, rng: random.Random) -> bytes:
    now = time.time()
    claims = {"slo_id": rng.choice(("victim", "x" * 9999)), "slo_arrival_s": now - rng.choice((59, 1e6, -1e6))}
    claims |= {"slo_tenant": f"t{rng.random()}", "slo_seal": "0" * 64, "slo_class": rng.choice(("nobody", "x" * 9999))}
    raw = json.dumps(ask(target, vllm_xargs=claims))
    return target.post(
        rng.choice(PATHS), (raw.replace("slo_id", "\\u0073lo_id") if rng.random() < 0.5 else raw).encode()
    )


def many_names(target: Target, rng: random.Random) -> bytes:
    slo = rng.choice(({"class": f"c{rng.random()}"}, {"ttft_ms": 60_000, "tpot_ms": 1000 + rng.random()}))
    names = (f"x-slo-tenant: t{rng.random()}", f"x-request-id: {rng.random()}", f"x-session-id: {rng.random()}")
    return target.post(PATHS[0], json.dumps(ask(target, slo=slo)).encode(), *names)


def odd_requests(target: Target, rng: random.Random) -> bytes:
    body = json.dumps({"mode": rng.choice(("observe", "loud", None))}).encode()
    path = rng.choice(PAGES) + rng.choice(("", "x", "%00", "../../etc/passwd", "y" * 3000))
    return rng.choice(
        (
            target.head(rng.choice(("GET", "HEAD", "DELETE", "OPTIONS", "BREW")), path),
            target.head("POST", "/v1/slo/mode", "origin: https://evil.example", f"content-length: {len(body)}") + body,
            target.head("POST", PATHS[0], "content-length: 9999999999"),
            target.head("POST", PATHS[0], "transfer-encoding: chunked") + b"zz\r\nnonsense\r\n",
            target.head("POST", PATHS[0], "content-length: 5", "content-length: 6") + b"12345",
            b"\x16\x03\x01\x02\x00\x01\x00" + bytes(rng.randrange(256) for _ in range(50)),
        )
    )


KINDS: dict[str, Callable[[Target, random.Random], bytes]] = {
    "malformed slo": bad_slo,
    "malformed JSON": bad_json,
    "malformed headers": bad_headers,
    "header flood": header_flood,
    "forged arguments": forged,
    "endless names": many_names,
    "odd requests": odd_requests,
}


# -- sending ----------------------------------------------------------------------------------------


async def exchange(target: Target, raw: bytes) -> tuple[str, bytes]:
    """Send one request; return the status, or how it ended without, and all that came back."""
    got = b""
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            try:
                writer.write(raw)
                if b"9999999999" in raw or b"nonsense" in raw:
                    writer.write_eof()
                while chunk := await reader.read(1 << 16):
                    got += chunk
            finally:
                writer.close()
    except TimeoutError:
        return "no answer", got
    except OSError:
        return (got[9:12].decode("latin-1") if got.startswith(b"HTTP/") else "closed"), got
    return (got[9:12].decode("latin-1") if got.startswith(b"HTTP/") else "closed"), got


async def abuse(target: Target, num_requests: int, seed: int, tallies: dict[str, Tally], limit_s: float) -> None:
    """Send so many hostile requests, `IN_FLIGHT` at a time, kinds in turn; on a slow machine as many as time allows."""
    rng, kinds, until = random.Random(seed), list(KINDS.items()), time.monotonic() + limit_s
    todo = iter(range(num_requests))

    async def worker() -> None:
        for i in todo:
            if time.monotonic() > until:
                return
            name, make = kinds[i % len(kinds)]
            status, _ = await exchange(target, make(target, rng))
            tallies.setdefault(name, Tally()).counts[status] += 1

    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))


async def slow_senders(target: Target, tallies: dict[str, Tally]) -> None:
    """Hold connections with a few bytes now and then, until cancelled."""
    tally = tallies.setdefault("slow senders", Tally())
    writers = []
    try:
        for i in range(NUM_SLOW):
            _, writer = await asyncio.open_connection(target.host, target.port)
            head = target.head("POST", PATHS[0], "content-length: 100000", "content-type: application/json")
            writer.write(head if i % 2 else head[:-2])
            writers.append(writer)
        tally.counts["held"] = len(writers)
        while True:
            await asyncio.sleep(PAUSE_S)
            for i, writer in enumerate(writers):
                with contextlib.suppress(OSError):
                    writer.write(b" " if i % 2 else b"x-a: b\r\n")
    finally:
        for writer in writers:
            writer.close()


async def oversized(target: Target, tallies: dict[str, Tally], *, size: int, count: int) -> None:
    """Send bodies of `size` bytes."""
    raw = target.post(PATHS[0], b'{"slo": {"class": "chat"}, "prompt": "' + b"x" * size + b'"}')
    for _ in range(count):
        status, _ = await exchange(target, raw)
        tallies.setdefault("oversized bodies", Tally()).counts[status] += 1


async def promised(target: Target, tally: Tally, slo: dict[str, float], max_tokens: int) -> None:
    """Ask for promises, one request every `PAUSE_S`, until cancelled; wait for those on their way."""
    tasks: list[asyncio.Task[None]] = []

    async def one() -> None:
        body = json.dumps(ask(target, slo=slo, stream=True, max_tokens=max_tokens, ignore_eos=True)).encode()
        status, got = await exchange(target, target.post(PATHS[0], body))
        last = [line for line in got.decode("utf-8", "replace").splitlines() if '"slo":' in line]
        said = json.loads(last[-1].removeprefix("data: "))["slo"] if last else {}
        tally.counts["offered"] += 1
        tally.counts[f"{said.get('verdict', status)}, {said.get('outcome', 'unknown')}"] += 1

    try:
        while True:
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(PAUSE_S)
    finally:
        await asyncio.gather(*tasks)


async def run(
    target: Target,
    *,
    num_requests: int,
    seed: int,
    slo: dict[str, float],
    max_tokens: int,
    alone_s: float,
    size: int,
    limit_s: float = 600.0,
    promised_key: str = "",
) -> dict[str, object]:
    """Return the table: promised traffic alone and beside the abuse, and answers by kind of abuse."""
    if target.host not in LOCAL:
        raise SystemExit(f"--target: {target.host!r}: expected this machine's own address")
    alone, beside = Tally(), Tally()
    client = replace(target, key=promised_key or target.key)
    traffic = asyncio.create_task(promised(client, alone, slo, max_tokens))
    await asyncio.sleep(alone_s)
    await _ended(traffic)
    tallies: dict[str, Tally] = {}
    started = time.monotonic()
    traffic = asyncio.create_task(promised(client, beside, slo, max_tokens))
    slow = asyncio.create_task(slow_senders(target, tallies))
    work: list[Awaitable[None]] = [abuse(target, num_requests, seed, tallies, limit_s)]
    work.append(oversized(target, tallies, size=size, count=3))
    await asyncio.gather(*work)
    seconds = time.monotonic() - started
    await _ended(slow)
    await _ended(traffic)
    kinds = {name: tally.to_json() for name, tally in tallies.items()}
    return {"alone": alone.to_json(), "beside": beside.to_json(), "abuse": kinds, "abuse_s": round(seconds, 1)}


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="m")
    parser.add_argument("--api-key", default="", help="of the hostile clients")
    parser.add_argument("--promised-key", default="", help="of the promised traffic (default: the same)")
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--ttft-ms", type=float, default=3000)
    parser.add_argument("--tpot-ms", type=float, default=500)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--alone-s", type=float, default=20)
    parser.add_argument("--oversize-mb", type=float, default=8)
    parser.add_argument("--limit-s", type=float, default=120, help="end the abuse after this long")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    url = urlsplit(args.target)
    target = Target(url.hostname or "", url.port or 80, args.model, args.api_key)
    found = asyncio.run(
        run(
            target,
            num_requests=args.num_requests,
            seed=args.seed,
            slo={"ttft_ms": args.ttft_ms, "tpot_ms": args.tpot_ms},
            max_tokens=args.max_tokens,
            alone_s=args.alone_s,
            size=int(args.oversize_mb * 2**20),
            limit_s=args.limit_s,
            promised_key=args.promised_key,
        )
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
