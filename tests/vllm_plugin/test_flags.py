"""A command line of vLLM becomes the keyword arguments of its engine, on every version alike."""

import pytest

from slos_serve.errors import ConfigError
from slos_serve.vllm_plugin.flags import engine_kwargs


@pytest.mark.parametrize("model", [["/some/model"], ["--model", "/some/model"]])
def test_the_model_is_one_argument_however_it_is_given(model):
    kwargs = engine_kwargs([*model, "--port", "8001", "--max-model-len", "1024"])
    assert kwargs == {"model": "/some/model", "port": 8001, "max_model_len": 1024}


def test_a_flag_that_vllm_does_not_know_is_told():
    with pytest.raises(ConfigError, match="no-such-flag"):
        engine_kwargs(["/some/model", "--no-such-flag", "1"])
