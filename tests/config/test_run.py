import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nemotron3.config import run
from nemotron3.config.run import package_versions, read_run, run_record, write_run
from nemotron3.errors import ConfigError, StorageError


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    lr: float


CONFIG = Run(name="tiny", lr=1e-3)


def test_a_run_is_replayed_from_its_file_or_its_directory(tmp_path):
    path = write_run(tmp_path / "tiny", CONFIG, extra={"backends": {"ssd": "chunked"}})
    assert read_run(path, Run) == CONFIG
    assert read_run(path.parent, Run) == CONFIG
    assert json.loads(path.read_text())["extra"] == {"backends": {"ssd": "chunked"}}
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_writing_again_replaces_the_record(tmp_path):
    write_run(tmp_path, CONFIG)
    write_run(tmp_path, replace(CONFIG, lr=2e-3))
    assert read_run(tmp_path, Run).lr == 2e-3


def test_the_record_says_what_ran_where():
    record = run_record(CONFIG)
    assert {"nemotron3", "torch", "numpy"} <= set(record["packages"])
    assert record["config"] == {"name": "tiny", "lr": 1e-3}
    assert record["python"].count(".") == 2
    json.dumps(record, allow_nan=False)


def test_versions_are_those_installed():
    torch = pytest.importorskip("torch")
    # A wheel from the registry leaves its build (+cu130) out of its metadata.
    assert torch.__version__.startswith(package_versions()["torch"])


def test_no_git_means_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run.git_revision() is None


def test_a_package_outside_version_control_has_no_revision(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run.git_revision() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"config": {', "is not JSON"),
        ("[]", "holds no 'config'"),
        ('{"config": {}, "format": 99}', "has format 99, this version reads 3"),
        ('{"config": {"name": "a", "lrr": 1}, "format": 3}', r"config\.lrr is 1.*'lr'"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path, Run)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run(tmp_path / "nowhere", Run)


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(StorageError, match="could not be written"):
        write_run(Path(blocked), CONFIG)
