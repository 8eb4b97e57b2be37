import json
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

pytest.importorskip("ray.serve.llm")
pytest.importorskip("vllm")

from slos_serve.errors import ConfigError, SlosServeError
from slos_serve.http import replies
from slos_serve.http.hub import Hub
from slos_serve.http.metrics import SloMetrics
from slos_serve.ray_serve.app import build_openai_app, read_slo, replica_document
from slos_serve.ray_serve.ingress import summed
from slos_serve.ray_serve.server import SloServer

DEPLOY = Path(__file__).parents[2] / "deploy" / "ray"
PROFILE = {
    "schema": "slos-serve-profile/1",
    "perf_model": {"lines": [{"per_token_s": 1e-3, "fixed_s": 0.02}]},
    "max_num_batched_tokens": 256,
}


def filled(document=None, **slo):
    return replica_document(document or {"model_loading_config": {"model_id": "m"}}, *read_slo(slo))


def settings(document):
    return document["engine_kwargs"]["additional_config"]["slo"]


def test_a_configuration_of_rays_own_becomes_ours_without_a_change():
    document = filled()
    assert document["engine_kwargs"]["scheduler_cls"].startswith("slos_serve.vllm_plugin.scheduler.")
    assert document["server_cls"] is SloServer
    assert document["experimental_configs"]["stream_batching_interval_ms"] == 0
    assert document["deployment_config"]["request_router_config"]["request_router_kwargs"]["policy"] == "slo"
    assert settings(document)["publish_replica"] is True


def test_what_the_operator_says_himself_stays():
    given = {
        "model_loading_config": {"model_id": "m"},
        "engine_kwargs": {"max_model_len": 77, "additional_config": {"mine": 1, "slo": {"guard_ms": 3}}},
        "deployment_config": {"health_check_period_s": 9, "num_replicas": 3},
        "lora_config": {"max_num_adapters_per_replica": 2},
    }
    document = filled(given)
    assert document["engine_kwargs"]["max_model_len"] == 77
    assert document["engine_kwargs"]["additional_config"]["mine"] == 1
    assert settings(document)["guard_ms"] == 3
    assert document["deployment_config"]["health_check_period_s"] == 9
    assert document["lora_config"] == {"max_num_adapters_per_replica": 2}


def test_files_travel_with_the_application(tmp_path):
    (tmp_path / "classes.yaml").write_text("classes: {mine: {ttft_ms: 5, tpot_ms: 6}}")
    (tmp_path / "profile.json").write_text(json.dumps(PROFILE))
    slo = settings(filled(config=str(tmp_path / "classes.yaml"), profile=str(tmp_path / "profile.json")))
    assert slo["config"]["classes"]["mine"]["ttft_ms"] == 5
    assert slo["profile"] == PROFILE


def test_the_way_through_ray_is_taken_off_every_deadline():
    assert settings(filled())["guard_ms"] == 30.0
    assert settings(filled(guard_ms=5))["guard_ms"] == 5


def test_replicas_of_one_machine_do_not_share_what_they_learn():
    assert settings(filled())["state"] is False


def test_rays_own_router_can_be_asked_for():
    assert "request_router_config" not in filled(router="ray")["deployment_config"]


def test_scaling_goes_by_headroom_unless_told_otherwise():
    scaled = filled({"deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}}})
    policy = scaled["deployment_config"]["autoscaling_config"]["policy"]
    assert policy["policy_function"].endswith(":HeadroomPolicy")
    own = filled({"deployment_config": {"autoscaling_config": {"policy": {"policy_function": "a:b"}}}})
    assert own["deployment_config"]["autoscaling_config"]["policy"] == {"policy_function": "a:b"}


def test_ray_makes_our_policy_from_the_configuration():
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve.config import AutoscalingConfig

    scaled = filled({"deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}}})
    config = AutoscalingConfig(**scaled["deployment_config"]["autoscaling_config"])
    policy = _resolve_policy_callable(config.policy)
    assert policy.patience_s == scaled["deployment_config"]["graceful_shutdown_timeout_s"]


def test_the_scheduler_is_the_one_that_fits_each_replicas_engine():
    assert filled({})["engine_kwargs"]["scheduler_cls"].endswith(".AutoSloScheduler")


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"slo": "enforce"}, "slo"),
        ({"slo": {"router": "random"}}, "slo.router"),
        ({"slo": {"router_options": 3}}, "slo.router_options"),
        ({"slo": {"profile": "/nowhere.json"}}, "slo.profile"),
        ({"slo": {"profile": {"perf_model": 3}}}, "slo.profile"),
        ({"slo": {"config": "/nowhere.yaml"}}, "file"),
        ({"ingress_cls_config": {"ingress_cls": "a:b"}}, "ingress_cls_config"),
        ({"llm_configs": ["/nowhere.yaml"]}, "llm_configs"),
        ({"llm_configs": [{"engine_kwargs": {"scheduler_cls": "mine.Scheduler"}}]}, "scheduler_cls"),
        ({"llm_configs": [{"server_cls": "mine:Server"}]}, "server_cls"),
    ],
)
def test_what_clashes_with_us_is_named(args, key):
    with pytest.raises(ConfigError) as caught:
        build_openai_app(args)
    assert caught.value.key == key


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_the_shipped_examples_name_our_builder_and_pass_its_checks(name):
    document = yaml.safe_load((DEPLOY / name).read_text())
    if "spec" in document:
        document = yaml.safe_load(document["spec"]["serveConfigV2"])
    (application,) = document["applications"]
    assert application["import_path"] == "slos_serve.ray_serve.app:build_openai_app"
    args = application["args"]
    assert replica_document(args["llm_configs"][0], *read_slo(args["slo"]))["model_loading_config"]["model_id"]


def test_many_replicas_look_like_one_engine_to_the_middleware():
    one = {"usable": True, "effective_mode": "enforce", "num_waiting": 2, "steps": 5, "headroom_tokens_per_s": 10.0}
    gone = {**one, "usable": False}
    whole = summed([{**one, "drain_s": 3.0}, {**one, "drain_s": 1.0}, gone])
    assert (whole["num_waiting"], whole["steps"], whole["headroom_tokens_per_s"]) == (4, 10, 20.0)
    assert whole["drain_s"] == 1.0
    assert len(whole["replicas"]) == 3


def test_where_replicas_are_emulated_status_and_metrics_of_the_front_door_say_so():
    registry = CollectorRegistry()
    hub = Hub(SloMetrics(registry))
    one = {"usable": True, "effective_mode": "enforce", "device": {"emulated": "x"}}
    hub.feed({"snapshot": summed([one, one])})
    assert replies.status(hub)["device"] == {"emulated": "x"}
    assert registry.get_sample_value("slos_serve_emulated_device") == 1.0
    hub.feed({"snapshot": summed([{**one, "device": None}])})
    assert "device" not in replies.status(hub)


def test_a_headroom_that_one_replica_does_not_tell_is_unknown_for_all():
    one = {"usable": True, "effective_mode": "enforce", "headroom_tokens_per_s": 0.0}
    assert summed([one, {**one, "headroom_tokens_per_s": None}])["headroom_tokens_per_s"] is None


def test_a_replica_whose_machine_has_the_package_but_not_installed_says_so(monkeypatch):
    from slos_serve.ray_serve import server

    server.check_installed()
    monkeypatch.setattr(server, "entry_points", lambda **_: ())
    with pytest.raises(SlosServeError, match="not installed"):
        server.check_installed()


def test_a_record_of_the_engines_is_one_of_the_routers_decisions_too():
    _, routing = read_slo({"record": "steps.jsonl", "router": "least-load"})
    assert routing["request_router_kwargs"] == {"policy": "least-load", "record": "steps.jsonl"}
    assert "record" not in read_slo({})[1]["request_router_kwargs"]


def test_a_router_of_ones_own_is_taken_by_the_name_of_its_class():
    slo, router = read_slo({"router": "slos_serve.core.routing.routers:LeastLoad"})
    assert "router" not in slo
    assert "slos_serve.core.routing.routers:LeastLoad" in json.dumps(router, default=str)
    with pytest.raises(ConfigError, match=r"package\.module:Class"):
        read_slo({"router": "slos_serve.core.routing.routers:Nobody"})
    with pytest.raises(ConfigError, match="least-load"):
        read_slo({"router": "nobody"})
