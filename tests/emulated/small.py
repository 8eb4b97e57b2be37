"""A small emulated device, and the server on it: for tests of real vLLM without a model."""

import json
import shutil
import sys

STEP_S = 0.01


def serve_small_device(folder, *, kv_tokens, output_tokens):
    """Write model, hardware and profile into a folder; return the command that serves them, and its port."""
    from slos_serve.bench.engines import free_port
    from slos_serve.bench.model import ensure_demo_model

    hardware = {
        "schema": "slos-serve-hardware/1",
        "name": "small",
        "perf_model": {"lines": [{"per_token_s": 1e-5, "fixed_s": STEP_S}]},
        "kv_tokens": kv_tokens,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "provenance": {"perf_model": {"kind": "derived", "source": "made up for a test"}},
    }
    shutil.copytree(ensure_demo_model(), folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "small.json").write_text(json.dumps(hardware))
    profile = {"schema": "slos-serve-profile/1", "key": "test", "perf_model": hardware["perf_model"]}
    (folder / "profile.json").write_text(json.dumps(profile))
    port = free_port()
    command = [sys.executable, "-m", "slos_serve.cli", "serve", str(folder / "model"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--emulate", f"{folder / 'small.json'},output_tokens={output_tokens}"]
    return [*command, "--profile", str(folder / "profile.json"), "--served-model-name", "m"], port
