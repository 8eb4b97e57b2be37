"""Every private name of Ray that this package touches, in one place: Ray 2.60.0 is pinned for their sake."""

from __future__ import annotations

from ray import serve
from ray._common.usage.usage_lib import usage_stats_enabled
from ray._raylet import Config
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.llm._internal.common.dict_utils import maybe_apply_llm_deployment_config_defaults as merge_options
from ray.llm._internal.common.utils.lora_utils import get_base_model_id
from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest, to_model_metadata
from ray.llm._internal.serve.core.ingress.builder import LLMServingArgs
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, init
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request as sanitize_chat
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve._private.api import _get_global_client
from ray.serve._private.http_util import session_id_from_headers
from ray.serve._private.request_router.request_router import LocalityMixin, MultiplexMixin, RequestRouter

__all__ = [
    "DEFAULT_ENDPOINTS",
    "STARTED_TOO_LATE",
    "ChatCompletionRequest",
    "LLMServingArgs",
    "LocalityMixin",
    "MultiplexMixin",
    "RawRequestInfo",
    "RayActorError",
    "RayError",
    "RayTaskError",
    "RequestRouter",
    "TaskCancelledError",
    "base_model_id",
    "http_port",
    "init",
    "merge_options",
    "read_environment_again",
    "request_id",
    "sanitize_chat",
    "session_id_from_headers",
    "start_tracing",
    "to_model_metadata",
    "usage_stats_enabled",
]

STARTED_TOO_LATE = "timed out during startup"  # what `ray.init` says where its raylet takes more than 30 s


def read_environment_again() -> None:
    """Let this process's Ray read its `RAY_*` settings anew: it keeps those of the moment when it was imported."""
    Config.initialize("")


def start_tracing(endpoint: str) -> None:
    """Export this process's spans to an OTLP endpoint, as vLLM does in the processes of its engines."""
    from vllm.tracing import init_tracer  # noqa: PLC0415 - only where spans are wanted

    init_tracer("slos_serve.ingress", endpoint)


def request_id() -> str:
    """Return Serve's id of the request that is being served, "" outside of one."""
    context = serve.context._serve_request_context.get()  # noqa: SLF001
    return context.request_id if context is not None else ""


def base_model_id(model_id: str) -> str:
    """Return the base model of a LoRA adapter's id; any other id unchanged."""
    return str(get_base_model_id(model_id))


def http_port() -> int:
    """Return the port that Serve's proxies listen on."""
    return int(_get_global_client().http_config.port)
