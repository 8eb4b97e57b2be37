"""vLLM's worker for an emulated device: no weights, no cache, and outputs that come when the device would be done."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    DraftTokenIds,
    LogprobsLists,
    ModelRunnerOutput,
)
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from slos_serve.emulated.device import Batch, Device, Run
from slos_serve.emulated.emulation import LEAVES_OUT, current
from slos_serve.emulated.tokens import (
    MadeUpOutput,
    accepted,
    allowed_token,
    made_up_logprobs,
    natural_length,
    plain_tokens,
    seed_of,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput

logger = logging.getLogger("vllm.slos_serve")
LOG_EVERY_S = 1.0


class Pending(AsyncModelRunnerOutput):
    """An output that is there when the device is done with its batch."""

    def __init__(self, output: ModelRunnerOutput, end_s: float) -> None:
        self._output = output
        self._end_s = end_s

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the device, then return the output."""
        _sleep_until(self._end_s)
        return self._output


def _sleep_until(end_s: float) -> None:
    seconds = end_s - time.perf_counter()
    if seconds > 0:
        time.sleep(seconds)


class EmulatedWorker(WorkerBase):
    """One emulated device: batches in, made-up tokens out, on time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        emulation = current()
        if emulation is None:
            raise RuntimeError("an emulated worker is started though nothing asks for it")
        self.emulation = emulation
        switches = emulation.switches
        self._device = Device(emulation.hardware.perf_model, switches, now_s=time.perf_counter())
        self._random = np.random.default_rng(switches.seed + 1)
        self._vocabulary = plain_tokens(self.vocab_size)
        self._requests: dict[str, MadeUpOutput] = {}
        self._batch: SchedulerOutput | None = None
        self._run = Run(handed_s=0.0, start_s=0.0, end_s=0.0)
        self._emits: list[str] = []
        self._drafted: dict[str, int] = {}
        self._log = BatchLog(Path(switches.log)) if switches.log else None
        logger.warning(
            "The device is EMULATED: %s (%s), %s model runner's scheduling, %s. Limits: %s.",
            emulation.text,
            emulation.hardware.description or "no description",
            "second" if self.vllm_config.use_v2_model_runner else "first",
            "asynchronous" if self.scheduler_config.async_scheduling else "synchronous",
            LEAVES_OUT,
        )

    def init_device(self) -> None:
        """Take no device: there is none."""
        self.device = torch.device("cpu")

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load nothing."""

    def get_model(self) -> Any:
        """Return no model."""
        raise NotImplementedError("an emulated device holds no model")

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        """Return one attention layer of the smallest page: blocks are counted, and nothing is stored in them."""
        size = self.cache_config.block_size
        return {"emulated": FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.bfloat16)}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Return every layout that vLLM might ask for."""
        return ["NHD", "HND"]

    def determine_available_memory(self) -> int:
        """Return the bytes of as many blocks as the hardware file has room for."""
        spec = self.get_kv_cache_spec()["emulated"]
        return int(self.emulation.hardware.kv_tokens // spec.block_size * spec.page_size_bytes)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate nothing."""

    def update_max_model_len(self, max_model_len: int) -> None:
        """Keep nothing that depends on it."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile nothing."""
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def reset_encoder_cache(self) -> None:
        """Empty nothing."""

    def reset_mm_cache(self) -> None:
        """Empty nothing."""

    def sleep(self, level: int = 1) -> None:
        """Free nothing: there are no weights."""

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Bring nothing back."""

    def get_supported_tasks(self) -> tuple[str, ...]:
        """Return that text is generated, and nothing else."""
        return ("generate",)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Hand a batch to the device; `sample_tokens` returns its output."""
        self._forget(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        now_s = time.perf_counter()
        batch = self._take(scheduler_output)
        self._batch = scheduler_output
        self._run = self._device.submit(batch, now_s)
        if self._log is not None:
            self._log.add(batch, self._run)
        return None

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Return the batch's made-up tokens: at once and to be waited for, or after the wait where synchronous."""
        output = self._outputs(grammar_output)
        if self.scheduler_config.async_scheduling:
            return Pending(output, self._run.end_s)
        _sleep_until(self._run.end_s)
        return output

    def take_draft_token_ids(self) -> DraftTokenIds:
        """Return as many made-up drafts for each request as were asked for with the last batch."""
        ids = list(self._drafted)
        drafts = [[self._vocabulary[0]] * self._drafted[name] for name in ids]
        return DraftTokenIds(req_ids=ids, draft_token_ids=drafts)

    def execute_dummy_batch(self) -> None:
        """Do nothing: there is nobody to keep in step with."""

    def add_lora(self, lora_request: Any) -> bool:
        """Accept an adapter, which changes nothing here."""
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Accept that an adapter goes."""
        return True

    def pin_lora(self, lora_id: int) -> bool:
        """Accept that an adapter stays."""
        return True

    def list_loras(self) -> set[int]:
        """Return no adapters."""
        return set()

    def synchronize_device(self) -> None:
        """Wait until the last batch is done."""
        _sleep_until(self._run.end_s)

    def shutdown(self) -> None:
        """Write what is left of the log."""
        if self._log is not None:
            self._log.close()

    def _forget(self, output: SchedulerOutput) -> None:
        for name in output.finished_req_ids:
            self._requests.pop(name, None)

    def _take(self, output: SchedulerOutput) -> Batch:
        """Note what the batch computes and which requests it brings a token.

        A request's prefill ends at its prompt and the output tokens that it had before: a preempted one computes
        those again.
        """
        shares, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        self._emits = []
        context, pairs = 0, 0.0
        for name, computed, end in self._positions(output):
            share = shares[name]
            left = end - computed
            if left == 1:
                context += computed
            else:
                pairs += share * (computed + share / 2)
            if share - len(drafts.get(name, ())) >= left:
                self._emits.append(name)
        steps = 0 if getattr(output, "skip_drafts", False) else output.num_spec_tokens_to_schedule
        return Batch(
            num_tokens=output.total_num_scheduled_tokens,
            num_requests=len(shares),
            context_tokens=context,
            draft_steps=steps,
            attention_pairs=pairs,
        )

    def _positions(self, output: SchedulerOutput) -> list[tuple[str, int, int]]:
        """Return (request, tokens computed before this batch, tokens after which it yields one) of each."""
        found = []
        for new in output.scheduled_new_reqs:
            end = len(new.prefill_token_ids or new.prompt_token_ids or ()) or new.prompt_len
            self._requests[new.req_id] = self._progress(new, end)
            found.append((new.req_id, new.num_computed_tokens, end))
        cached = output.scheduled_cached_reqs
        for name, computed, outputs in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            progress = self._requests[name]
            if name in cached.resumed_req_ids:
                progress.emitted = outputs
            found.append((name, computed, progress.num_prompt_tokens + outputs))
        return found

    def _progress(self, new: NewRequestData, end: int) -> MadeUpOutput:
        """Return a request as it comes, or comes back: `end` counts its prompt and what it has said."""
        params, prompt_len = new.sampling_params, new.prompt_len
        is_sampled = params is not None and params.temperature > 0
        seed = seed_of(new.prompt_token_ids or (), new.req_id if is_sampled else "")
        mean = self.emulation.switches.output_tokens
        ends = params is not None and not params.ignore_eos and params.eos_token_id is not None and mean > 0
        return MadeUpOutput(
            num_prompt_tokens=prompt_len,
            seed=seed,
            emitted=end - prompt_len,
            ends_at=natural_length(seed, mean, params.min_tokens + 1) if ends else 0,
            end_token=params.eos_token_id if ends else None,
            num_logprobs=None if params is None else params.num_logprobs,
        )

    def _outputs(self, grammar: GrammarOutput | None) -> ModelRunnerOutput:
        batch = self._batch
        assert batch is not None, "sample_tokens() comes after execute_model()"
        drafts = batch.scheduled_spec_decode_tokens
        ids = list(batch.num_scheduled_tokens)
        index = {name: i for i, name in enumerate(ids)}
        tokens: list[list[int]] = [[] for _ in ids]
        masks = _masks(grammar, drafts)
        for name in self._emits:
            progress = self._requests[name]
            if name in masks:
                progress.emitted += 1
                token = allowed_token(masks[name], progress.seed + progress.emitted, progress.end_token)
                tokens[index[name]] = [token]
                continue
            count = 1 + accepted(len(drafts.get(name, ())), self.emulation.switches.acceptance, self._random)
            tokens[index[name]] = progress.take(count, self._vocabulary)
        self._drafted = dict.fromkeys(self._emits, batch.num_spec_tokens_to_schedule)
        logprobs = self._logprobs(tokens)
        return ModelRunnerOutput(req_ids=ids, req_id_to_index=index, sampled_token_ids=tokens, logprobs=logprobs)

    def _logprobs(self, tokens: Sequence[Sequence[int]]) -> LogprobsLists | None:
        """Return made-up logprobs of every token of the batch, None where no request asks for any."""
        asked = [p.num_logprobs for p in map(self._requests.__getitem__, self._emits) if p.num_logprobs is not None]
        if not asked:
            return None
        flat = [token for part in tokens for token in part]
        ids, values = made_up_logprobs(flat, max(asked))
        starts = list(itertools.accumulate(map(len, tokens), initial=0))
        return LogprobsLists(ids, values, np.ones(len(flat), np.int64), starts)


def _masks(grammar: GrammarOutput | None, drafts: dict[str, list[int]]) -> dict[str, Any]:
    """Return each constrained request's mask for its next token; its drafts have rows of their own behind it."""
    if grammar is None:
        return {}
    rows, row = {}, 0
    for name in grammar.structured_output_request_ids:
        rows[name] = grammar.grammar_bitmask[row]
        row += 1 + len(drafts.get(name, ()))
    return rows


class BatchLog:
    """One JSON line for each batch: when it was handed over, started and ended, and what it computed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._flushed_s = time.perf_counter()

    def add(self, batch: Batch, run: Run) -> None:
        """Write one batch; what is written reaches the file once a second."""
        times = (run.handed_s, run.start_s, run.end_s)
        shape = (batch.num_tokens, batch.num_requests, batch.context_tokens)
        self._file.write(json.dumps([*(round(t, 6) for t in times), *shape]) + "\n")
        if run.handed_s - self._flushed_s > LOG_EVERY_S:
            self._file.flush()
            self._flushed_s = run.handed_s

    def close(self) -> None:
        """Write what is left."""
        self._file.close()
