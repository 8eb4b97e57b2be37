"""The ways of waiting live in `slos_serve.vllm_plugin.engine.queues`; this name of them stays for who wrote it down."""

from slos_serve.vllm_plugin.engine.queues import KINDS, kind_in, kind_of

__all__ = ["KINDS", "kind_in", "kind_of"]
