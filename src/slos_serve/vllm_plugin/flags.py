"""vLLM's command line as the keyword arguments of its engine and front end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:  # from 0.33 on
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from slos_serve.errors import ConfigError

NOT_ARGUMENTS = frozenset({"model_tag", "config", "headless", "api_server_count", "grpc"})


def engine_kwargs(tokens: Sequence[str]) -> dict[str, Any]:
    """Return what the flags set, by vLLM's own names, without what they leave at its default; MODEL is `model`.

    `ConfigError` for a flag that vLLM does not know.
    """

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> Any:
            raise ConfigError(where="arguments", key="flags of vLLM", value=" ".join(tokens)[:100], expected=message)

    parser = make_arg_parser(Parser())
    given = vars(parser.parse_args(list(tokens)))
    given["model"] = given["model_tag"] or given["model"]
    return {
        name: value for name, value in given.items() if name not in NOT_ARGUMENTS and value != parser.get_default(name)
    }
