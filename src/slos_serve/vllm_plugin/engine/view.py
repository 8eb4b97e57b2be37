"""What we read of vLLM, and the check that it still is what we read.

Written for vLLM 0.29 to 0.33. vLLM's scheduler is not a public interface, so its names appear in three modules
only: here (reading), in `steer` (writing) and, for how requests wait, in `queues`. `probe` compares the structure of
the installed source with what these rely on; a difference is a sentence, and the plug-in then observes instead of
steering. `unsupported` does the same for one engine's configuration.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.request import RequestStatus

from slos_serve.core.moves import COMPUTED, EXPECTED, IS_RUNNING, NUM_SEEN, PRODUCED
from slos_serve.core.types import IntArray, Limits
from slos_serve.vllm_plugin.engine.queues import KINDS, kind_in, kind_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.request import Request

HOOK = "_reserve_prefill_lookahead"
# A template that switches thinking off closes the span so many tokens before the end of the prompt at most; one that
# opens another turn puts more in between.
CLOSING_TOKENS = 8

_computed_of, _outputs_of = attrgetter("num_computed_tokens"), attrgetter("_output_token_ids")
_placeholders_of = attrgetter("num_output_placeholders")

# name -> parameters after self
METHODS = {
    HOOK: ["request", "num_computed_tokens", "num_new_tokens"],
    "schedule": ["throttle_prefills"],
    "update_from_output": ["scheduler_output", "model_runner_output"],
    "add_request": ["request"],
    "set_pause_state": ["pause_state"],
    "shutdown": [],
    "_free_request": ["request", "delay_free_blocks"],
    "_preempt_request": ["request", "timestamp", "drop_stale_output"],
}
ATTRIBUTES: tuple[str, ...] = (
    "requests",
    "running",
    "policy",
    "max_num_scheduled_tokens",
    "max_num_running_reqs",
    "max_model_len",
    "num_spec_tokens",
    "dynamic_sd_lookup",
    "prefill_capacity_bound",
    "kv_cache_manager",
    "block_size",
    "connector",
    "ec_connector",
    "lora_config",
)


def _self_calls(function: Callable[..., Any]) -> list[str]:
    """Return the names of the methods of self that a function calls."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [name.removeprefix("self.") for name in calls if name.startswith("self.")]


def _hook_targets(schedule: Callable[..., Any]) -> list[str]:
    """Return the variable that each call of the hook in `schedule` is assigned to."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(schedule)))
    return [
        ast.unparse(node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == f"self.{HOOK}"
    ]


def _assigned_attributes(init: Callable[..., Any]) -> dict[str, str]:
    """Return the attributes of self that a constructor sets, with their expressions."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(init)))):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                found[target.attr] = ast.unparse(value)
    return found


def _method_differences(scheduler_class: type[Any], methods: Mapping[str, list[str]]) -> list[str]:
    """Return which methods are missing or take something else."""
    differences: list[str] = []
    for name, expected in methods.items():
        method = getattr(scheduler_class, name, None)
        if method is None:
            differences.append(f"Scheduler.{name} is missing")
            continue
        found = [p for p in inspect.signature(method).parameters if p != "self"]
        if found != expected:
            differences.append(f"Scheduler.{name} takes {found}: expected {expected}")
    return differences


def _source_differences(scheduler_class: type[Any]) -> list[str]:
    """Return how the body of `schedule` and what the constructor sets differ."""
    targets = _hook_targets(scheduler_class.schedule)
    calls = _self_calls(scheduler_class.schedule).count(HOOK)
    attributes = _assigned_attributes(scheduler_class.__init__)
    differences: list[str] = []
    if calls != 2 or targets != ["num_new_tokens", "num_new_tokens"]:
        differences.append(f"Scheduler.schedule calls {HOOK} {calls} times, into {targets}: expected twice")
    queues = sorted(name for name, value in attributes.items() if value.startswith("create_request_queue("))
    kind = kind_of(queues)
    needed = ATTRIBUTES
    if kind is None:
        known = " or ".join(str(sorted(kind.QUEUES)) for kind in KINDS)
        differences.append(f"Scheduler keeps waiting requests in {queues}: expected {known}")
    else:
        differences += _method_differences(scheduler_class, kind.METHODS)
        needed += kind.ATTRIBUTES
    return differences + [f"Scheduler.{name} is missing" for name in needed if name not in attributes]


def probe(scheduler_class: type[Any] = Scheduler, async_class: type[Any] = AsyncScheduler) -> list[str]:
    """Return every difference of the installed vLLM from what this plug-in steers by; empty where it may steer.

    The structure decides, never the version: methods and what they take, where `schedule` calls the hook, what the
    constructor sets, and which of the known ways of waiting it is (`queues`).
    """
    differences = _method_differences(scheduler_class, METHODS)
    try:
        differences += _source_differences(scheduler_class)
    except (AttributeError, OSError, SyntaxError, TypeError) as error:
        differences.append(f"the source of Scheduler cannot be read ({error})")
    if "schedule" in vars(async_class):
        differences.append("AsyncScheduler has a schedule() of its own")
    return differences


def unsupported(scheduler: Any) -> list[str]:
    """Return what this engine is configured for that the planner cannot steer; empty means nothing."""
    config = scheduler.vllm_config
    auxiliary = getattr(scheduler, "aux_output_connector", None)
    checks = {
        "pooling models": config.model_config.runner_type == "pooling",
        "encoder-decoder models": bool(scheduler.is_encoder_decoder),
        "diffusion models": bool(config.model_config.is_diffusion),
        "Mamba state aligned to blocks": bool(scheduler.need_mamba_block_aligned_split),
        "multi-module MTP": scheduler.num_prefill_lookahead > 1,
        "chunked prefill switched off": not scheduler.scheduler_config.enable_chunked_prefill,
        "a KV connector": scheduler.connector is not None,
        "an encoder-cache connector": scheduler.ec_connector is not None,
        "a model without KV cache": not scheduler.kv_cache_config.kv_cache_groups,
        "data-parallel engines in lock step": scheduler.parallel_config.data_parallel_size > 1,
        "prefix hits that are computed again": bool(getattr(scheduler, "prefix_replay_tokens", 0)),
        "prefix hits cut to auxiliary outputs": hasattr(auxiliary, "max_cache_hit"),
        "a KV cache that is not full attention in blocks of one size": not _is_plain(scheduler),
        "pipeline parallelism": scheduler.parallel_config.pipeline_parallel_size > 1,
        "drafts whose input slots take half of a step": 2 * _draft_slots(scheduler) > _step_tokens(scheduler),
        "images that must not be split": bool(scheduler.scheduler_config.disable_chunked_mm_input),
    }
    return [name for name, present in checks.items() if present]


def _step_tokens(scheduler: Any) -> int:
    """Return how many tokens a step may carry where no drafter takes a part of it."""
    return int(min(scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.max_num_batched_tokens))


def _draft_slots(scheduler: Any) -> int:
    """Return the input slots that a drafter takes from a step in which every seat is used, 0 for most drafters."""
    each = getattr(scheduler.vllm_config.speculative_config, "max_num_new_slots_for_drafting", 0)
    return int(each * scheduler.max_num_running_reqs)


def _is_plain(scheduler: Any) -> bool:
    """Tell whether every token of a request takes room in each KV cache group until it ends.

    Sliding windows give blocks back and Mamba states hold a fixed number: counted by tokens, both come out wrong.
    """
    specs = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
    for spec in specs:
        for part in getattr(spec, "kv_cache_specs", {"": spec}).values():
            if type(part) not in (FullAttentionSpec, MLAAttentionSpec) or part.block_size != scheduler.block_size:
                return False
    return True


def mismatch(scheduler: Any, *, is_async: bool) -> list[str]:
    """Return that the class given to vLLM is not for how this engine schedules; empty where it is."""
    names = {False: ("SloScheduler", "synchronous"), True: ("AsyncSloScheduler", "asynchronous")}
    given, wanted = is_async and not scheduler.is_stand_in, bool(scheduler.scheduler_config.async_scheduling)
    if given == wanted:
        return []
    (name, kind), (fitting, other) = names[given], names[wanted]
    return [f"{name} is for {kind} scheduling and this engine's is {other}: give it {fitting} or AutoSloScheduler"]


def is_blocked(request: Request) -> bool:
    """Tell whether a waiting request cannot run yet: a grammar, remote KV or more input is awaited."""
    return request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED, RequestStatus.RUNNING)


def has_run(request: Request) -> bool:
    """Tell whether a request runs, or ran and was preempted."""
    return request.status in (RequestStatus.RUNNING, RequestStatus.PREEMPTED)


def is_queued(request: Request) -> bool:
    """Tell whether a request waits to be admitted and holds no blocks that a step in flight may write."""
    return request.status is RequestStatus.WAITING or (
        request.status is RequestStatus.PREEMPTED and not request.num_stale_output_tokens
    )


def awaits_grammar(request: Request) -> bool:
    """Tell whether a request waits for its grammar to be compiled."""
    return request.status is RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR


def promote(scheduler: Any, request: Request) -> bool:
    """Let vLLM make a blocked request runnable if what it waited for has come; tell whether it did."""
    kind = kind_in(scheduler)  # a vLLM that waits in no known way is never steered and promotes by itself
    return kind is not None and kind.promote(scheduler, request)


def follows_stock_rules(request: Request) -> bool:
    """Tell whether a request has needs that only vLLM's own order can serve: pooling and streamed input.

    Such a request is offered to vLLM in every step and gets a token at least, so that no plan can stall it.
    """
    return request.sampling_params is None or bool(request.resumable)


def has_encoder_inputs(request: Request) -> bool:
    """Tell whether a request brings images or sound: how long their encoder takes is not known."""
    return bool(request.mm_features)


def is_admitted(request: Request) -> bool:
    """Tell whether a request runs."""
    return request.status is RequestStatus.RUNNING


def holds_seat(request: Request) -> bool:
    """Tell whether a request takes one of the engine's seats now; a streamed session keeps its own between inputs."""
    return request.status in (RequestStatus.RUNNING, RequestStatus.WAITING_FOR_STREAMING_REQ)


def pause_of(scheduler: Any) -> str:
    """Return which requests the operator has paused: none (""), those not yet admitted ("new"), or "all"."""
    return {"PAUSED_NEW": "new", "PAUSED_ALL": "all"}.get(scheduler.pause_state.name, "")


def ends_thinking(request: Request, marks: frozenset[int]) -> bool:
    """Tell whether the prompt closes a thinking span at its end, as templates do where thinking is off."""
    tail = (request.prompt_token_ids or [])[-CLOSING_TOKENS:]
    return not marks.isdisjoint(tail)


def seen(requests: Sequence[Request], *, is_async: bool) -> IntArray:
    """Return what vLLM says of requests that run or ran, shape (`NUM_SEEN`, len(requests)); see `core.moves`.

    Under async scheduling `num_computed_tokens` counts the steps in flight, and placeholders stand for the output
    tokens that those may produce, drafts included.
    """
    running = RequestStatus.RUNNING
    found = np.zeros((NUM_SEEN, len(requests)), np.int64)
    found[IS_RUNNING] = [request.status is running for request in requests]
    found[COMPUTED] = list(map(_computed_of, requests))
    found[PRODUCED] = list(map(len, map(_outputs_of, requests)))
    if is_async:
        found[EXPECTED] = list(map(_placeholders_of, requests))
    return found


def drop_stale_drafts(scheduler: Any, scheduled: Mapping[str, int]) -> list[str]:
    """Forget the placeholders of decodes that a step under asynchronous scheduling holds; return their ids.

    A worker proposes drafts for those of the step before: for one that was held it has none.
    """
    held = [request for request in scheduler.running if request.request_id not in scheduled and request.spec_token_ids]
    for request in held:
        request.spec_token_ids = []
    return [request.request_id for request in held]


def was_before(request: Request, num_scheduled: int, num_drafts: int) -> tuple[int, bool]:
    """Return the tokens that a request had computed before the step just scheduled, and whether it decodes in it.

    It does where one token was left to compute, its own of a step in flight counted as known.
    """
    start = request.num_computed_tokens - num_scheduled
    known = len(request._all_token_ids)
    if request.num_output_placeholders:  # what the steps in flight produce, this one included
        known += request.num_output_placeholders - 1 - num_drafts
    return start, start == known - 1


def blocks_per_unit(scheduler: Any) -> int:
    """Return how many pool blocks hold `block_size` tokens of one request: one for each KV cache group."""
    return max(1, sum(1 for _ in scheduler.kv_cache_config.kv_cache_groups))


def free_units(scheduler: Any, per_unit: int) -> int:
    """Return free KV blocks, in units that hold `block_size` tokens; the watermark is left out."""
    manager = scheduler.kv_cache_manager
    free = manager.block_pool.get_num_free_blocks() - manager.watermark_blocks
    return int(max(0, free) // per_unit)


def cached_tokens(scheduler: Any, request: Request) -> int:
    """Look up how many tokens of a waiting request the prefix cache holds; nothing is reserved."""
    manager = scheduler.kv_cache_manager
    if not manager.enable_caching or manager.enable_kv_cache_events:
        return 0  # with KV events a lookup may publish; the planner then does without
    return int(manager.get_computed_blocks(request)[1])


def limits(scheduler: Any, *, guard_s: float, work_limit: int) -> Limits:
    """Return what one engine can do in a step; `guard_s` and `work_limit` as in `Limits`."""
    per_unit = blocks_per_unit(scheduler)
    blocks = scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is vLLM's null block
    seats = scheduler.max_num_running_reqs
    return Limits(
        max_num_batched_tokens=max(1, _step_tokens(scheduler) - _draft_slots(scheduler)),
        max_num_seqs=int(min(seats, getattr(scheduler, "max_num_active_reqs", seats))),  # the second from 0.31 on
        max_model_len=int(scheduler.max_model_len),
        block_size=int(scheduler.block_size),
        num_kv_blocks=int(max(1, blocks // per_unit)),
        max_draft_length=int(scheduler.num_spec_tokens),
        guard_s=guard_s,
        work_limit=work_limit,
    )


def waiting_queues(scheduler: Any) -> tuple[RequestQueue | tuple[()], RequestQueue]:
    """Return vLLM's two queues in the order in which it serves them; a vLLM that waits in no known way has one."""
    kind = kind_in(scheduler)
    return ((), scheduler.waiting) if kind is None else kind.served(scheduler)


def how_it_ended(request: Request, num_output_tokens: int) -> str:
    """Return finished, cancelled or failed.

    A stop string is found outside the engine, which then hears of an abort: with stop strings given and
    output produced, an abort counts as finished.
    """
    if request.status is RequestStatus.FINISHED_ABORTED:
        stops = request.sampling_params.stop if request.sampling_params is not None else None
        return "finished" if stops and num_output_tokens else "cancelled"
    if request.status in (RequestStatus.FINISHED_ERROR, RequestStatus.FINISHED_IGNORED):
        return "failed"
    return "finished"


def thinking_end(scheduler: Any, mark: str | Sequence[int]) -> frozenset[int]:
    """Return the token ids that end a thinking span: given ones, or a text that is one token.

    Loading the tokenizer takes a second or two: not for the scheduler's own thread.
    """
    if not isinstance(mark, str):
        return frozenset(mark)
    config = scheduler.vllm_config.model_config
    if not mark or config.skip_tokenizer_init:
        return frozenset()
    from vllm.tokenizers import cached_tokenizer_from_config  # noqa: PLC0415 - heavy

    token = cached_tokenizer_from_config(config).get_vocab().get(mark)
    return frozenset() if token is None else frozenset({int(token)})


def emulated_device() -> dict[str, Any] | None:
    """Return what an emulated device says about itself, None on a real one."""
    from vllm.platforms import current_platform  # noqa: PLC0415 - as below

    emulation = getattr(type(current_platform), "emulation", None)  # an instance looks further, in torch
    return None if emulation is None else dict(emulation().describe())


def is_cpu() -> bool:
    """Tell whether vLLM runs on a CPU."""
    from vllm.platforms import current_platform  # noqa: PLC0415 - detecting the platform is not free

    return bool(current_platform.is_cpu())
