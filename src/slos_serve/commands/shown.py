"""What the live page shows of a run that is over, from the files that a run leaves; see `http.live.holding`.

Read are records of `serve --record`, folders that `bench --out` and `simulate --out` wrote, and single documents of
`--json`, which know sums alone. A line that was cut off is left out and said; what is of another version is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from slos_serve.commands.explain import as_record, history, look_up
from slos_serve.core.slo.summary import OUTCOMES
from slos_serve.core.story import TROUBLE, state_of, story
from slos_serve.errors import ConfigError
from slos_serve.http.broadcast import row
from slos_serve.http.history import History
from slos_serve.http.picture import picture
from slos_serve.records.reader import Recording, read_recording

WIDTHS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
SAID = {"declined": "best-effort", "rejected": "rejected"}
MOST_BUCKETS, MOST_LISTED, MOST_TOLD = 120, 1000, 300
Document = dict[str, Any]


def read(path: Path, *, num_explained: int = 0, on_progress: Callable[[int], None] = lambda _: None) -> Document:
    """Return the page's document of a file or folder; `ConfigError` where it is nothing that can be shown."""
    if path.is_dir():
        return _of_folder(path)
    first = _first_line(path)
    if first is not None and first.get("kind") == "engine":
        return _of_record(read_recording(path), num_explained, on_progress)
    if path.name == "requests.jsonl":
        return _of_folder(path.parent)
    return _of_sums(path)


def _first_line(path: Path) -> Document | None:
    try:
        with path.open("rb") as file:
            line = json.loads(file.readline() or b"null")
    except ValueError:
        return None
    except OSError as error:
        raise _no(path, f"a file that can be read ({error.strerror})") from None
    return line if isinstance(line, dict) else None


def _no(path: Path, expected: str) -> ConfigError:
    return ConfigError(where="arguments", key="FILE", value=str(path), expected=expected)


# -- a record ----------------------------------------------------------------------------------------


def _of_record(recording: Recording, num_explained: int, on_progress: Callable[[int], None]) -> Document:
    records = [as_record(line) for line in recording.requests]
    ends = [(line["t"], line) for line in recording.requests]
    document = _document(
        f"Record {recording.path.name}",
        records,
        ends=[(at_s, record) for (at_s, _), record in zip(ends, records, strict=True)],
        steps=recording.steps,
        left_out=recording.num_skipped,
    )
    mode = {"enforce": "enforced", "observe": "observed"}.get(str(recording.engine.get("mode")), "ran")
    document["status"] = {
        "model": recording.engine.get("model"),
        "said": f"A record of a server that {mode}, vLLM {recording.engine.get('vllm')}.",
        **({"device": recording.engine["device"]} if recording.engine.get("device") else {}),
    }
    troubled = [record["request_id"] for record in records if state_of(record) in TROUBLE]
    for done, name in enumerate(troubled[-num_explained:] if num_explained else []):
        on_progress(done)
        told = look_up(recording, name)
        found = told["explanations"][0] if told["explanations"] else None
        record = {**told["record"], **history(recording, name)}
        document["explanations"][record["id"]] = _told(record, found)
    return document


# -- what bench and simulate leave ---------------------------------------------------------------------


def _of_folder(folder: Path) -> Document:
    skipped: list[str] = []
    rows = list(_lines(folder / "requests.jsonl", skipped))
    steps = list(_lines(folder / "steps.jsonl", skipped)) if (folder / "steps.jsonl").exists() else []
    records = [_of_row(one, folder) for one in rows]
    ends = [
        (one.get("finished_s") or one.get("sent_s") or 0.0, record) for one, record in zip(rows, records, strict=True)
    ]
    document = _document(folder.resolve().name, records, ends=ends, steps=steps, left_out=len(skipped))
    results = folder / "results.json"
    said = _json(results) if results.exists() else {}
    what = f"{len(rows)} requests offered to {said['target']}" if said.get("target") else "A simulated run"
    systems = ", ".join(said.get("systems") or ())
    document["status"] = {"model": said.get("model") or said.get("hardware"), "said": f"{what}: {systems}."}
    if said.get("device"):
        document["status"]["device"] = said["device"]
    return document


def _of_row(one: Mapping[str, Any], folder: Path) -> Document:
    try:
        slo = {key.removesuffix("_s") + "_ms": value * 1e3 for key, value in one["slo"].items()}
        times = {key: None if one[f"{key}_s"] is None else one[f"{key}_s"] * 1e3 for key in ("ttft", "tpot")}
        sent_s = float(one["sent_s"])
        return {
            "id": one["request_id"],
            "class": one["class"],
            "arrival_s": sent_s,
            **{key: one[key] for key in ("outcome", "promised", "stages")},
            "verdict": one.get("verdict") or SAID.get(one["outcome"], "promised" if one["promised"] else ""),
            "reason": one.get("reason") or "",
            "promise" if one["promised"] else "asked": slo,
            "ttft_ms": times["ttft"],
            "tpot_ms": times["tpot"],
            "num_prompt_tokens": one["prompt_tokens"],
            "num_output_tokens": one["output_tokens"],
            "tokens": [[round((at_s - sent_s) * 1e3, 1), count] for at_s, count in one.get("chunks") or ()],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        expected = f"requests as this version of bench and simulate write them ({error!r})"
        raise ConfigError(where=str(folder / "requests.jsonl"), key="line", value="...", expected=expected) from None


def _lines(path: Path, skipped: list[str]) -> Iterable[Document]:
    try:
        raw = path.read_bytes().splitlines()
    except OSError as error:
        raise _no(path.parent, f"a folder that bench --out or simulate --out wrote ({error.strerror})") from None
    for line in raw:
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        if isinstance(document, dict):
            yield document
        else:
            skipped.append(str(path))


def _json(path: Path) -> Document:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "it ends too early, or is no JSON" if isinstance(error, ValueError) else error.strerror
        raise _no(path, f"a record, a folder of --out, or a JSON document of bench or simulate ({reason})") from None
    if not isinstance(document, dict):
        raise _no(path, "a record, a folder of --out, or a JSON document of bench or simulate")
    return document


# -- sums alone ----------------------------------------------------------------------------------------


def _of_sums(path: Path) -> Document:
    """Return the page of one run's summary: no times, so no course and no requests."""
    document = _json(path)
    systems = document.get("systems") or {document.get("system"): [document]}
    entries = [one for every in systems.values() for one in every if isinstance(one, dict) and "by_class" in one]
    if len(entries) != 1:
        expected = "one run of bench or simulate, with its sums by class"
        raise _no(path, expected + (f" ({len(entries)} runs are in it)" if entries else ""))
    (entry,) = entries
    classes = {name: _counts(one) for name, one in entry["by_class"].items()}
    made = _document(path.stem, [], ends=[], steps=[], left_out=0)
    where = f" on {entry['hardware']}" if entry.get("hardware") else ""
    made["status"] = {"said": f"{entry.get('system')}{where}, {entry.get('scenario')}: sums alone, no requests."}
    return {**made, "totals": classes, "buckets": [{"t": 0.0, "classes": classes}]}


def _counts(one: Mapping[str, Any]) -> Document:
    counts = {outcome: one.get(outcome) or 0 for outcome in OUTCOMES}
    counted = sum(counts.values()) - counts["cancelled"]
    kept, promised = one.get("kept") or 0, one.get("promised") or 0
    return {**counts, "counted": counted, "kept": kept, "broken": promised - kept}


# -- the document ----------------------------------------------------------------------------------------


def _document(
    title: str,
    records: list[Document],
    *,
    ends: list[tuple[float, Document]],
    steps: Iterable[Mapping[str, Any]],
    left_out: int,
) -> Document:
    """Return the page's document; times count from the run's beginning."""
    steps = [one for one in steps if "t" in one and "seconds" in one]
    times = [float(at_s) for at_s, _ in ends] + [float(one["t"]) for one in steps]
    times += [record["arrival_s"] for record in records]
    start_s, end_s = min(times, default=0.0), max(times, default=0.0)
    width_s = next((width for width in WIDTHS_S if (end_s - start_s) / width <= MOST_BUCKETS), WIDTHS_S[-1])
    course = History(bucket_s=width_s, num_buckets=1 << 30)
    for at_s, record in ends:
        course.take_end(
            at_s - start_s, record["class"], {**record, "asked": record.get("promise") or record.get("asked")}
        )
    for one in steps:
        course.take_steps(one["t"] - start_s, [_step(one)])
    for record in records:
        record["arrival_s"] -= start_s
    listed = [record for record in records if state_of(record) in TROUBLE][-MOST_LISTED:]
    listed += [record for record in records if state_of(record) not in TROUBLE][-MOST_LISTED:]
    cut = f"; {left_out} lines that were cut off are left out" if left_out else ""
    return {
        "title": title,
        "said": f"{end_s - start_s:.0f} s{cut}",
        "now": end_s - start_s,
        "bucket_s": width_s,
        "buckets": course.since(),
        "totals": course.totals(),
        "requests": [row(record) for record in listed],
        "explanations": {record["id"]: _told(record, None) for record in listed[:MOST_TOLD]},
    }


def _step(one: Mapping[str, Any]) -> tuple[Any, ...]:
    tokens, requests = int(one.get("num_tokens") or 0), int(one.get("num_requests") or 0)
    guess = max(0, tokens - requests) if one.get("has_prefill") else 0  # older records do not say
    prompt = one.get("num_prompt_tokens")
    return (
        float(one["seconds"]),
        one.get("predicted_s"),
        one.get("planned_s"),
        tokens,
        guess if prompt is None else int(prompt),
        0 if one.get("has_prefill") or not one.get("draft_steps") else max(0, tokens - requests),
        requests,
    )


def _told(record: Mapping[str, Any], found: Mapping[str, Any] | None) -> Document:
    ids = {key: record.get(key) for key in ("id", "request_id")}
    return {"story": story(record, found), "picture": picture(record), "request": ids}
