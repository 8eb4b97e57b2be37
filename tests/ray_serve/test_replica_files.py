"""What a replica puts into the temporary folder: nobody can be there first, and nothing of others is touched."""

import json
import os
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve.llm")

from slos_serve.ray_serve.server import _prepare

PROFILE = {"schema": "slos-serve-profile/1", "key": "test", "perf_model": {"lines": [{"fixed_s": 0.01}]}}


class FakeConfig:
    """What `_prepare` asks of Ray's `LLMConfig`."""

    model_id = "m"

    def __init__(self, slo):
        self.engine_kwargs = {"additional_config": {"slo": slo}}

    def get_engine_config(self):
        return SimpleNamespace(actual_hf_model_id="nobody/nothing")

    def update_engine_kwargs(self, **changes):
        self.engine_kwargs |= changes

    @property
    def slo(self):
        return self.engine_kwargs["additional_config"]["slo"]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    (tmp_path / "tmp").mkdir(mode=0o1777)
    return tmp_path / "tmp"


def prepared(replica_id="r1", **slo):
    config = FakeConfig({"profile": PROFILE, **slo})
    _prepare(config, replica_id)
    return config.slo


def test_the_profile_lies_in_a_folder_of_this_user_alone(temporary):
    path = Path(prepared()["profile"])
    assert json.loads(path.read_text()) == PROFILE
    assert path.is_relative_to(temporary)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((temporary / f"slos-serve-{os.getuid()}").stat().st_mode) == 0o700


def test_links_that_lie_in_wait_are_replaced_and_not_followed(temporary):
    path = Path(prepared()["profile"])
    victim = temporary.parent / "victim"
    victim.write_text("precious")
    for lying in (path, path.with_suffix(".r1")):
        lying.unlink(missing_ok=True)
        lying.symlink_to(victim)
    assert json.loads(Path(prepared()["profile"]).read_text()) == PROFILE
    assert not path.is_symlink()
    assert victim.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_somebody_else_is_refused_in_words(temporary):
    (temporary / f"slos-serve-{os.getuid()}").mkdir()
    os.chown(temporary / f"slos-serve-{os.getuid()}", 12345, 12345)
    with pytest.raises(PermissionError, match="expected a folder of this user"):
        prepared()


def test_replicas_of_one_machine_do_not_share_records_or_sockets(temporary):
    one, other = (prepared(name, record=str(temporary / "steps.jsonl")) for name in ("r1", "r2"))
    assert one["profile"] == other["profile"]
    assert one["record"] != other["record"]
    assert one["channel_dir"] != other["channel_dir"]
