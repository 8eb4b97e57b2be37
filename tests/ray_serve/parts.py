"""Replicas and requests without Ray: what they publish, answer and are asked."""

import asyncio
import json
from pathlib import Path

from slos_serve.core.perf import PerfModel
from slos_serve.core.routing.routers import Arrival
from slos_serve.core.routing.snapshots import ReplicaSnapshot
from slos_serve.core.types import Limits
from slos_serve.ray_serve.hops import Note
from slos_serve.ray_serve.reports import KEY, VERSION

START_S = 1_000_000.0
LIMITS = Limits(max_num_batched_tokens=512, max_num_seqs=16, max_model_len=2048, block_size=16, num_kv_blocks=1000)


class Clocks:
    """A wall clock and a monotonic one that move only when told."""

    def __init__(self):
        self.now = START_S

    def wall(self):
        return self.now

    def monotonic(self):
        return self.now - 900_000.0


def arrival(request_id="r", **more):
    return Arrival(request_id=request_id, arrival_s=START_S, num_prompt_tokens=100, **more)


def replica_state(time_s, **more):
    """Return the JSON document of a replica that can plan."""
    model = PerfModel(lines=((1e-3, 0.0, 0.0, 0.0, 0.0, 0.02),))
    known = ReplicaSnapshot(
        replica_id="-", time_s=time_s, perf_model=model, limits=LIMITS, free_kv_blocks=1000.0, **more
    )
    return json.loads(json.dumps(known.to_json()))


def stats(made_s, *, silent_s=0.1, stalled_s=0.0, digest="d", replica=None, **status):
    """Return what a replica's `record_routing_stats` returns."""
    status = {"effective_mode": "enforce", "num_running": 1, "num_waiting": 0, "steps": 5, "drain_s": 0.0, **status}
    report = {"version": VERSION, "made_s": made_s, "silent_s": silent_s, "stalled_s": stalled_s}
    return {KEY: {**report, "digest": digest, "status": status, "replica": replica}}


def note(kind, replica_id="a", **record):
    return Note(kind=kind, replica_id=replica_id, record={"id": "s", "class": "chat", **record})


class FakeStream:
    """A replica's answer: items are yielded, exceptions raised, and numbers waited for, in seconds."""

    def __init__(self, *items):
        self.items = list(items)
        self.is_cancelled = False

    async def __anext__(self):
        while self.items:
            item = self.items.pop(0)
            if isinstance(item, int | float):
                await asyncio.sleep(item)
            elif isinstance(item, BaseException):
                raise item
            else:
                return item
        raise StopAsyncIteration

    def cancel(self):
        self.is_cancelled = True


def write_tiny_model(root: Path) -> Path:
    """Write a model of two small layers with random weights, and a tokenizer of words, below `root`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from slos_serve.vllm_plugin.testing import VOCABULARY, write_model_config

    folder = write_model_config(root)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 64, as CPUs want
    (folder / "config.json").write_text(json.dumps(config))
    words = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    return folder
