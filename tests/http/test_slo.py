"""Four spellings of one wish: the first that matches wins, and a malformed one is named."""

import pytest

from slos_serve.config import ApiKey, SloClass, SloConfig
from slos_serve.http.slo import Operator, RequestError, UnknownKeyError

CLASSES = {**SloConfig().classes, "voice": SloClass(name="voice", ttft_ms=300, on_unattainable="reject")}


@pytest.fixture
def read():
    def read(body=None, headers=None, *, peer="203.0.113.9", model=None, **config):
        operator = Operator(SloConfig(classes=CLASSES, **config), model)
        pairs = headers.items() if isinstance(headers, dict) else headers or ()
        return operator.read([(k.encode(), v.encode()) for k, v in pairs], body or {}, peer)

    return read


def test_the_body_names_a_class(read):
    request = read({"slo": {"class": "coding"}})
    assert request.xargs == {"slo_class": "coding", "slo_stage": "final"}
    assert (request.slo_class, request.asked, request.best_effort, request.rejects) == ("coding", True, False, False)


def test_the_body_may_bring_numbers_alone_or_on_top_of_a_class(read):
    request = read({"slo": {"ttft_ms": 400, "tpot_ms": 50.5, "e2e_ms": 9000, "max_gap_ms": 700}})
    assert request.slo_class == "custom"
    assert request.xargs == {
        "slo_ttft_ms": 400,
        "slo_tpot_ms": 50.5,
        "slo_e2e_ms": 9000,
        "slo_max_gap_ms": 700,
        "slo_stage": "final",
    }
    assert request.hold_s == 0.4
    request = read({"slo": {"class": "chat", "ttft_slowdown": 3, "thinking_tpot_ms": 20}})
    assert request.xargs["slo_class"] == "chat"
    assert request.xargs["slo_ttft_slowdown"] == 3
    assert request.xargs["slo_thinking_tpot_ms"] == 20


@pytest.mark.parametrize("prefix", ["x-slo-", "x-llm-d-slo-"])
def test_headers_say_the_same(read, prefix):
    request = read(headers={prefix + "ttft-ms": "400", prefix + "tpot-ms": "50"})
    assert (request.slo_class, request.xargs["slo_ttft_ms"], request.xargs["slo_tpot_ms"]) == ("custom", 400, 50)
    assert read(headers={"x-slo-class": "coding"}).xargs["slo_class"] == "coding"


@pytest.mark.parametrize(
    ("tier", "slo_class", "asked"),
    [
        ("flex", "best-effort", True),
        ("auto", "best-effort", False),
        ("default", "best-effort", False),
        ("priority", "voice", True),
        ("scale", "best-effort", False),
        (["x"], "best-effort", False),
    ],
)
def test_service_tiers_are_classes(read, tier, slo_class, asked):
    request = read({"service_tier": tier}, priority_class="voice")
    assert (request.slo_class, request.asked) == (slo_class, asked)


def test_without_a_priority_class_priority_is_the_default(read):
    assert read({"service_tier": "priority"}, default_class="chat").slo_class == "chat"


def test_first_match_wins(read):
    everything = {"slo": {"class": "coding"}, "service_tier": "flex", "vllm_xargs": {"slo_class": "tool"}}
    headers = {"x-slo-class": "reasoning", "x-slo-ttft-ms": "100"}
    assert read(everything, headers).slo_class == "coding"
    del everything["slo"]
    assert read(everything, headers).slo_class == "reasoning"
    assert read(everything).slo_class == "best-effort"
    del everything["service_tier"]
    request = read(everything)
    assert (request.slo_class, request.asked, request.xargs) == ("tool", True, {"slo_class": "tool"})


def test_an_slo_object_without_a_wish_leaves_the_wish_to_the_next_form(read):
    request = read({"slo": {"stage": "final"}, "tools": [{}]}, {"x-slo-class": "tool"})
    assert request.xargs == {"slo_class": "tool", "slo_stage": "final"}


def test_a_tool_round_is_a_loop_while_the_request_carries_tools(read):
    assert read({"slo": {"class": "tool"}, "tools": [{}]}).xargs["slo_stage"] == "loop"
    assert read({"slo": {"class": "tool"}, "tools": []}).xargs["slo_stage"] == "final"
    assert read({"slo": {"class": "tool", "stage": "final"}, "tools": [{}]}).xargs["slo_stage"] == "final"


def test_saying_nothing_is_the_default_class(read):
    assert not read({}).asked
    assert read({}).xargs == {}
    request = read({}, default_class="chat")
    assert (request.asked, request.xargs["slo_class"]) == (True, "chat")
    assert read({"slo": None}, default_class="chat").slo_class == "chat"


KEYS = {"acme": ApiKey(key_sha256=ApiKey.digest("sk-1")), "edge": ApiKey(key_sha256=ApiKey.digest("sk-2"), proxy=True)}
ACME, EDGE, NOBODY = ({"authorization": f"Bearer {key}"} for key in ("sk-1", "sk-2", "sk-3"))


def test_the_tenant_is_whose_key_it_is_whatever_a_client_calls_itself(read):
    assert read({}, ACME, api_keys=KEYS).tenant == "acme"
    named = {**ACME, "x-slo-tenant": "beta", "x-llm-d-inference-fairness-id": "beta"}
    assert read({"slo": {"tenant": "gamma"}}, named, api_keys=KEYS).tenant == "acme"
    assert read({}, {"x-api-key": "sk-1"}, api_keys=KEYS).tenant == "acme"
    assert read({"slo": {"tenant": "gamma"}}, {"x-slo-tenant": "beta"}).tenant == ""
    for headers in (NOBODY, {"authorization": "Basic sk-1"}, {}):
        assert read({"slo": {"tenant": "acme"}}, {**headers, "x-slo-tenant": "acme"}, api_keys=KEYS).tenant == ""
    assert read({}, ACME, api_keys=KEYS).asked is False


def test_a_trusted_proxy_names_the_tenant_by_its_key_or_its_address(read):
    assert read({}, {**EDGE, "x-slo-tenant": "beta"}, api_keys=KEYS).tenant == "beta"
    assert read({}, {**EDGE, "x-llm-d-inference-fairness-id": "beta"}, api_keys=KEYS).tenant == "beta"
    assert read({"slo": {"tenant": "gamma"}}, {**EDGE, "x-slo-tenant": "beta"}, api_keys=KEYS).tenant == "gamma"
    assert read({}, EDGE, api_keys=KEYS).tenant == "edge"
    networks = {"trusted_proxies": ("10.0.0.0/8", "2001:db8::1")}
    for peer, tenant in (
        ("10.1.2.3", "b"),
        ("::ffff:10.1.2.3", "b"),
        ("2001:db8::1", "b"),
        ("11.0.0.1", ""),
        (None, ""),
    ):
        assert read({}, {"x-slo-tenant": "b"}, peer=peer, **networks).tenant == tenant
    gold = read({}, {"x-slo-tenant": "gold"}, peer="10.1.2.3", tenants={"gold": "coding"}, **networks)
    assert gold.slo_class == "coding"


def test_a_tenants_class_is_not_had_by_taking_its_name(read):
    for form in ({"slo": {"tenant": "gold"}}, {"vllm_xargs": {"slo_tenant": "gold"}}):
        request = read(form, {"x-slo-tenant": "gold"}, tenants={"gold": "coding"})
        assert (request.slo_class, request.asked, request.xargs) == ("best-effort", False, {})


def test_where_keys_are_told_apart_nobody_is_heard_without_one(read):
    wish = {"slo": {"class": "chat"}, "service_tier": "priority", "vllm_xargs": {"slo_class": "tool"}}
    for headers in ({}, NOBODY, {**NOBODY, "x-slo-class": "coding"}):
        request = read(wish, headers, api_keys=KEYS, priority_class="chat")
        assert (request.slo_class, request.best_effort, request.reason) == ("best-effort", True, "unknown-key")
        assert read(wish, headers, api_keys=KEYS, default_class="voice").slo_class == "voice"
        with pytest.raises(UnknownKeyError):
            read(wish, headers, api_keys=KEYS, unknown_keys="refuse")
    assert read(wish, ACME, api_keys=KEYS, unknown_keys="refuse").slo_class == "chat"
    assert not read({}, NOBODY, api_keys=KEYS).asked


def test_a_model_that_is_not_named_is_the_one_that_is_served(read):
    assert read({}, model="m", models={"m": "voice"}).slo_class == "voice"
    assert read({"model": ""}, model="m", models={"m": "voice"}).slo_class == "voice"
    assert read({"model": "other"}, model="m", models={"m": "voice"}).slo_class == "best-effort"


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-slo-class", "x-slo-tenant", "x-llm-d-slo-ttft-ms"])
def test_a_header_that_decides_something_comes_once(read, name):
    with pytest.raises(RequestError) as caught:
        read({}, [(name, "5"), ("other", "x"), (name, "5")], api_keys=KEYS)
    assert (caught.value.param, "once" in str(caught.value)) == (name, True)
    assert read({}, [("accept", "a"), ("accept", "b")]).asked is False


def test_every_key_of_the_body_has_a_header(read):
    headers = {"x-slo-class": "chat", "x-slo-stage": "loop", "x-slo-thinking-tpot-ms": "40", "x-slo-e2e-ms": "9e3"}
    headers |= {"x-slo-ttft-slowdown": "3", "x-slo-tpot-s": ".05", "x-slo-max-gap-ms": "700"}
    assert read({}, headers).xargs == {
        "slo_class": "chat",
        "slo_ttft_slowdown": 3,
        "slo_tpot_ms": 50.0,
        "slo_thinking_tpot_ms": 40,
        "slo_e2e_ms": 9000,
        "slo_max_gap_ms": 700,
        "slo_stage": "loop",
    }


def test_headers_may_count_in_seconds_and_microseconds_and_leave_a_number_out(read):
    request = read({}, {"x-slo-ttft-s": "0.4", "x-slo-tpot-us": "50000"})
    assert (request.xargs["slo_ttft_ms"], request.xargs["slo_tpot_ms"]) == (400, 50)
    assert "slo_tpot_ms" not in read({}, {"x-slo-ttft-ms": "400", "x-slo-tpot-ms": "default"}).xargs
    assert read({}, {"x-slo-ttft-ms": "default"}).asked is False


@pytest.mark.parametrize("header", ["x-slo-ttft", "x-slo-clas", "x-slo-slo-class", "x-slo-" + "x" * 200])
def test_an_unknown_slo_header_is_named_as_an_unknown_key_is(read, header):
    with pytest.raises(RequestError, match=r"one of the headers x-slo-class, x-slo-stage") as caught:
        read({}, {header: "chat"})
    assert header.startswith(caught.value.param)


def test_headers_of_other_systems_mean_what_they_mean_there(read):
    assert read({}, {"x-llm-d-inference-objective": "coding"}).slo_class == "coding"
    assert read({}, {"x-llm-d-inference-objective": "theirs"}).asked is False
    assert read({}, {"x-dynamo-session-id": "run-1"}).session == "run-1"
    assert read({"session_id": "mine"}, {"x-dynamo-session-id": "run-1"}).session == ""
    assert len(read({}, {"x-session-affinity": "x" * 5000}).session) == 128


def test_the_operator_overrides_the_client(read):
    mine = {"slo": {"class": "chat", "ttft_ms": 5}, "model": "fast", "vllm_xargs": {"slo_ttft_ms": 1}}
    keys = {"acme": ApiKey(key_sha256=ApiKey.digest("sk-1"), slo_class="coding")}
    header = {"authorization": "Bearer sk-1", "x-slo-tenant": "beta"}
    tenants, models = {"beta": "summarization"}, {"fast": "voice"}
    for config, expected in (
        ({"tenants": tenants}, "summarization"),
        ({"tenants": tenants, "models": models}, "voice"),
        ({"tenants": tenants, "models": models, "api_keys": keys}, "coding"),
    ):
        request = read(mine, header, peer="10.0.0.1", trusted_proxies=("10.0.0.1",), **config)
        assert request.slo_class == expected
        assert "slo_ttft_ms" not in request.xargs


def test_a_class_may_ask_to_be_rejected(read):
    request = read({"slo": {"class": "voice"}})
    assert (request.rejects, request.hold_s) == (True, 10)
    assert read({"vllm_xargs": {"slo_class": "voice"}}).rejects
    assert not read({"vllm_xargs": {"slo_class": ["voice"]}}).rejects


@pytest.mark.parametrize(
    ("name", "reason"), [("gold", "invalid"), (5, "invalid"), (["chat"], "invalid"), ("best-effort", "requested")]
)
def test_a_class_in_vllm_xargs_that_nobody_knows_is_told_from_one_that_asks_for_nothing(read, name, reason):
    request = read({"vllm_xargs": {"slo_class": name}})
    assert (request.best_effort, request.reason) == (True, reason)


NUMBER = "positive finite number"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"slo": "coding"}, "slo", "an object such as"),
        ({"slo": ["coding"]}, "slo", "an object such as"),
        ({"slo": {"class": "gold"}}, "slo.class", "one of chat, coding"),
        ({"slo": {"class": 5}}, "slo.class", "one of chat"),
        ({"slo": {"class": ["chat"]}}, "slo.class", "one of chat"),
        ({"slo": {"klass": "chat"}}, "slo.klass", "one of the keys class"),
        ({"slo": {"ttft_ms": -1}}, "slo.ttft_ms", NUMBER),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms", NUMBER),
        ({"slo": {"ttft_ms": "400"}}, "slo.ttft_ms", "'400'"),
        ({"slo": {"tpot_ms": True}}, "slo.tpot_ms", NUMBER),
        ({"slo": {"tpot_ms": float("nan")}}, "slo.tpot_ms", "nan"),
        ({"slo": {"e2e_ms": float("inf")}}, "slo.e2e_ms", NUMBER),
        ({"slo": {"max_gap_ms": {}}}, "slo.max_gap_ms", NUMBER),
        ({"slo": {"thinking_tpot_ms": 10**400}}, "slo.thinking_tpot_ms", NUMBER),
        ({"slo": {"ttft_ms": 400, "ttft_slowdown": 3}}, "slo.ttft_slowdown", "not both"),
        ({"slo": {"class": "tool", "stage": "last"}}, "slo.stage", "one of loop, final"),
        ({"slo": {"stage": 0}}, "slo.stage", "one of loop, final"),
        ({"slo": {"tenant": ""}}, "slo.tenant", "1 to 128 characters"),
        ({"slo": {"tenant": 7}}, "slo.tenant", "1 to 128 characters"),
        ({"slo": {"tenant": "x" * 129}}, "slo.tenant", "..."),
    ],
)
def test_a_malformed_body_names_field_value_and_expectation(read, body, param, says):
    with pytest.raises(RequestError) as caught:
        read(body)
    assert caught.value.param == param
    assert str(caught.value).startswith(param + " = ")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("header", "value", "says"),
    [
        ("x-slo-class", "gold", "one of chat"),
        ("x-slo-ttft-ms", "soon", NUMBER),
        ("x-slo-ttft-ms", "-5", NUMBER),
        ("x-slo-ttft-ms", "", NUMBER),
        ("x-slo-tpot-ms", "nan", NUMBER),
        ("x-slo-tpot-ms", "inf", NUMBER),
        ("x-slo-tpot-ms", "1_000", NUMBER),
        ("x-slo-tpot-ms", "1e999", NUMBER),
        ("x-llm-d-slo-ttft-ms", "0", NUMBER),
        ("x-llm-d-slo-tpot-ms", "5 ms", NUMBER),
        ("x-slo-tenant", " ", "1 to 128"),
    ],
)
def test_a_malformed_header_is_named_as_the_client_spelled_it(read, header, value, says):
    with pytest.raises(RequestError) as caught:
        read({}, {header: value})
    assert caught.value.param == header
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "body", "concerns"),
    [
        ([], b'{"messages":[]}', False),
        ([], b'{"slo":{}}', True),
        ([], b'{"vllm_xargs":{"slo_class":"chat"}}', True),
        ([], b'{"service_tier":"flex"}', True),
        ([(b"x-slo-class", b"chat")], b"{}", True),
        ([(b"x-llm-d-slo-ttft-ms", b"5")], b"{}", True),
        ([(b"x-llm-d-inference-objective", b"chat")], b"{}", True),
        ([(b"x-session-affinity", b"s")], b"{}", True),
        ([(b"x-request-id", b"5")], b"{}", False),
        ([], rb'{"vllm_xargs":{"\u0073lo_id":"x"}}', True),
        ([], rb'{"v\u006clm_xargs":{"\u0073lo_id":"x"}}', True),
        ([], rb'{"prompt":"caf\u00e9 \u4f60"}', False),
    ],
)
def test_only_requests_that_mention_an_slo_are_parsed(headers, body, concerns):
    assert Operator(SloConfig()).concerns(headers, body) is concerns
    assert Operator(SloConfig(default_class="chat")).concerns(headers, body)
