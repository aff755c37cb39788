"""llama.cpp as an optional contestant for inference, measured by its own benchmark programs.

It needs a compiled `llama-bench`, and uses `llama-batched-bench` in the same folder if there is
one. The weights are the same, converted by llama.cpp's converter; the oracle in
docs/guides/llama-cpp-oracle.md shows that it computes the same model. The time of starting the
program and loading does not count, since the program reports the time of its own work.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.models import Pair
from benchmarks.timing import Contestant
from benchmarks.workloads import PROMPT
from tests.oracles import llama_cpp as oracle

_TRIES = 5
"""Attempts: sometimes llama-batched-bench succeeds without printing a result."""


def write_gguf(binary: Path, pair: Pair) -> Path:
    """Convert the pair's weights."""
    return write_gguf_of(binary, pair.folder, pair.ours.config.vocab_size)


def write_gguf_of(binary: Path, folder: Path, vocab_size: int) -> Path:
    """Convert a model directory in a separate process, because the converter prints much.

    The tokenizer in the folder is replaced by one that the converter accepts.
    """
    path = folder / "model.gguf"
    words = [sources_of(binary), folder, path, vocab_size]
    command = [sys.executable, "-m", "benchmarks.llama_cpp", *map(str, words)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"llama.cpp's converter failed:\n{run.stderr[-2000:]}")
    return path


def sources_of(binary: Path) -> Path:
    """The source folder of a binary, from the cache of its build folder."""
    for folder in binary.resolve().parents:
        cache = folder / "CMakeCache.txt"
        if cache.exists():
            lines = cache.read_text().splitlines()
            marks = [line for line in lines if line.startswith("CMAKE_HOME_DIRECTORY:")]
            return Path(marks[0].partition("=")[2])
    raise SystemExit(f"{binary} is not in a build folder of cmake; its sources cannot be found")


def prefill(binary: Path, gguf: Path, length: int) -> Contestant:
    """Seconds of the prefill of a prompt."""
    times = max(1, 2048 // length)  # a turn as long as those of the others
    command = [binary, "-m", gguf, "-p", length, "-n", 0, "-r", times, "-o", "json", *_threads()]
    command += ["-b", length, "-ub", min(length, 512)]
    return lambda: json.loads(_output(command))[0]["avg_ns"] / 1e9


def decode(binary: Path, gguf: Path, batch: int, steps: int) -> Contestant | None:
    """Seconds to decode `steps` tokens of each sequence; None if the program is missing."""
    if batch > 1:
        return _decode_batch(binary.with_name("llama-batched-bench"), gguf, batch, steps)
    command = [binary, "-m", gguf, "-p", 0, "-n", steps, "-d", PROMPT, "-r", 1, "-o", "json"]
    command += _threads()
    return lambda: json.loads(_output(command))[0]["avg_ns"] / 1e9


@dataclass(frozen=True)
class Bench:
    """What a run of llama-bench found: seconds of each repetition, and of the whole program."""

    prompt_s: list[float]
    answer_s: list[float]
    program_s: float
    """With loading, and a first repetition that does not count."""
    peak_bytes: int
    """Resident at most, pages of the file included."""


def bench(binary: Path, gguf: Path, *, prompt: int, tokens: int, repeats: int) -> Bench:
    """Repetitions of a prompt, and of an answer, in one process, which loads the file once."""
    command = [binary, "-m", gguf, "-p", prompt, "-n", tokens, "-r", repeats, "-o", "json"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        words = list(map(str, [*command, *_threads()]))
        program = subprocess.Popen(words, stdout=out, stderr=errors)
        _, status, usage = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
        program_s = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        if program.returncode:
            raise SystemExit(f"{binary} failed:\n{errors.read()[-2000:]}")
        results = json.load(out)
    prompts, answers = sorted(results, key=lambda found: found["n_gen"])
    return Bench(
        *([each / 1e9 for each in found["samples_ns"]] for found in (prompts, answers)),
        program_s=program_s,
        peak_bytes=usage.ru_maxrss << 10,
    )


def _decode_batch(program: Path, gguf: Path, batch: int, steps: int) -> Contestant | None:
    if not program.exists():
        return None
    room = batch * (PROMPT + steps)
    command = [program, "-m", gguf, "-npp", PROMPT, "-ntg", steps, "-npl", batch, "-c", room]
    command += ["--output-format", "jsonl", *_threads(), "-tb", torch.get_num_threads()]

    def run() -> float:
        for _ in range(_TRIES):
            lines = [line for line in _output(command).splitlines() if line.startswith("{")]
            if lines:
                return json.loads(lines[-1])["t_tg"]
        raise SystemExit(f"{program} printed no result in {_TRIES} runs")

    return run


def _threads() -> list:
    return ["-t", torch.get_num_threads()]


def _output(command: list) -> str:
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{command[0]} failed:\n{run.stderr[-2000:]}")
    return run.stdout


if __name__ == "__main__":
    folder, checkpoint, target = map(Path, sys.argv[1:4])
    oracle.VOCAB = int(sys.argv[4])  # of the tokenizer that it writes
    oracle.write_tokenizer(checkpoint)
    oracle.convert(folder, checkpoint, target)
