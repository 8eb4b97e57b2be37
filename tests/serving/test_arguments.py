"""vLLM's flags are read like vLLM reads them and passed on unchanged."""

import pytest

from slos_serve.errors import ConfigError
from slos_serve.serving.arguments import EngineArguments, merge


def test_flags_are_found_in_every_spelling():
    arguments = EngineArguments(["--max-model-len", "4096", "--enforce_eager", "--dtype=float32", "-tp", "2"])
    assert arguments.get("max-model-len") == "4096"
    assert arguments.get("enforce-eager") == ""
    assert arguments.get("dtype") == "float32"
    assert arguments.get("tensor-parallel-size") == "2"
    assert arguments.get("seed") is None


def test_the_last_of_two_values_counts():
    assert EngineArguments(["--seed", "1", "--seed", "2"]).get("seed") == "2"


def test_a_negative_number_is_a_value():
    assert EngineArguments(["--long-prefill-token-threshold", "-1"]).get("long-prefill-token-threshold") == "-1"


def test_the_command_line_overrides_the_config_file(tmp_path):
    path = tmp_path / "vllm.yaml"
    path.write_text("dtype: float32\nmax_model_len: 2048\nspeculative-config:\n  method: ngram\n")
    arguments = EngineArguments(["--config", str(path), "--dtype", "bfloat16"])
    assert arguments.get("dtype") == "bfloat16"
    assert arguments.get("max-model-len") == "2048"
    assert arguments.get("speculative-config") == '{"method": "ngram"}'


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", None])
def test_a_bad_config_file_is_named(tmp_path, text):
    path = tmp_path / "vllm.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"vllm\.yaml"):
        EngineArguments(["--config", str(path)])


def test_every_form_of_additional_config_is_merged_and_removed(tmp_path):
    path = tmp_path / "vllm.yaml"
    path.write_text("additional_config:\n  file: 1\n  both: file\n")
    arguments = EngineArguments(
        [
            *("--seed", "1", "--config", str(path), "--additional-config", '{"both": "flag", "slo": {"guard_ms": 5}}'),
            *("--additional-config.slo.report_s", "30", "--additional-config.name=word", "--enforce-eager"),
        ]
    )
    merged = arguments.take_additional_config()
    assert merged == {"file": 1, "both": "flag", "slo": {"guard_ms": 5, "report_s": 30}, "name": "word"}
    assert arguments.arguments == ["--seed", "1", "--config", str(path), "--enforce-eager"]


@pytest.mark.parametrize("value", ["[1]", "{", "word"])
def test_an_additional_config_that_is_no_object_is_named(value):
    with pytest.raises(ConfigError, match="--additional-config"):
        EngineArguments(["--additional-config", value]).take_additional_config()


def test_merging_goes_to_every_depth_and_the_later_wins():
    into = {"a": {"b": 1, "c": 2}, "d": 1}
    merge(into, {"a": {"c": 3}, "d": {"e": 4}})
    assert into == {"a": {"b": 1, "c": 3}, "d": {"e": 4}}
