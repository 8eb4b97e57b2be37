"""`slos-serve explain`: why a request was promised, demoted or late."""

from __future__ import annotations

import argparse
import json
import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.bench.http_json import NotFoundError, get_json
from slos_serve.core.story import BINDS, advice, story
from slos_serve.errors import ConfigError, SlosServeError
from slos_serve.http.picture import picture, standalone

if TYPE_CHECKING:
    from slos_serve.core.types import Planner, ReplicaState
    from slos_serve.records.reader import Recording

HELP = "Say why a request was promised, demoted or late."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `explain`."""
    parser.usage = "slos-serve explain [REQUEST_ID] (--target URL | --record FILE | --state FILE) [--json]"
    parser.epilog = (
        "examples:\n"
        "  slos-serve explain chatcmpl-8f2 --target http://127.0.0.1:8000\n"
        "  slos-serve explain chatcmpl-8f2 --record run.jsonl\n"
        "  slos-serve explain --state /tmp/slos-serve-fault-71-1-plan.json"
    )
    parser.add_argument("request_id", metavar="REQUEST_ID", nargs="?", help="by the answer's id, or the engine's")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--target", metavar="URL", help="ask the server what it knows")
    source.add_argument("--record", metavar="FILE", type=Path, help="look it up in what serve --record wrote")
    source.add_argument("--state", metavar="FILE", type=Path, help="a recorded planner input (every request of it)")
    parser.add_argument("--api-key", metavar="KEY", help="with --target (default: $OPENAI_API_KEY)")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw its tokens against their deadlines (SVG)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the explanation."""
    if args.request_id is None and args.state is None:
        raise ConfigError(where="arguments", key="REQUEST_ID", value=None, expected="a request's id (see --help)")
    if args.target is not None:
        document = ask(args.target, args.request_id, args.api_key or os.environ.get("OPENAI_API_KEY"))
        text = as_answer(document)
        draw(args.picture, document.get("request", document))
    elif args.record is not None:
        document = look_up(read(args.record), args.request_id)
        text = "\n".join([*as_history(document), *map(as_text, document["explanations"])])
        draw(args.picture, document["record"])
    else:
        document = {"explanations": explain_state(args.state, args.request_id)}
        text = "\n".join(map(as_text, document["explanations"]))
    print(json.dumps(document, indent=1) if args.json else text)
    return 0


def draw(path: Path | None, record: Mapping[str, Any]) -> None:
    """Write the picture of a request; `SlosServeError` where there is nothing to draw."""
    if path is None:
        return
    svg = picture(record)
    if not svg:
        raise SlosServeError("there is nothing to draw: no token came and none was due")
    path.write_text(standalone(svg), encoding="utf-8")


# -- a server ---------------------------------------------------------------------------------------


def ask(target: str, request_id: str, api_key: str | None) -> dict[str, Any]:
    """Return what a server knows of a request, its record's own fields too; `SlosServeError` where it says nothing."""
    if not target.startswith(("http://", "https://")):
        expected = "a URL such as http://127.0.0.1:8000"
        raise ConfigError(where="arguments", key="--target", value=target, expected=expected)
    base = target.rstrip("/").removesuffix("/v1")
    where = f"{base}/v1/slo/requests/{urllib.parse.quote(request_id, safe='')}"
    try:
        document = get_json(f"{where}/explanation", api_key)
    except NotFoundError:
        document = _ask_plainly(where, base, request_id, api_key)  # an older server, or it knows nothing
    if "verdict" not in document.get("request", document):
        raise SlosServeError(f"{base} does not answer like a server of slos-serve")
    return {**document, **document.get("request", {})}


def _ask_plainly(where: str, base: str, request_id: str, api_key: str | None) -> dict[str, Any]:
    try:
        return get_json(where, api_key)
    except NotFoundError:
        expected = f"a recent request with an SLO that {base} has served"
        raise ConfigError(where="arguments", key="REQUEST_ID", value=request_id, expected=expected) from None


def as_answer(document: Mapping[str, Any]) -> str:
    """Return what a server said, for people: the sentences of its page."""
    record = document.get("request", document)
    lines = [f"{record.get('request_id') or record.get('id')} ({record.get('class')})"]
    lines += document.get("story") or story(record)
    if document.get("note"):
        lines.append(f"Not explained further: {document['note']}.")
    return "\n  ".join(lines)


# -- a record ---------------------------------------------------------------------------------------


def read(path: Path) -> Recording:
    """Read a record; what is heavy is imported for it alone."""
    from slos_serve.records.reader import read_recording  # noqa: PLC0415

    return read_recording(path)


def look_up(recording: Recording, request_id: str) -> dict[str, Any]:
    """Return what a record says of a request and, where its plan was kept, the explanation."""
    name = recording.find_request(request_id)
    if name is None:
        some = ", ".join(line["request_id"] for line in recording.requests[:3]) or "none"
        expected = f"one of {len(recording.requests)} requests in {recording.path} ({some}, ...)"
        raise ConfigError(where="arguments", key="REQUEST_ID", value=request_id, expected=expected)
    recorded = recording.plan_about(name)
    found = [] if recorded is None else [_explain(recorded.state(), name, recording.planner())]
    end = next((line for line in recording.requests if line["request_id"] == name), None)
    past = history(recording, name)
    record = {} if end is None else {**as_record(end), **past}
    return {"request_id": name, "history": past, "record": record, "explanations": found}


def as_record(end: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a request that has ended as a server's record of it (see `core.story`)."""
    asked = {key.removesuffix("_s") + "_ms": round(value * 1e3, 3) for key, value in end["slo"].items() if value}
    keys = ("request_id", "verdict", "reason", "outcome", "promised", "stages", "ttft_ms", "tpot_ms", "tokens")
    more = ("arrival_s", "num_prompt_tokens", "num_output_tokens", "num_thinking_tokens")
    known = {key: end[key] for key in (*keys, *more) if end.get(key) is not None}
    word = "promise" if end.get("promised") else "asked"
    return {"id": end.get("slo_id") or end["request_id"], "class": end["slo_class"], word: asked, **known}


def history(recording: Recording, request_id: str) -> dict[str, Any]:
    """Return how a request fared: what was predicted, what came, and by how much steps outlasted their plans."""
    end = next((line for line in recording.requests if line["request_id"] == request_id), None)
    if end is None:
        return {}
    verdicts = [
        verdict
        for plan in recording.plans
        for verdict in plan.document["plan"]["verdicts"]
        if verdict["request_id"] == request_id
    ]
    until = end["t"] if end.get("first_token_s") is None else end["first_token_s"]
    steps = [step for step in recording.steps if end["arrival_s"] <= step["t"] <= until and step.get("planned_s")]
    over = [step["seconds"] - step["planned_s"] for step in steps if step["seconds"] > step["planned_s"]]
    keys = ("outcome", "verdict", "reason", "promised", "stages", "ttft_ms", "tpot_ms")
    return {
        **{key: end.get(key) for key in keys},
        "ttft_due_ms": end["slo"]["ttft_s"] * 1e3 if end["slo"].get("ttft_s") else None,
        "predicted_ttft_s": next((v["predicted_ttft_s"] for v in verdicts if v["promised"]), None),
        "num_steps_before_first_token": len(steps),
        "num_steps_over_plan": len(over),
        "over_plan_s": sum(over),
    }


def as_history(document: Mapping[str, Any]) -> list[str]:
    """Return how a request fared, for people."""
    past = document["history"]
    if not past:
        return [f"{document['request_id']}: it had not ended when the record was written"]
    predicted = past["predicted_ttft_s"]
    record = {**document["record"], "predicted_ttft_ms": None if predicted is None else predicted * 1e3}
    lines = [f"{document['request_id']} ({record['class']})", *(f"  {line}" for line in story(record))]
    if not document["explanations"]:
        lines.append("  no plan that knew it was kept (plans are rationed)")
    return lines


# -- a state ----------------------------------------------------------------------------------------


def explain_state(path: Path, request_id: str | None) -> list[dict[str, Any]]:
    """Return explanations of one request or all of a state file, the planner being ours."""
    from slos_serve.core.planner import SloPlanner  # noqa: PLC0415

    state = read_state(path)
    names = state.requests.request_ids
    if request_id is not None and request_id not in names:
        expected = f"one of {', '.join(names[:5]) or 'no requests'}{', ...' if len(names) > 5 else ''}"
        raise ConfigError(where=str(path), key="REQUEST_ID", value=request_id, expected=expected)
    planner = SloPlanner(reserve=1.0)  # whether it can be kept, not whether a promise would wait for the prompt's end
    return [_explain(state, name, planner) for name in (names if request_id is None else [request_id])]


def read_state(path: Path) -> ReplicaState:
    """Read a planner input: a state's own file, or a line of a record; `ConfigError` where it is neither."""
    from slos_serve.core.types import ReplicaState  # noqa: PLC0415

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("kind") == "plan":
            document = document["state"]
        return ReplicaState.from_json(document)
    except OSError as error:
        expected = f"a file with a planner input ({error.strerror})"
        raise ConfigError(where="arguments", key="--state", value=str(path), expected=expected) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        expected = f"a planner input, slos-serve-state/1 ({reason})"
        raise ConfigError(where="arguments", key="--state", value=str(path), expected=expected) from None


def _explain(state: ReplicaState, name: str, planner: Planner) -> dict[str, Any]:
    from slos_serve.core.explain import explain  # noqa: PLC0415

    return asdict(explain(state, name, planner))


def as_text(found: Mapping[str, Any]) -> str:
    """Return one explanation for people."""
    name = f"{found['request_id']} ({found['slo_class']})"
    spare = found["slack_s"]
    if found["is_promised"]:
        line = f"{name}: promised" if found["tier"] == "promised" else f"{name}: can be promised now"
        if spare is not None:
            line += f", {spare * 1e3:.0f} ms to spare"
        if found["predicted_ttft_s"] is not None:
            line += f", first token predicted {found['predicted_ttft_s'] * 1e3:.0f} ms after its arrival"
        return line
    what = "its promise is let go" if found["let_go"] else "not promised"
    lines = [f"{name}: {what} ({found['binding']}): {BINDS[found['binding']]}"]
    if found["is_late"]:
        lines.append("  a token of it has been late already")
    elif spare is not None and spare < 0:
        lines.append(f"  it misses by {-spare * 1e3:.0f} ms")
    if found["num_output_tokens"] and not found["let_go"]:
        lines.append("  its first token came without a promise; it is served beside the promises and graded")
    if found["num_at_risk"] and not found["let_go"]:
        lines.append(f"  {found['num_at_risk']} promises cannot be kept as it is: nothing new is promised until then")
    lines += [f"  {line}" for line in advice(found)[1:]]
    return "\n".join(lines)
