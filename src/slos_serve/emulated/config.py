"""vLLM's configuration as an emulated device needs it."""

from __future__ import annotations

import vllm.envs
from vllm.config import VllmConfig


class EmulatedConfig(VllmConfig):
    """vLLM's configuration, which takes the second model runner's paths without Triton: no kernel is run.

    `VLLM_USE_V2_MODEL_RUNNER=0` still chooses the first runner's, as does what the second one does not support.
    """

    @property
    def use_v2_model_runner(self) -> bool:
        """Tell whether the scheduler takes the paths of vLLM's second model runner, its default on GPUs."""
        return vllm.envs.VLLM_USE_V2_MODEL_RUNNER is not False and not self._get_v2_model_runner_unsupported_features()

    def _validate_v2_model_runner(self) -> None:
        """Ask for nothing: the property has."""
