"""Build the application: what Ray's own `build_openai_app` takes, and an `slo` block beside it.

    import_path: slos_serve.ray_serve.app:build_openai_app
    args:
      llm_configs: [...]                  # as for ray.serve.llm:build_openai_app
      slo: {mode: enforce, config: classes.yaml, profile: profile.json, router: slo}

`slo` may hold every setting of the scheduler plug-in. Files named there are read here, once, and travel with
the application, so that other machines need none of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ray.serve.llm import LLMConfig, build_llm_deployment

from slos_serve.config import load_slo_config
from slos_serve.errors import ConfigError
from slos_serve.named import check_router
from slos_serve.ray_serve import ingress, names
from slos_serve.ray_serve.server import SloServer, digest_of, slo_settings
from slos_serve.records.profile import Profile

WHERE = "args"
SCHEDULER = "slos_serve.vllm_plugin.scheduler.AutoSloScheduler"
ROUTER = "slos_serve.ray_serve.router.SloRequestRouter"
POLICY = "slos_serve.ray_serve.autoscaling:HeadroomPolicy"
TRACES = "otlp_traces_endpoint"  # vLLM's setting of where spans go
RAYS_OWN = "ray"  # the router that Ray uses by itself
PATIENCE_S = 300.0
DEPLOYMENT = {
    "health_check_period_s": 2.0,
    "health_check_timeout_s": 10.0,
    "graceful_shutdown_timeout_s": PATIENCE_S,  # what is promised is finished first
    "graceful_shutdown_wait_loop_s": 0.5,
}
STATS_PERIOD_S = 0.5
GUARD_MS = 30.0  # what the way through Ray adds to a first token: benchmarks/cluster.py path
INGRESS = {"ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": PATIENCE_S}


def build_openai_app(args: dict[str, Any]) -> Any:
    """Return the Serve application. `ConfigError` names what is wrong in the `slo` block or clashes with us."""
    document = dict(args)
    slo, routing = read_slo(document.pop("slo", None))
    if document.get("ingress_cls_config"):
        value = document["ingress_cls_config"]
        raise ConfigError(where=WHERE, key="ingress_cls_config", value=value, expected="none: we bring our own ingress")
    wanted = [_as_mapping(one) for one in document.pop("llm_configs", None) or ()]
    document["llm_configs"] = [replica_document(one, slo, routing) for one in wanted]
    parsed = names.LLMServingArgs.model_validate(document)
    configs: list[LLMConfig] = parsed.llm_configs
    options = names.merge_options(
        names.merge_options(ingress.SloIngress.get_deployment_options(configs), INGRESS),
        parsed.ingress_deployment_config,
    )
    return ingress.deployment(options).bind(
        llm_deployments={one.model_id: build_llm_deployment(one) for one in configs},
        model_cards={one.model_id: names.to_model_metadata(one.model_id, one) for one in configs},
        lora_paths={one.model_id: one.lora_config.dynamic_lora_loading_path for one in configs if one.lora_config},
        slo={key: slo[key] for key in ("config", "mode", "class_modes", "profile") if key in slo},
        digests={one.model_id: digest_of(one.model_id, slo_settings(one)) for one in configs},
        traces_to=next(filter(None, (one.engine_kwargs.get(TRACES) for one in configs)), None),
    )


def read_slo(given: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the scheduler's settings, files replaced by what they say, and the router's configuration."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(where=WHERE, key="slo", value=given, expected="a mapping")
    slo = dict(given or {})
    router, options = slo.pop("router", "slo"), slo.pop("router_options", {})
    check_router(str(router), where=WHERE, key="slo.router", more=(RAYS_OWN,))
    if not isinstance(options, Mapping):
        raise ConfigError(where=WHERE, key="slo.router_options", value=options, expected="a mapping")
    slo["config"] = load_slo_config(slo.get("config")).to_json()
    profile = slo.get("profile")
    if profile:
        slo["profile"] = read_profile(profile)
    slo.setdefault("guard_ms", GUARD_MS)
    slo |= {"publish_replica": True, "state": False}  # what was learnt is not shared by replicas of one machine
    if router == RAYS_OWN:
        return slo, {}
    if slo.get("record"):
        options = {"record": str(slo["record"]), **options}
    return slo, {
        "request_router_class": ROUTER,
        "request_router_kwargs": {"policy": router, **options},
        "request_routing_stats_period_s": STATS_PERIOD_S,
        "request_routing_stats_timeout_s": 5.0,
    }


def read_profile(given: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return a profile document, from a file if it is a path."""
    try:
        found = Profile.from_json(given, where=WHERE) if isinstance(given, Mapping) else Profile.load(Path(given))
    except ValueError as error:
        expected = f"a profile made by slos-serve profile ({error})"
        raise ConfigError(where=WHERE, key="slo.profile", value=str(given)[:100], expected=expected) from error
    return dict(found.document)


def _as_mapping(given: Mapping[str, Any] | str | LLMConfig) -> dict[str, Any]:
    if isinstance(given, LLMConfig):
        return dict(given.model_dump(exclude_unset=True))
    if isinstance(given, str):
        try:
            given = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            expected = f"a readable YAML file ({error})"
            raise ConfigError(where=WHERE, key="llm_configs", value=given, expected=expected) from error
    if not isinstance(given, Mapping):
        raise ConfigError(where=WHERE, key="llm_configs", value=given, expected="mappings, or paths of YAML files")
    return copy.deepcopy(dict(given))


def replica_document(given: Mapping[str, Any], slo: Mapping[str, Any], routing: Mapping[str, Any]) -> dict[str, Any]:
    """Return an `LLMConfig` document with our scheduler, server and router in it; what it says itself stays."""
    document = dict(given)
    engine = dict(document.get("engine_kwargs") or {})
    scheduler = engine.setdefault("scheduler_cls", SCHEDULER)
    if not str(scheduler).startswith("slos_serve."):
        raise ConfigError(where=WHERE, key="scheduler_cls", value=scheduler, expected="none: we bring our own")
    additional = dict(engine.get("additional_config") or {})
    engine["additional_config"] = {**additional, "slo": {"edge": True, **slo, **(additional.get("slo") or {})}}
    server = document.setdefault("server_cls", SloServer)
    if server is not SloServer and not (isinstance(server, type) and issubclass(server, SloServer)):
        expected = "none, or a subclass of slos_serve.ray_serve.server.SloServer"
        raise ConfigError(where=WHERE, key="server_cls", value=server, expected=expected)
    document["engine_kwargs"] = engine
    document["experimental_configs"] = {
        "stream_batching_interval_ms": 0,
        **(document.get("experimental_configs") or {}),
    }
    deployment = {**DEPLOYMENT, **(document.get("deployment_config") or {})}
    if routing:
        deployment.setdefault("request_router_config", dict(routing))
    scaling = deployment.get("autoscaling_config")
    if isinstance(scaling, Mapping) and "policy" not in scaling:
        patience = {"patience_s": deployment["graceful_shutdown_timeout_s"]}
        policy = {"policy_function": POLICY, "policy_kwargs": patience}
        deployment["autoscaling_config"] = {**scaling, "policy": policy}
    document["deployment_config"] = deployment
    return document
