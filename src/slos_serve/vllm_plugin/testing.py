"""A real vLLM scheduler without a model, for tests and benchmarks.

Configs come from a local file, nothing is downloaded and no device is used; outputs are made up by a mock
executor. Schedulers made here are vLLM's own classes or ours.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from slos_serve.core.perf import PerfModel
from slos_serve.records.profile import SCHEMA
from slos_serve.vllm_plugin.scheduler import SloScheduler

BLOCK_SIZE = 16
TOKEN = 7  # what the mock executor samples, always
VOCABULARY = 512

init_none_hash(sha256)
_HASHER = get_request_block_hasher(BLOCK_SIZE, sha256)


def write_model_config(root: Path) -> Path:
    """Write the config of a tiny Llama below `root` and return its folder."""
    folder = root / "tiny-llama"
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_profile(path: Path, model: PerfModel, key: str = "test") -> Path:
    """Write a profile file that holds `model`."""
    path.write_text(json.dumps({"schema": SCHEMA, "key": key, "perf_model": model.to_json(), "num_steps": 0}))
    return path


def make_config(
    root: Path,
    *,
    is_async: bool = False,
    slo: dict[str, Any] | None = None,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 256,
    policy: str = "fcfs",
    prefix_caching: bool = False,
    max_model_len: int = 2048,
    speculative_tokens: int = 0,
) -> VllmConfig:
    """Return an engine's configuration; `slo` is `additional_config["slo"]`."""
    speculative = {"method": "ngram", "num_speculative_tokens": speculative_tokens, "prompt_lookup_max": 3}
    model_config = ModelConfig(
        model=str(write_model_config(root)),
        dtype="float32",
        seed=1,
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
    )
    scheduler_config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        policy=policy,
    )
    cache_config = CacheConfig(
        block_size=BLOCK_SIZE, gpu_memory_utilization=0.9, cache_dtype="auto", enable_prefix_caching=prefix_caching
    )
    parallel_config = ParallelConfig()
    options: dict[str, Any] = {}
    if speculative_tokens:
        from vllm.config import SpeculativeConfig  # noqa: PLC0415 - only where asked for

        options["speculative_config"] = SpeculativeConfig(
            target_model_config=model_config, target_parallel_config=parallel_config, **speculative
        )
    config = VllmConfig(
        scheduler_config=scheduler_config,
        model_config=model_config,
        cache_config=cache_config,
        parallel_config=parallel_config,
        device_config=DeviceConfig("cpu"),
        additional_config={} if slo is None else {"slo": slo},
        **options,
    )
    config.scheduler_config.async_scheduling = is_async  # the CPU platform switches it off
    return config


def make_scheduler(
    root: Path,
    *,
    cls: type[Any] = SloScheduler,
    num_blocks: int = 1000,
    config: VllmConfig | None = None,
    **options: Any,
) -> Any:
    """Build a scheduler as the engine core does; `options` are those of `make_config`, where no `config` is given."""
    if config is None:
        config = make_config(root, is_async=issubclass(cls, AsyncScheduler), **options)
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv_cache_config = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    config.cache_config.num_gpu_blocks = num_blocks
    return cls(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        block_size=BLOCK_SIZE,
        log_stats=True,
        structured_output_manager=StructuredOutputManager(config),
    )


def make_request(
    request_id: str,
    *,
    prompt_tokens: int = 32,
    max_tokens: int = 8,
    args: dict[str, Any] | None = None,
    arrival_s: float | None = None,
    priority: int = 0,
    seed: int | None = None,
    grammar: bool = False,
    stop: list[str] | None = None,
) -> Request:
    """Return a text request; `args` are its vllm_xargs; equal seeds make equal prompts."""
    rng = np.random.default_rng(zlib.crc32(request_id.encode()) if seed is None else seed)
    structured = StructuredOutputsParams(json='{"type": "object"}') if grammar else None
    if structured is not None:
        structured._backend = "xgrammar"  # noqa: SLF001 -- as vLLM's own tests do
    params = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        temperature=0.0,
        extra_args=args,
        structured_outputs=structured,
        stop=stop,
    )
    return Request(
        request_id=request_id,
        prompt_token_ids=rng.integers(8, VOCABULARY, prompt_tokens).tolist(),
        sampling_params=params,
        pooling_params=None,
        arrival_time=arrival_s,
        priority=priority,
        block_hasher=_HASHER,
    )


class Engine:
    """The engine core's loop over a scheduler, with made-up outputs.

    `depth` 2 schedules one batch ahead, as async scheduling does. `accept(request, drafts)` says how many
    drafts are accepted. `outputs` are the tokens by request, `finished` the final outputs, `batches` what
    was scheduled.
    """

    def __init__(self, scheduler: Any, *, depth: int = 1, accept: Callable[[Request, int], int] | None = None) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.queue: list[tuple[SchedulerOutput, ModelRunnerOutput]] = []
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, Any] = {}
        self.batches: list[dict[str, int]] = []
        self._accept = accept

    def step(self) -> SchedulerOutput | None:
        """Schedule one batch; take the oldest output when the queue is full or nothing is left to schedule."""
        output = None
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.batches.append(dict(output.num_scheduled_tokens))
            self.queue.append((output, self.execute(output)))
            if len(self.queue) < self.depth:
                return output
        if self.queue:
            self._take(*self.queue.pop(0))
        return output

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Make up the model's output: one token, and accepted drafts, for each completed prefill or decode."""
        ids = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        sampled: list[list[int]] = []
        for request_id in ids:
            request = requests.get(request_id)
            drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            if request is not None and request.is_prefill_chunk:
                sampled.append([])
                continue
            accepted = self._accept(request, drafts) if self._accept is not None and drafts else 0
            sampled.append([TOKEN] * (1 + accepted))
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def _take(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        for batch in self.scheduler.update_from_output(output, result).values():
            for one in batch.outputs:
                self.outputs.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.finished[one.request_id] = one

    def run(self, max_steps: int = 5000) -> int:
        """Step until nothing is left; returns the steps it took."""
        for step in range(max_steps):
            if not self.scheduler.has_unfinished_requests() and not self.queue:
                return step
            self.step()
        left = [f"{r.request_id} {r.status.name} {r.num_computed_tokens}" for r in self.scheduler.requests.values()]
        raise AssertionError(f"{max_steps} steps and still unfinished: {left}")

    def abort(self, request_id: str) -> None:
        """Abort as the engine core does."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
