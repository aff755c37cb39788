"""Text out of packages: chosen files, digests, archives, and tools that are not there."""

import io
import subprocess
import tarfile

import pytest

from nemotron3.data import package_archives
from nemotron3.data.package_archives import DebianPackage, NpmPackage, PythonPackage, content_digest
from nemotron3.errors import DataError, DependencyMissingError

DEBIAN = DebianPackage(
    package="some-doc", root="usr/share", include=("*.txt",), exclude=("*/skip/*",)
)
NPM = NpmPackage(package="@scope/data", version="1.0.0", root="package/data", include=("*.txt",))


def tar(files, mode="w"):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("./usr/share/symbolic.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return raw.getvalue()


def test_python_package_in_place():
    text = package_archives.read_origin(
        PythonPackage(package="numpy", include=("*.pyi",), exclude=("/random/*", "*/lib/*"))
    )
    assert text.version[0].isdigit()
    assert "__init__.pyi" in text.files
    assert not any(path.startswith(("random/", "lib/")) for path in text.files)
    assert list(text.files) == sorted(text.files)


def test_missing_python_package_gives_the_install_line():
    with pytest.raises(DependencyMissingError, match=r"pip install .*nemotron3\[train\]"):
        package_archives.read_origin(PythonPackage(package="no-such-text", include=("*",)))


def test_package_of_another_layout():
    with pytest.raises(DataError, match=r"holds none of \*\.play"):
        package_archives.read_origin(PythonPackage(package="numpy", include=("*.play",)))


def test_digest_depends_on_paths_and_contents_alone():
    files = {"a": b"1", "b": b"2"}
    assert content_digest(files) == content_digest(dict(reversed(files.items())))
    others = [{"a": b"1"}, {"a": b"1", "c": b"2"}, {"a": b"12", "b": b""}, {"a": b"1", "b": b"3"}]
    assert len({content_digest(files), *map(content_digest, others)}) == 5


@pytest.fixture
def package_tools(monkeypatch):
    """Stands in for apt-get, dpkg-deb and npm: they would use the network."""
    calls = []

    def run(command, *, cwd, **_):
        calls.append(command[0])
        stdout = b""
        match command[0]:
            case "apt-get":
                (package_archives.Path(cwd) / "some-doc_1%3a2.0-1_all.deb").write_bytes(b"deb")
            case "dpkg-deb":
                stdout = tar(
                    {
                        "./usr/share/b/a.txt": b"A",
                        "./usr/share/skip/b.txt": b"B",
                        "./etc/c.txt": b"C",
                    }
                )
            case "npm":
                archive = tar({"package/data/d.txt": b"D", "package/README.txt": b"E"}, "w:gz")
                (package_archives.Path(cwd) / "scope-data-1.0.0.tgz").write_bytes(archive)
        return subprocess.CompletedProcess(command, 0, stdout=stdout)

    monkeypatch.setattr(package_archives.subprocess, "run", run)
    monkeypatch.setattr(package_archives.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    return calls


def test_debian_package_is_opened_not_installed(package_tools):
    text = package_archives.read_origin(DEBIAN)
    assert text.files == {"b/a.txt": b"A"}
    assert text.version == "1:2.0-1"
    assert package_tools == ["apt-get", "dpkg-deb"]


def test_npm_package_is_opened_not_installed(package_tools):
    text = package_archives.read_origin(NPM)
    assert text.files == {"d.txt": b"D"}
    assert text.version == "1.0.0"


@pytest.mark.parametrize(("origin", "tool"), [(DEBIAN, "apt-get"), (NPM, "npm")])
def test_missing_tool_is_named_with_the_way_out(monkeypatch, origin, tool):
    monkeypatch.setattr(package_archives.shutil, "which", lambda _: None)
    with pytest.raises(DependencyMissingError, match=f"needs {tool}.*use the default corpus"):
        package_archives.read_origin(origin)


def test_failed_download_says_what_the_tool_said(monkeypatch):
    def run(command, **_):
        raise subprocess.CalledProcessError(100, command, stderr=b"E: Unable to locate package")

    monkeypatch.setattr(package_archives.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(package_archives.subprocess, "run", run)
    with pytest.raises(DataError, match=r"ended with 100: E: Unable to locate.*apt-get update"):
        package_archives.read_origin(DEBIAN)


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NEMOTRON3_CACHE", str(tmp_path))
    assert package_archives.cache_directory() == tmp_path
    monkeypatch.delenv("NEMOTRON3_CACHE")
    assert package_archives.cache_directory().parts[-2:] == (".cache", "nemotron3")
