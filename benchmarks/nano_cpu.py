"""The published size on a small machine: full-size Nano in four and eight bits, on the CPU.

    python -m benchmarks.nano_cpu                              # writes and measures about 20 GB
    python -m benchmarks.nano_cpu --size 150m-latent           # the same, small
    python -m benchmarks.nano_cpu --gguf nano-q4_0.gguf        # and llama.cpp, if it is on the PATH

It writes a checkpoint of random weights in the published form (random_checkpoint.py), unless the
folder holds it already, reads its files once so that they are in the page cache, and measures in a
process of its own: seconds until the engine is ready, prompt tokens per second, decoded tokens per
second, without drafts and with them if the model has a block for that, and the peak of resident
memory, of which mapped pages of the files are a part. Results go to benchmarks/results/.

llama.cpp is measured by its own `llama-bench` on a file of the same architecture and size. It is
made apart: convert the plain model and quantize it to Q4_0 (docs/guides/llama-cpp-oracle.md).
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cpu import RESULTS
from benchmarks.models import configs, tokens_of
from benchmarks.random_checkpoint import num_bytes, planned_model, write_checkpoint

from benchmarks import llama_cpp, machine
from nemotron3.inference.base_llm import load_model
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.model_runner.speculative import most_drafts
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.config import ModelConfig
from nemotron3.models.huggingface import read_config

_CHUNK = 1 << 24


def sizes() -> dict[str, ModelConfig]:
    """Models by name; `nano-mtp` has the block for drafts that later releases of Nano have."""
    nano = ModelConfig.preset("nano")
    pattern = f"{nano.hybrid_override_pattern}/*E"
    return {
        "nano": nano,
        "nano-mtp": replace(nano, hybrid_override_pattern=pattern),
        "tiny": ModelConfig.preset("tiny"),
        **configs(),
    }


def warm(folder: Path) -> float:
    """Read all files once; returns bytes per second."""
    start, total = time.perf_counter(), 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK):
                total += len(chunk)
    return total / (time.perf_counter() - start)


def measure(folder: Path, *, drafts: int | None, prompt: int, tokens: int) -> dict[str, Any]:
    """Measure in this process; it should have measured nothing before."""
    empty = resident()
    start = time.perf_counter()
    model = load_model(folder, device="cpu")
    config = EngineConfig(
        max_num_seqs=1, max_model_len=prompt + tokens + 8, max_draft_tokens=drafts
    )
    engine = Engine(model, config)
    ready = time.perf_counter() - start
    loaded = resident()
    ids = tokens_of(model.config, 2, prompt).tolist()
    # The first prompt touches every expert, and its answer records the steps.
    _answer(engine, ids[0], tokens)
    prompt_s, decode_s = _answer(engine, ids[1], tokens)
    stats = engine.stats()
    return {
        "drafts": most_drafts(model, drafts),
        "ready_s": round(ready, 3),
        "prompt_tokens_per_s": round(prompt / prompt_s, 2),
        "decode_tokens_per_s": round((tokens - 1) / decode_s, 2),
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "resident_bytes_before": empty,
        "resident_bytes_when_ready": loaded,
        "resident_bytes": resident(),
    }


def _answer(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds until the first token, and from there to the last."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    engine.add(EngineRequest(request_id="a", prompt=tuple(prompt), params=params))
    start, first = time.perf_counter(), 0.0
    while engine.has_work:
        made = sum(len(step.tokens) for step in engine.step())
        if made and not first:
            first = time.perf_counter() - start
    return first, time.perf_counter() - start - first


def resident() -> dict[str, int]:
    """Resident bytes of this process: the peak, and now: memory of its own and pages of files."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmHWM", "RssAnon", "RssFile"):
            found[{"VmHWM": "peak", "RssAnon": "own", "RssFile": "files"}[key]] = (
                int(value.split()[0]) << 10
            )
    return found


def measure_apart(folder: Path, *, drafts: int | None, prompt: int, tokens: int) -> dict[str, Any]:
    """Measure in a process of its own, whose peak memory is that of this model alone."""
    words = ["--measure", folder, "--prompt", prompt, "--tokens", tokens]
    words += [] if drafts is None else ["--drafts", drafts]
    command = [sys.executable, "-m", "benchmarks.nano_cpu", *map(str, words)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, check=True, cwd=root, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


def measure_llama_cpp(gguf: Path, *, prompt: int, tokens: int) -> dict[str, float]:
    """Tokens per second of llama.cpp on a file of its own."""
    found = shutil.which("llama-bench")
    if found is None:
        raise SystemExit("--gguf needs llama-bench on the PATH; build llama.cpp, or leave it out")
    decode = llama_cpp.decode(Path(found), gguf, 1, tokens)
    assert decode is not None
    return {
        "prompt_tokens_per_s": round(prompt / llama_cpp.prefill(Path(found), gguf, prompt)(), 2),
        "decode_tokens_per_s": round(tokens / decode(), 2),
        "file_bytes": gguf.stat().st_size,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(sizes()), default="nano")
    parser.add_argument("--folder", type=Path, help="the checkpoint (default runs/nano_cpu/SIZE)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, such as Q4_0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--drafts", type=int, help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    amounts = {"prompt": known.prompt, "tokens": known.tokens}
    if known.measure is not None:
        print(json.dumps(measure(known.measure, drafts=known.drafts, **amounts)))
        return
    load = machine.load_average()
    machine.warn_if_busy(load)
    config = sizes()[known.size]
    folder = known.folder or Path("runs/nano_cpu") / known.size
    result: dict[str, Any] = {"size": known.size, "checkpoint_bytes": _prepare(config, folder)}
    result["warming_bytes_per_s"] = round(warm(folder))
    has_drafts = config.pattern.num_mtp_depths > 0
    runs = [measure_apart(folder, drafts=n, **amounts) for n in ((0, None) if has_drafts else (0,))]
    result |= {"runs": runs, **amounts}
    if known.gguf is not None:
        result["llama_cpp"] = measure_llama_cpp(known.gguf, **amounts)
    about = {"load_before": load, "load_after": machine.load_average()}
    print(
        machine.write_result("nano_cpu", result, arguments=arguments, about=about, folder=known.out)
    )


def _prepare(config: ModelConfig, folder: Path) -> int:
    """Write the checkpoint, unless the folder has it; returns the bytes of its files."""
    files = list(folder.glob("*.safetensors"))
    if not files:
        size = num_bytes(planned_model(config))
        print(f"writing {size / 1e9:.3f} GB to {folder}")
        write_checkpoint(config, folder)
    elif read_config(folder) != replace(config, initializer_range=config.init_std):
        raise SystemExit(f"{folder} holds another model; give another --folder")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
