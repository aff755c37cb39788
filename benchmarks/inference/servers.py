"""Start the servers that are compared, each in its own process, and stop them."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from benchmarks.inference.client import Client

_START_S = 300


@contextlib.contextmanager
def ours(model: Path, *, threads: int, drafts: int | None = None) -> Iterator[Client]:
    """Our server; `drafts` 0 turns speculation off."""
    port = _free_port()
    command = [sys.executable, "-m", "nemotron3.cli.main", "serve", model, "--port", port]
    command += ["--served-model-name", "m", "--max-model-len", 8192, "--device", "cpu"]
    command += [] if drafts is None else ["--max-draft-tokens", drafts]
    with _running(command, port, threads) as pid:
        yield Client(port=port, path="/v1/completions", model="m", pid=pid)


@contextlib.contextmanager
def llama_cpp(
    binary: Path,
    gguf: Path,
    *,
    threads: int,
    slots: int = 32,
    drafts: int = 0,
    keeps_states: bool = True,
) -> Iterator[Client]:
    """llama.cpp's server, with as many slots as ours, and `drafts` by its MTP.

    Without `keeps_states` it caches no states of hybrid models, and recomputes a chat whose end has
    changed.
    """
    port = _free_port()
    command = [binary, "-m", gguf, "--port", port, "-t", threads, "-tb", threads]
    command += ["-np", slots, "-c", 8192 * 4, "--kv-unified", "--no-webui", "-fa", "off"]
    command += ["--spec-type", "draft-mtp", "--spec-draft-n-max", drafts] if drafts else []
    command += [] if keeps_states else ["--ctx-checkpoints", 0]
    with _running(command, port, threads) as pid:
        yield Client(port=port, path="/completion", pid=pid)


@contextlib.contextmanager
def vllm(python: Path, model: Path, *, threads: int) -> Iterator[Client]:
    """vLLM's server on this CPU, with the Python of its own environment; it supports no experts.

    Its prefix cache is off, because with it the server ends at a hybrid model's first prompt of
    2,048 tokens.
    """
    port = _free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", port, "--served-model-name", "m"]
    command += ["--dtype", "float32", "--max-model-len", 8192, "--max-num-seqs", 32]
    command += ["--no-enable-prefix-caching"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    with _running(command, port, threads, settings) as pid:
        yield Client(port=port, path="/v1/completions", model="m", pid=pid)


@contextlib.contextmanager
def alone(group: int | None, everyone: Collection[int]) -> Iterator[None]:
    """Stop all servers except one, or all: some continue computing after their last answer.

    The arguments are process ids, which are also those of their process groups.
    """
    others = [each for each in everyone if each != group]
    for each in others:
        os.killpg(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in others:
            os.killpg(each, signal.SIGCONT)


@contextlib.contextmanager
def _running(
    command: list, port: int, threads: int, settings: Mapping[str, str] | None = None
) -> Iterator[int]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(settings or {})
    words = [str(word) for word in command]
    if not (Path(words[0]).exists() or shutil.which(words[0])):
        raise SystemExit(f"{words[0]} does not exist")
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(  # in a new process group, for `alone`
        words, stdout=quiet, stderr=quiet, env=environment, start_new_session=True
    )
    try:
        _wait_for(port, process, words)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen, words: list[str]) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server has ended with {process.returncode}: {' '.join(words)}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise SystemExit(f"the server does not answer after {_START_S} s: {' '.join(words)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
