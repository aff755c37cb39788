"""Compiling operations on the machine: once, safely, and with an error if it fails."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemotron3.errors import BackendUnavailableError
from nemotron3.ops import native
from nemotron3.ops.linear import linear
from nemotron3.ops.native import NativeFunction, build
from tests.ops.native import needs_compiler

SOURCE = """
#include "simd.h"
extern "C" void twice(const float* x, float* y, int64_t n, float factor, int64_t threads) {
  for (int64_t i = 0; i < n; i++) y[i] = x ? factor * x[i] : (float)threads;
}
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memories = (build.library, build.available, build._cache, build._compiler)
    for memory in memories:
        memory.cache_clear()
    path = tmp_path / "twice.cpp"
    path.write_text(SOURCE)
    yield path
    monkeypatch.undo()
    for memory in memories:
        memory.cache_clear()


@needs_compiler
def test_compiles_once_and_calls(source, tmp_path):
    twice = NativeFunction(source, "twice", "pp if")
    x, y = torch.arange(5.0), torch.empty(5)
    twice(x, y, 5, 2.0)
    assert torch.equal(y, 2 * x)
    twice(None, y, 5, 2.0)
    assert (y == torch.get_num_threads()).all()
    [made] = (tmp_path / "cache").rglob(f"{tmp_path.name}-*.so")
    before = made.stat().st_mtime_ns
    build.library.cache_clear()
    NativeFunction(source, "twice", "pp if")(x, y, 5, 2.0)
    assert made.stat().st_mtime_ns == before
    source.write_text(SOURCE.replace("factor * x[i]", "3 * x[i]"))
    build.library.cache_clear()
    NativeFunction(source, "twice", "pp if")(x, y, 5, 2.0)
    assert torch.equal(y, 3 * x)
    made = {path.name for path in (tmp_path / "cache").rglob("*.so")}
    assert len(made) == 3, "two libraries, and that of the teams"


@needs_compiler
def test_a_source_with_a_mistake_says_what_the_compiler_said(source):
    source.write_text("this is no C++")
    with pytest.raises(BackendUnavailableError, match=r"(?s)twice.cpp does not compile.*error"):
        NativeFunction(source, "twice", "pp if")(None, None, 0, 0.0)


def test_without_a_compiler_auto_takes_pytorch(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not native.available()
    x, weight = torch.randn(20, 30), torch.randn(40, 30)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    with pytest.raises(BackendUnavailableError, match=r"native backend of 'linear' needs.*g\+\+"):
        linear(x, weight, backend="native")
    with pytest.raises(BackendUnavailableError, match="install g"):
        NativeFunction(source, "twice", "pp if")(None, None, 0, 0.0)


def test_can_be_switched_off(source, monkeypatch):
    monkeypatch.setenv("NEMOTRON3_NATIVE", "0")
    assert not native.available()


def test_refuses_what_it_would_round():
    x, weight = torch.randn(20, 30).double(), torch.randn(40, 30).double()
    with pytest.raises(BackendUnavailableError, match=r"bfloat16 on the CPU.*torch.float64"):
        linear(x, weight, backend="native")


@pytest.mark.long
@needs_compiler
def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path):
    """In a separate process, since a process caches its libraries."""
    (tmp_path / "file").write_text("")
    code = (
        "import torch; from nemotron3.ops.linear import linear;"
        "linear(torch.ones(20, 3), torch.ones(4, 3), backend='native');"
        "from nemotron3.ops.native import build; print(build._cache())"
    )
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "file"),
        "TMPDIR": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert Path(run.stdout.strip()).parent == tmp_path


@needs_compiler
def test_exponential(source):
    x = torch.cat([torch.linspace(-87, 88, 4096), torch.tensor([torch.nan, -200.0, 0.0, 1e-9] * 4)])
    wave = torch.empty(2, x.numel())
    source.write_text(
        '#include "simd.h"\nextern "C" void waves(const float* x, float* e, float* s, int64_t n, '
        "int64_t) { for (int64_t i = 0; i < n; i += LANES) "
        "{ store(e + i, exp(load(x + i))); store(s + i, sigmoid(load(x + i))); } }"
    )
    NativeFunction(source, "waves", "ppp i")(x, wave[0], wave[1], x.numel())
    torch.testing.assert_close(wave[0], x.exp(), rtol=3e-7, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(wave[1], x.sigmoid(), rtol=3e-7, atol=1e-37, equal_nan=True)
