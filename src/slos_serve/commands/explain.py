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

from slos_serve.bench.ask import NotFoundError, get_json
from slos_serve.core.words import MEANINGS, Reason
from slos_serve.errors import ConfigError, SlosServeError

if TYPE_CHECKING:
    from slos_serve.core.types import Planner, ReplicaState
    from slos_serve.records.reader import Recording

HELP = "Say why a request was promised, demoted or late."
BINDS = {
    **MEANINGS[Reason],
    "": "nothing is in its way",
    "requested": "it asks for nothing",
    "deadline-passed": "its deadline has passed",
    "memory": "there are not enough KV blocks for it beside what is promised",
    "seats": "every seat (max_num_seqs) is taken by what is promised",
    "search": "the planner's work limit was spent before it was looked at",
    "pace": "its first token fits, its tokens after that do not fit beside what is promised",
    "compute": "the engine cannot compute its prompt in time beside what is promised",
}


UNCERTAIN = frozenset({Reason.COMPUTE, Reason.MEMORY, Reason.DEADLINE_PASSED})  # a plan can tell more


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
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the explanation."""
    if args.request_id is None and args.state is None:
        raise ConfigError(where="arguments", key="REQUEST_ID", value=None, expected="a request's id (see --help)")
    if args.target is not None:
        document = ask(args.target, args.request_id, args.api_key or os.environ.get("OPENAI_API_KEY"))
        text = as_answer(document)
    elif args.record is not None:
        document = look_up(args.record, args.request_id)
        text = "\n".join([*as_history(document), *map(as_text, document["explanations"])])
    else:
        document = {"explanations": explain_state(args.state, args.request_id)}
        text = "\n".join(map(as_text, document["explanations"]))
    print(json.dumps(document, indent=1) if args.json else text)
    return 0


# -- a server ---------------------------------------------------------------------------------------


def ask(target: str, request_id: str, api_key: str | None) -> dict[str, Any]:
    """Return what a server knows of a request; `SlosServeError` where it does not answer."""
    if not target.startswith(("http://", "https://")):
        expected = "a URL such as http://127.0.0.1:8000"
        raise ConfigError(where="arguments", key="--target", value=target, expected=expected)
    base = target.rstrip("/").removesuffix("/v1")
    try:
        document = get_json(f"{base}/v1/slo/requests/{urllib.parse.quote(request_id, safe='')}", api_key)
    except NotFoundError:
        expected = f"a recent request with an SLO that {base} has served"
        raise ConfigError(where="arguments", key="REQUEST_ID", value=request_id, expected=expected) from None
    if "verdict" not in document:
        raise SlosServeError(f"{base} does not answer like a server of slos-serve")
    return document


def as_answer(record: Mapping[str, Any]) -> str:
    """Return what a server said, for people."""
    lines = [f"{record.get('request_id') or record.get('id')} ({record.get('class')}): {record['verdict']}"]
    reason = record.get("reason")
    if reason:
        lines[0] += f", reason {reason}" + (f": {BINDS[reason]}" if reason in BINDS else "")
    for word in ("promise", "asked"):
        times = ", ".join(f"{key.removesuffix('_ms')} {ms:g} ms" for key, ms in (record.get(word) or {}).items())
        lines += [f"  {word}{'d' if word == 'promise' else ''}: {times}"] if times else []
    said = {"predicted_ttft_ms": "first token predicted", "slack_ms": "to spare", "ttft_ms": "first token came"}
    said |= {"tpot_ms": "per token", "promise_lead_ms": "promised before its deadline by"}
    lines += [f"  {text}: {record[key]:.0f} ms" for key, text in said.items() if record.get(key) is not None]
    if record.get("outcome"):
        stages = ", ".join(f"{stage} {outcome}" for stage, outcome in (record.get("stages") or {}).items() if outcome)
        lines.append(f"  outcome: {record['outcome']}" + (f" ({stages})" if stages else ""))
    else:
        lines.append("  it has not ended yet")
    if reason in UNCERTAIN:
        lines.append("  what would have helped: start the server with --record FILE, then explain --record FILE")
    return "\n".join(lines)


# -- a record ---------------------------------------------------------------------------------------


def look_up(path: Path, request_id: str) -> dict[str, Any]:
    """Return what a record says of a request and, where its plan was kept, the explanation."""
    from slos_serve.records.reader import read_recording  # noqa: PLC0415

    recording = read_recording(path)
    name = recording.find_request(request_id)
    if name is None:
        some = ", ".join(line["request_id"] for line in recording.requests[:3]) or "none"
        expected = f"one of {len(recording.requests)} requests in {path} ({some}, ...)"
        raise ConfigError(where="arguments", key="REQUEST_ID", value=request_id, expected=expected)
    recorded = recording.plan_about(name)
    found = [] if recorded is None else [_explain(recorded.state(), name, recording.planner())]
    return {"request_id": name, "history": history(recording, name), "explanations": found}


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
    lines = [f"{document['request_id']}: {past['verdict'] or 'no verdict'}, outcome {past['outcome']}"]
    if past["ttft_ms"] is not None:
        due = "" if past["ttft_due_ms"] is None else f", due within {past['ttft_due_ms']:.0f} ms"
        predicted = past["predicted_ttft_s"]
        told = "" if predicted is None else f", predicted {predicted * 1e3:.0f} ms"
        lines.append(f"  first token after {past['ttft_ms']:.0f} ms{due}{told}")
    if past["num_steps_over_plan"]:
        steps = f"{past['num_steps_over_plan']} of {past['num_steps_before_first_token']} steps before it"
        lines.append(f"  {steps} outlasted prediction and margin, by {past['over_plan_s'] * 1e3:.0f} ms together")
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
    if found["later_s"] is not None:
        lines.append(f"  it could be promised if its first token were due {found['later_s'] * 1e3:.0f} ms later")
    if found["without"]:
        lines.append(f"  or without any one of {', '.join(found['without'])}")
    if found["alone_s"] is not None:
        lines.append(f"  an idle engine would take {found['alone_s'] * 1e3:.0f} ms to its first token")
    return "\n".join(lines)
