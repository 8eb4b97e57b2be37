"""The verb `config`: the configuration that a server would run with, as a file to start from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from slos_serve.config import SloConfig, default_classes, load_slo_config

HELP = "Print the effective latency classes and who gets which, as a commented YAML file."

KEYS = {
    "default_class": "of requests that ask for nothing",
    "priority_class": "what `service_tier: priority` means; null: it is answered with reason no-priority-class",
    "ttft_floor_ms": "no slowdown promises a first token sooner than this",
    "ttft_allowance_ms": "added to every slowdown: what the way to the client may take",
    "max_best_effort_queue": "so many requests without a promise may wait, then 429; null: no limit",
    "max_promises_per_tenant": "so many live requests of one tenant may hold or ask for a promise; null: no limit",
    "max_requests_per_tenant": "so many answers of one tenant may be under way, then 429; null: no limit",
    "client_numbers": "whether clients may bring numbers of their own, or name classes only",
    "slo_limits": "number: [least, most] that a client may ask for; default: 1 ms to a day, slowdowns 1 to 1000",
    "unknown_keys": "requests without one of api_keys: default (served in the default class) or refuse (401)",
    "trusted_proxies": "addresses or networks of gateways whose x-slo-tenant is believed",
    "pages": "who may read /v1/slo/*: open, admin or off",
    "max_body_bytes": "longer bodies get a 413",
    "tenants": "tenant: class, whatever its requests ask for",
    "models": "model name: class, whatever its requests ask for",
    "api_keys": "tenant: {key: ..., or key_sha256: ..., class: ..., admin: may operate, proxy: may name tenants}",
    "classes": "one promise or more each; a class here replaces the shipped one of its name, null removes it",
}
CLASS_KEYS = {
    "ttft_ms": "first token within this",
    "ttft_slowdown": "first token within so many times the unloaded prefill of its prompt",
    "floor_ms": "in place of ttft_floor_ms",
    "allowance_ms": "in place of ttft_allowance_ms",
    "tpot_ms": "each further token within this, counted together from the first one on",
    "final_tpot_ms": "in place of tpot_ms in the last round of a tool conversation",
    "thinking_tpot_ms": "in place of tpot_ms while it thinks",
    "e2e_ms": "last token within this",
    "ttlt_ms": "another word for e2e_ms: time to last token",
    "max_gap_ms": "no silence longer than this",
    "weight": "what a promise of this class is worth beside others",
    "output_tokens_hint": "how long answers are, until that is learnt",
    "on_unattainable": "best-effort: serve it late; reject: 429",
    "ttl_ms": "longest wait in the queue without a promise",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `config`."""
    parser.epilog = "example:\n  slos-serve config > classes.yaml"
    parser.add_argument("--slo-config", type=Path, metavar="FILE", help="application classes, YAML (default: shipped)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    config = load_slo_config(args.slo_config)
    print(json.dumps(config.to_json(), indent=1) if args.json else as_yaml(config), end="\n" if args.json else "")
    return 0


def as_yaml(config: SloConfig) -> str:
    """Return a file that `load_slo_config` reads as the same configuration."""
    document = config.to_json()
    lines = ["# Application classes of slos-serve: give it to serve with --slo-config FILE. Times in milliseconds."]
    for key, comment in KEYS.items():
        value = document[key]
        lines.append(f"# {comment}")
        if key != "classes" and value not in ({}, []):
            lines += yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).splitlines()
        elif key != "classes":
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join([*lines, "classes:", *_classes(config)]) + "\n"


def _classes(config: SloConfig) -> list[str]:
    lines, explained = [], set()
    for name, one in config.classes.items():
        values = {key: value for key, value in one.to_json().items() if key in CLASS_KEYS}
        lines.append(f"  {json.dumps(name)}:")
        for key, value in values.items():
            comment = "" if key in explained else f"  # {CLASS_KEYS[key]}"
            explained.add(key)
            lines.append(f"    {key}: {json.dumps(value)}{comment}")
    return lines + [f"  {name}: null" for name in default_classes() if name not in config.classes]
