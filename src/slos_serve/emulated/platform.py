"""vLLM's platform for an emulated device: the CPU platform, with what it takes away from GPUs put back.

Found through the entry point group `vllm.platform_plugins`, and only where `SLOS_SERVE_EMULATE` is set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms.cpu import CpuPlatform

from slos_serve.emulated.emulation import Emulation, current
from slos_serve.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER = "slos_serve.emulated.worker.EmulatedWorker"


class EmulatedPlatform(CpuPlatform):
    """A device whose steps take as long as a hardware file says."""

    @classmethod
    def emulation(cls) -> Emulation:
        """Return the device that the environment asks for."""
        emulation = current()
        if emulation is None:
            raise RuntimeError("the emulated platform is loaded though nothing asks for it")
        return emulation

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Return a name that says that the device is emulated."""
        return cls.emulation().name

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Let the CPU platform check the configuration, then put back what only its kernels rule out."""
        scheduler, parallel, cache = (
            vllm_config.scheduler_config,
            vllm_config.parallel_config,
            vllm_config.cache_config,
        )
        from slos_serve.emulated.config import EmulatedConfig  # noqa: PLC0415 - vLLM's needs a platform first

        hardware = cls.emulation().hardware
        is_async = scheduler.async_scheduling
        block_size = cache.block_size if cache.user_specified_block_size else hardware.block_size
        super().check_and_update_config(vllm_config)
        scheduler.async_scheduling = is_async
        cache.block_size = block_size
        parallel.worker_cls = WORKER
        parallel.distributed_executor_backend = "uni"
        check(vllm_config, cls.emulation())
        vllm_config.__class__ = EmulatedConfig


def check(vllm_config: Any, emulation: Emulation) -> None:
    """Raise `ConfigError` for what such a device cannot serve."""
    hardware, scheduler = emulation.hardware, vllm_config.scheduler_config
    if torch.version.cuda or torch.version.hip:
        expected = "vLLM's build for CPUs: this one is for a GPU, and could serve on it"
        raise ConfigError(where="emulate", key="device", value=emulation.text, expected=expected)
    if vllm_config.model_config is not None and vllm_config.model_config.runner_type != "generate":
        runner = vllm_config.model_config.runner_type
        raise ConfigError(where="emulate", key="--runner", value=runner, expected="a model that generates text")
    if vllm_config.parallel_config.world_size > 1:
        size = vllm_config.parallel_config.world_size
        expected = "1: a hardware file is about a whole replica, however many GPUs that is"
        raise ConfigError(where="emulate", key="tensor and pipeline parallel size", value=size, expected=expected)
    hardware.check_seats(scheduler.max_num_seqs, vllm_config.cache_config.block_size)
