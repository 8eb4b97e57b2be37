"""Four spellings of one wish: the first that matches wins, and a malformed one is named."""

import pytest

from slos_serve.config import ApiKey, SloClass, SloConfig
from slos_serve.http.slo import Operator, RequestError

CLASSES = {**SloConfig().classes, "voice": SloClass(name="voice", ttft_ms=300, on_unattainable="reject")}


@pytest.fixture
def read():
    def read(body=None, headers=None, **config):
        operator = Operator(SloConfig(classes=CLASSES, **config))
        return operator.read([(k.encode(), v.encode()) for k, v in (headers or {}).items()], body or {})

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
    assert (request.slo_class, request.keeps_own, request.asked, request.xargs) == ("tool", True, True, {})


def test_an_slo_object_without_a_wish_leaves_the_wish_to_the_next_form(read):
    request = read({"slo": {"tenant": "acme", "stage": "final"}, "tools": [{}]}, {"x-slo-class": "tool"})
    assert request.xargs == {"slo_tenant": "acme", "slo_class": "tool", "slo_stage": "final"}


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


def test_a_tenant_is_named_by_body_header_or_key(read):
    keys = {"api_keys": {"acme": ApiKey(key_sha256=ApiKey.digest("sk-1"))}}
    header = {"authorization": "Bearer sk-1"}
    assert read({}, header, **keys).tenant == "acme"
    assert read({}, {**header, "x-slo-tenant": "beta"}, **keys).tenant == "beta"
    assert read({"slo": {"tenant": "gamma"}}, {**header, "x-slo-tenant": "beta"}, **keys).tenant == "gamma"
    assert read({}, {"authorization": "Bearer sk-2"}, **keys).tenant == ""
    assert read({}, {"authorization": "Basic sk-1"}, **keys).tenant == ""
    assert read({}, header, **keys).asked is False


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
        request = read(mine, header, **config)
        assert request.slo_class == expected
        assert "slo_ttft_ms" not in request.xargs
    assert read({"vllm_xargs": {"slo_class": "chat"}}, header, tenants=tenants).keeps_own is False


def test_a_class_may_ask_to_be_rejected(read):
    request = read({"slo": {"class": "voice"}})
    assert (request.rejects, request.hold_s) == (True, 10)
    assert read({"vllm_xargs": {"slo_class": "voice"}}).rejects
    assert not read({"vllm_xargs": {"slo_class": ["voice"]}}).rejects


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
        ([(b"x-request-id", b"5")], b"{}", False),
    ],
)
def test_only_requests_that_mention_an_slo_are_parsed(headers, body, concerns):
    assert Operator(SloConfig()).concerns(headers, body) is concerns
    assert Operator(SloConfig(default_class="chat")).concerns(headers, body)
