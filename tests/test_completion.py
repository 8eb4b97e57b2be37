"""Shell completion, tried in the shells themselves where they are installed."""

import shutil
import subprocess

import pytest

from slos_serve import cli


def script(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(text, *words):
    line = " ".join(f"'{word}'" for word in words)
    command = (
        f"{text}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _slos_serve; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_verbs_flags_values_and_files(capsys, tmp_path, monkeypatch):
    text = script(capsys, "bash")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.csv").touch()
    assert completed(text, "slos-serve", "sim") == ["simulate"]
    assert set(cli.VERBS) <= set(completed(text, "slos-serve", ""))
    assert completed(text, "slos-serve", "bench", "--goo") == ["--goodput"]
    assert completed(text, "slos-serve", "simulate", "--part", "") == ["report", "tune"]
    assert completed(text, "slos-serve", "bench", "--trace", "tr") == ["trace.csv"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_their_scripts(capsys, shell):
    text = script(capsys, shell)
    assert "simulate" in text
    assert "goodput" in text
    if not (path := shutil.which(shell)):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([path, "-n"], input=text, text=True, check=True)
