"""The operator's file is checked whole, and says the same thing in every process."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.config import (
    BEST_EFFORT,
    OVERRIDES,
    PROMISES,
    ApiKey,
    SloClass,
    SloConfig,
    load_slo_config,
)
from slos_serve.errors import ConfigError


def reference(prompt_tokens):
    return prompt_tokens / 1000


def no_reference(prompt_tokens):
    raise AssertionError("asked for a reference time without a slowdown")


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "slo.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("name", "factor", "tpot_s", "thinking_tpot_s"),
    [
        ("chat", 5, 0.1, None),
        ("coding", 5, 0.05, None),
        ("summarization", 3, 0.1, None),
        ("tool", 3, 0.05, None),
        ("reasoning", 3, 0.1, 0.05),
    ],
)
def test_shipped_classes_are_those_of_the_contract(name, factor, tpot_s, thinking_tpot_s):
    slo, weight, thinks = SloConfig().resolve(name, {}, 2000, reference)
    assert slo.ttft_s == pytest.approx(factor * 2.0 + 0.03)
    assert (slo.tpot_s, slo.thinking_tpot_s, slo.e2e_s, slo.max_gap_s) == (tpot_s, thinking_tpot_s, None, None)
    assert (weight, thinks) == (1.0, name == "reasoning")


def test_the_last_tool_round_may_be_read_at_leisure():
    resolve = SloConfig().resolve
    assert resolve("tool", {"stage": "loop"}, 1, reference)[0].tpot_s == 0.05
    assert resolve("tool", {"stage": "final"}, 1, reference)[0].tpot_s == 0.1
    assert resolve("tool", {"stage": "final", "tpot_ms": 70}, 1, reference)[0].tpot_s == 0.07
    assert resolve("chat", {"stage": "final"}, 1, reference)[0].tpot_s == 0.1


def test_best_effort_and_no_class_promise_nothing():
    assert SloConfig().resolve(BEST_EFFORT, {}, 1, no_reference)[0].is_empty
    assert SloConfig().resolve(None, {}, 1, no_reference)[0].is_empty


def test_a_short_prompt_gets_the_floor():
    assert SloConfig().resolve("chat", {}, 10, reference)[0].ttft_s == 0.2
    bare = load_slo_config({"ttft_floor_ms": 0, "ttft_allowance_ms": 0, "classes": {"chat": {"ttft_slowdown": 5}}})
    assert bare.resolve("chat", {}, 10, reference)[0].ttft_s == pytest.approx(0.05)


def test_numbers_of_the_request_replace_those_of_the_class():
    slo, _, thinks = SloConfig().resolve("chat", {"ttft_ms": 400, "e2e_ms": 9000}, 5000, no_reference)
    assert (slo.ttft_s, slo.tpot_s, slo.e2e_s, thinks) == (0.4, 0.1, 9.0, False)
    slo, _, thinks = SloConfig().resolve(None, {"thinking_tpot_ms": 50, "max_gap_ms": 800}, 1, no_reference)
    assert (slo.ttft_s, slo.thinking_tpot_s, slo.max_gap_s, thinks) == (None, 0.05, 0.8, True)
    absolute = load_slo_config({"classes": {"voice": {"ttft_ms": 300}}})
    assert absolute.resolve("voice", {"ttft_slowdown": 2}, 1000, reference)[0].ttft_s == pytest.approx(2.03)


def test_a_request_is_counted_under_its_class_or_as_custom():
    config = SloConfig(default_class="chat")
    assert config.label("coding", {"ttft_ms": 1}) == "coding"
    assert config.label(None, {"ttft_ms": 1}) == "custom"
    assert config.label(None, {"stage": "loop"}) == "chat"


@pytest.mark.parametrize(
    ("name", "overrides", "field"),
    [
        ("gold", {}, "class"),
        (["chat"], {}, "class"),
        (None, {"ttft_ms": 0}, "ttft_ms"),
        (None, {"ttft_ms": -5}, "ttft_ms"),
        (None, {"tpot_ms": "50"}, "tpot_ms"),
        (None, {"tpot_ms": True}, "tpot_ms"),
        (None, {"e2e_ms": math.nan}, "e2e_ms"),
        (None, {"max_gap_ms": math.inf}, "max_gap_ms"),
        (None, {"ttft_ms": 10**400}, "ttft_ms"),
        (None, {"ttft_ms": [1]}, "ttft_ms"),
        (None, {"ttft_ms": 100, "ttft_slowdown": 3}, "ttft_slowdown"),
        ("tool", {"stage": "middle"}, "stage"),
        ("tool", {"stage": ["loop"]}, "stage"),
        (None, {"ttft": 5}, "ttft"),
    ],
)
def test_a_bad_request_is_a_value_error_that_names_the_field(name, overrides, field):
    with pytest.raises(ValueError, match=field) as caught:
        SloConfig().resolve(name, overrides, 10, reference)
    assert caught.value.key == field


def test_the_file_adds_replaces_and_removes_classes(write):
    config = load_slo_config(
        write(
            """
default_class: chat
priority_class: voice
max_best_effort_queue: 40
classes:
  voice: {ttft_ms: 300, tpot_ms: 30, max_gap_ms: 500, weight: 2, on_unattainable: reject, ttl_ms: 1000}
  coding: {ttft_slowdown: 4, floor_ms: 0, allowance_ms: 0, output_tokens_hint: 300}
  tool: null
tenants: {acme: coding}
models: {fast-model: voice}
api_keys:
  acme: {key: sk-secret, class: coding}
  other: {key_sha256: """
            + "ab" * 32
            + "}\n"
        )
    )
    assert set(config.classes) == {"chat", "coding", "summarization", "reasoning", BEST_EFFORT, "voice"}
    assert config.classes["voice"].on_unattainable == "reject"
    assert config.classes["coding"].tpot_ms is None
    assert config.resolve("coding", {}, 10, reference)[0].ttft_s == pytest.approx(0.04)
    assert config.resolve("voice", {}, 10, reference)[1] == 2
    assert config.api_keys["acme"] == ApiKey(key_sha256=ApiKey.digest("sk-secret"), slo_class="coding")
    assert "sk-secret" not in json.dumps(config.to_json())
    assert SloConfig.from_json(json.dumps(config.to_json())) == config


def test_an_empty_file_and_no_file_are_the_shipped_defaults(write):
    assert load_slo_config(write("")) == load_slo_config(None) == SloConfig()
    assert load_slo_config(SloConfig().to_json()) == SloConfig()


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("classes: {chat: {ttft_ms: 1}, chat: {ttft_ms: 2}}", "chat", "each key once"),
        ("ttft_floor_ms: 1\nttft_floor_ms: 2", "ttft_floor_ms", "line 2"),
        ("classes: {chat: {ttft_ms: 1, ttft_ms: 2}}", "ttft_ms", "each key once"),
        ("clases: {}", "clases", "one of the keys classes"),
        ("classes: {chat: {ttft: 5}}", "classes.chat.ttft", "ttft_ms"),
        ("classes: {chat: {ttft_ms: -5}}", "classes.chat.ttft_ms", "positive finite number of milliseconds"),
        ("classes: {chat: {ttft_ms: 0}}", "classes.chat.ttft_ms", "positive"),
        ("classes: {chat: {ttft_ms: .nan}}", "classes.chat.ttft_ms", "finite"),
        ("classes: {chat: {tpot_ms: .inf}}", "classes.chat.tpot_ms", "finite"),
        ("classes: {chat: {tpot_ms: fast}}", "classes.chat.tpot_ms", "'fast'"),
        ("classes: {chat: {tpot_ms: yes}}", "classes.chat.tpot_ms", "number"),
        ("classes: {chat: {tpot_ms: [1]}}", "classes.chat.tpot_ms", "number"),
        ("classes: {chat: {ttft_ms: 5, weight: 0}}", "classes.chat.weight", "positive"),
        ("classes: {chat: {ttft_ms: 5, floor_ms: -1}}", "classes.chat.floor_ms", "non-negative"),
        ("classes: {chat: {ttft_ms: 5, ttft_slowdown: 3}}", "classes.chat.ttft_slowdown", "not both"),
        ("classes: {chat: {ttft_ms: 5, on_unattainable: drop}}", "classes.chat.on_unattainable", "best-effort, reject"),
        ("classes: {chat: {ttft_ms: 5, output_tokens_hint: 1.5}}", "classes.chat.output_tokens_hint", "whole number"),
        ("classes: {chat: {weight: 2}}", "classes.chat.promises", "at least one of ttft_ms"),
        ("classes: {best-effort: {tpot_ms: 5}}", "classes.best-effort.tpot_ms", "no promise"),
        ("classes: {custom: {tpot_ms: 5}}", "classes.custom.name", "not 'custom'"),
        ("classes: {'a b': {tpot_ms: 5}}", "classes.a b.name", "letters"),
        ("classes: {1: {tpot_ms: 5}}", "classes", "quote it"),
        ("classes: [chat]", "classes", "a mapping"),
        ("classes: {chat: 5}", "classes.chat", "a mapping"),
        ("- chat", "top level", "a mapping"),
        ("default_class: gold", "default_class", "one of chat"),
        ("priority_class: [chat]", "priority_class", "one of chat"),
        ("tenants: {acme: gold}", "tenants.acme", "one of chat"),
        ("models: {m: 3}", "models.m", "one of chat"),
        ("classes: {chat: null}\ndefault_class: chat", "default_class", "one of coding"),
        ("max_best_effort_queue: -1", "max_best_effort_queue", "0 or more"),
        ("max_best_effort_queue: true", "max_best_effort_queue", "whole number"),
        ("ttft_allowance_ms: x", "ttft_allowance_ms", "non-negative finite number of milliseconds"),
        ("api_keys: {acme: {class: chat}}", "api_keys.acme.key", "key_sha256"),
        ("api_keys: {acme: {key: 5}}", "api_keys.acme.key", "string"),
        ("api_keys: {acme: {key_sha256: xyz}}", "api_keys.acme.key_sha256", "64 hexadecimal"),
        ("api_keys: {acme: {key: s, class: gold}}", "api_keys.acme.class", "one of chat"),
        ("api_keys: {acme: {key: s, tenant: x}}", "api_keys.acme.tenant", "key_sha256"),
        ("classes: {chat: {", "file", "valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "file", "valid YAML"),
    ],
)
def test_a_mistake_in_the_file_names_file_key_value_and_expectation(write, text, key, says):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_slo_config(path)
    assert caught.value.key == key
    message = str(caught.value)
    assert str(path) in message
    assert says in message


def test_an_api_key_never_appears_in_an_error(write):
    for text in (
        "api_keys: {acme: {key: sk-secret, key_sha256: x}}",
        "api_keys: {acme: {key_sha256: sk-secret}}",
        "api_keys: {acme: {kex: sk-secret}}",
        "api_keys: {acme: sk-secret}",
    ):
        with pytest.raises(ConfigError) as caught:
            load_slo_config(write(text))
        assert "sk-secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_told_in_plain_words(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: file = 'No such file or directory'"):
        load_slo_config(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"latin\.yaml: file = 'it is no UTF-8 text'"):
        load_slo_config(str(tmp_path / "latin.yaml"))


def test_anchors_and_merges_still_work(write):
    config = load_slo_config(
        write("classes:\n  a: &base {ttft_ms: 100, tpot_ms: 9}\n  b: {<<: *base, ttft_ms: 200}\n  c: {<<: *base}\n")
    )
    assert config.classes["b"] == SloClass(name="b", ttft_ms=200, tpot_ms=9)
    assert config.classes["c"] == SloClass(name="c", ttft_ms=100, tpot_ms=9)


ms = st.floats(min_value=1.0, max_value=86_400_000.0)
promises = st.fixed_dictionaries({}, optional=dict.fromkeys(PROMISES, ms))


@given(promises.filter(bool), st.sampled_from([None, "chat", "tool", "reasoning"]))
def test_what_the_request_says_in_ms_is_promised_in_seconds(overrides, name):
    slo, _, _ = SloConfig().resolve(name, overrides, 100, reference)
    for key, value in overrides.items():
        assert getattr(slo, key.replace("_ms", "_s")) == pytest.approx(value / 1000)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True), promises.filter(bool)))
def test_a_config_survives_json(classes):
    classes.pop("custom", None)
    config = SloConfig(
        classes={**SloConfig().classes, **{name: SloClass(name=name, **values) for name, values in classes.items()}}
    )
    assert SloConfig.from_json(json.dumps(config.to_json())) == config


# -- numbers of clients --------------------------------------------------------------------------


@pytest.mark.parametrize("key", OVERRIDES)
def test_numbers_that_no_engine_can_mean_are_refused_from_clients(key):
    for value in (1e-9, 0.5, 1e12):
        with pytest.raises(ConfigError, match=f"{key}.*a number from 1 to"):
            SloConfig().check_overrides(None, {key: value})
    SloConfig().check_overrides(None, {key: 900})


def test_the_operator_bounds_what_clients_ask_for(tmp_path):
    path = tmp_path / "slo.yaml"
    path.write_text("slo_limits: {tpot_ms: [20, 500]}\n")
    config = load_slo_config(path)
    for value in (19.9, 500.1):
        with pytest.raises(ConfigError, match=r"tpot_ms.*a number from 20 to 500"):
            config.check_overrides(None, {"tpot_ms": value})
    config.check_overrides(None, {"tpot_ms": 20})
    assert SloConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_an_operator_may_let_clients_name_classes_only():
    config = SloConfig.from_json({"client_numbers": False, "classes": {"chat": {"tpot_ms": 100}}})
    with pytest.raises(ConfigError, match="this server takes no other numbers"):
        config.check_overrides("chat", {"tpot_ms": 50})
    config.check_overrides("chat", {"stage": "final"})


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("slo_limits: {tpot: [1, 2]}", "slo_limits.tpot"),
        ("slo_limits: {tpot_ms: 5}", "slo_limits.tpot_ms"),
        ("slo_limits: {tpot_ms: [5]}", "slo_limits.tpot_ms"),
        ("slo_limits: {tpot_ms: [5, 2]}", "slo_limits.tpot_ms"),
        ("slo_limits: {tpot_ms: [0, 2]}", "slo_limits.tpot_ms"),
        ("slo_limits: [1]", "slo_limits"),
        ("client_numbers: 1", "client_numbers"),
    ],
)
def test_bounds_that_make_no_sense_are_named(tmp_path, section, key):
    path = tmp_path / "slo.yaml"
    path.write_text(section + "\n")
    with pytest.raises(ConfigError) as error:
        load_slo_config(path)
    assert error.value.key == key
    assert error.value.where == str(path)


def test_time_to_last_token_is_another_word_for_the_end_to_end_promise(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("classes: {report: {ttlt_ms: 9000}}")
    config = load_slo_config(path)
    assert config.classes["report"] == SloClass(name="report", e2e_ms=9000)
    assert SloConfig.from_json(config.to_json()) == config
    assert config.resolve("report", {}, 10, no_reference)[0].e2e_s == 9.0
    assert config.resolve("report", {"ttlt_ms": 4000}, 10, no_reference)[0].e2e_s == 4.0
    assert config.label(None, {"ttlt_ms": 4000}) == "custom"


@pytest.mark.parametrize(("one", "other"), [("ttft_ms", "ttft_slowdown"), ("e2e_ms", "ttlt_ms")])
def test_two_words_for_one_promise_are_refused(one, other):
    both = {one: 100.0, other: 100.0}
    with pytest.raises(ConfigError, match=f"either {one} or {other}"):
        SloClass(name="x", **both)
    with pytest.raises(ConfigError, match=f"either {one} or {other}"):
        SloConfig().resolve("chat", both, 10, no_reference)


def test_every_promise_can_be_said_by_a_class_and_by_a_request():
    assert {f"{name}_ms" for name in ("ttft", "tpot", "thinking_tpot", "e2e", "max_gap")} <= set(OVERRIDES)
    for key in OVERRIDES:
        SloClass(name="x", **{key: 5.0})
        slo, _, _ = SloConfig().resolve("best-effort", {key: 5.0}, 10, lambda _: 1.0)
        assert not slo.is_empty


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("unknown_keys: maybe", "unknown_keys", "one of default, refuse"),
        ("pages: everybody", "pages", "one of open, admin, off"),
        ("trusted_proxies: 10.0.0.0/8", "trusted_proxies", "a list of addresses"),
        ("trusted_proxies: [10.0.0.1/8]", "trusted_proxies", "10.0.0.0/8"),
        ("trusted_proxies: [gateway]", "trusted_proxies", "addresses or networks"),
        ("trusted_proxies: [5]", "trusted_proxies", "a list of addresses"),
        ("max_body_bytes: 0", "max_body_bytes", "1 or more"),
        ("max_body_bytes: true", "max_body_bytes", "1 or more"),
        ("api_keys: {a: {key: k, admin: 'yes'}}", "api_keys.a.admin", "true or false"),
        ("api_keys: {a: {key: k, proxy: 1}}", "api_keys.a.proxy", "true or false"),
        ("api_keys: {a: {key: k, root: true}}", "api_keys.a.root", "admin, proxy"),
        ("tenants: {'" + "x" * 129 + "': chat}", "tenants", "1 to 128 characters"),
    ],
)
def test_who_may_say_what_is_checked_like_the_rest(write, text, key, says):
    with pytest.raises(ConfigError) as caught:
        load_slo_config(write(text))
    assert caught.value.key == key
    assert says in str(caught.value)


def test_keys_proxies_and_limits_survive_the_way_to_other_processes(write):
    config = load_slo_config(
        write(
            "unknown_keys: refuse\npages: admin\ntrusted_proxies: [10.0.0.0/8, '::1']\nmax_body_bytes: 1000\n"
            "api_keys: {ops: {key: k, admin: true}, gateway: {key: g, proxy: true, class: chat}}\n"
        )
    )
    assert SloConfig.from_json(json.dumps(config.to_json())) == config
    assert (config.api_keys["ops"].admin, config.api_keys["gateway"].proxy) == (True, True)
    assert config.trusted_proxies == ("10.0.0.0/8", "::1")
