"""The published size on a small machine: full-size Nano in four and eight bits, on the CPU.

    python -m benchmarks.nano_cpu --llama-cpp build/bin/llama-bench   # about 40 GB of disk
    python -m benchmarks.nano_cpu                                     # ours alone, about 20 GB
    python -m benchmarks.nano_cpu --size 150m-latent                  # the same, small

It writes a checkpoint of random weights in the published form (random_checkpoint.py) and
llama.cpp's Q4_0 file of the same architecture and size (random_gguf.py), unless the folder holds
them already; the disk is checked for both before the first. One program is measured after the
other, in a process of its own, after its files have been read once, so that they are in the page
cache: prompt tokens per second, tokens per second of an answer, and the peak of resident memory, of
which mapped pages of the files are a part; of ours also the seconds until the engine is ready, and
drafts if the model has a block for them. Figures are medians of `--repeats`; llama.cpp's are those
of its own `llama-bench`. Results go to benchmarks/results/.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cpu import RESULTS
from benchmarks.models import tokens_of
from benchmarks.random_checkpoint import planned_model, sizes, write_checkpoint
from benchmarks.random_gguf import write_random_gguf

from benchmarks import llama_cpp, machine, random_checkpoint, random_gguf
from nemotron3.checkpoint.files import require_space
from nemotron3.inference.base_llm import load_model
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.model_runner.speculative import most_drafts
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import model_costs
from nemotron3.models.huggingface import read_config

_CHUNK = 1 << 24


def warm(files: Iterable[Path]) -> float:
    """Read all files once; returns bytes per second."""
    start, total = time.perf_counter(), 0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK):
                total += len(chunk)
    return total / (time.perf_counter() - start)


def measure(
    folder: Path, *, drafts: int | None, prompt: int, tokens: int, repeats: int
) -> dict[str, Any]:
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
    ids = tokens_of(model.config, 1 + repeats, prompt).tolist()
    # The first prompt touches every expert, and its answer records the steps.
    first_prompt_s, _ = _answer(engine, ids[0], tokens)
    times = [_answer(engine, each, tokens) for each in ids[1:]]
    stats = engine.stats()
    return {
        "drafts": most_drafts(model, drafts),
        "ready_s": round(ready, 3),
        "first_prompt_s": round(first_prompt_s, 3),
        "prompt_tokens_per_s": _rates(prompt, [prompt_s for prompt_s, _ in times]),
        "decode_tokens_per_s": _rates(tokens - 1, [decode_s for _, decode_s in times]),
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "resident_bytes_before": empty,
        "resident_bytes_when_ready": loaded,
        "resident_bytes": resident(),
    }


def _rates(tokens: int, seconds: Sequence[float]) -> dict[str, float]:
    rates = [tokens / each for each in seconds]
    found = {"median": median(rates), "min": min(rates), "max": max(rates)}
    return {name: round(rate, 2) for name, rate in found.items()}


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


def measure_apart(folder: Path, *, drafts: int | None, **amounts: int) -> dict[str, Any]:
    """Measure in a process of its own, whose peak memory is that of this model alone."""
    words = ["--measure", folder, *(word for n, v in amounts.items() for word in (f"--{n}", v))]
    words += [] if drafts is None else ["--drafts", drafts]
    command = [sys.executable, "-m", "benchmarks.nano_cpu", *map(str, words)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, check=True, cwd=root, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


def measure_llama_cpp(
    program: Path, gguf: Path, *, prompt: int, tokens: int, repeats: int
) -> dict[str, Any]:
    """The same of llama.cpp, whose answers follow no prompt: its benchmark has them so."""
    rate = warm([gguf])
    found = llama_cpp.bench(program, gguf, prompt=prompt, tokens=tokens, repeats=repeats)
    return {
        "warming_bytes_per_s": round(rate),
        "prompt_tokens_per_s": _rates(prompt, found.prompt_s),
        "decode_tokens_per_s": _rates(tokens, found.answer_s),
        "resident_bytes": {"peak": found.peak_bytes},
        "program_s": round(found.program_s, 1),
    }


def nano_table(result: Mapping[str, Any]) -> list[list[str]]:
    """Table rows: a figure, ours in each run, llama.cpp's, and the ratio of the first run."""
    other = result.get("llama_cpp")
    heads = ["ours" if not run["drafts"] else "ours, drafts" for run in result["runs"]]
    columns = [*result["runs"], *([other] if other else [])]
    rows = [["", *heads, *(["llama.cpp, Q4_0", "against llama.cpp"] if other else [])]]
    for name, title in (
        ("prompt_tokens_per_s", f"prompt of {result['prompt']}, tokens/s"),
        ("decode_tokens_per_s", f"answer of {result['tokens']}, tokens/s"),
    ):
        cells = [f"{c[name]['median']} ({c[name]['min']} to {c[name]['max']})" for c in columns]
        ratio = columns[0][name]["median"] / columns[-1][name]["median"]
        rows.append([title, *cells, *([f"{ratio:.2f}x"] if other else [])])
    peaks = [column["resident_bytes"]["peak"] for column in columns]
    cells = [f"{peak / 2**30:.1f} GiB" for peak in peaks]
    rows.append(["peak memory", *cells, *([f"{peaks[0] / peaks[-1]:.2f} of it"] if other else [])])
    sizes = [result["checkpoint_bytes"]] * len(heads) + ([other["file_bytes"]] if other else [])
    bits = [result["bits_per_parameter"]] * len(heads)
    bits += [other["bits_per_parameter"]] if other else []
    cells = [f"{size / 1e9:.1f} GB, {each:.2f}" for size, each in zip(sizes, bits, strict=True)]
    rows.append(["files, and bits a parameter", *cells, *([""] if other else [])])
    cells = [f"{run['ready_s']:.1f} s" for run in result["runs"]]
    return [*rows, ["ready after", *cells, *(["", ""] if other else [])]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(sizes()), default="nano")
    parser.add_argument("--folder", type=Path, default=Path("runs/nano_cpu"), help="of the files")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="prompts and answers of each")
    parser.add_argument("--llama-cpp", type=Path, metavar="PATH", help="a built llama-bench")
    parser.add_argument("--write-only", action="store_true", help="write the files, measure later")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--drafts", type=int, help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    amounts = {"prompt": known.prompt, "tokens": known.tokens, "repeats": known.repeats}
    if known.measure is not None:
        print(json.dumps(measure(known.measure, drafts=known.drafts, **amounts)))
        return
    if known.llama_cpp is not None and not known.llama_cpp.exists():
        parser.error(f"--llama-cpp is {known.llama_cpp}, which does not exist; build llama-bench")
    config = sizes()[known.size]
    folder = known.folder / known.size
    gguf = known.folder / f"{known.size}-q4_0.gguf" if known.llama_cpp is not None else None
    prepare(config, folder, gguf)
    if known.write_only:
        return
    load = machine.load_average()
    machine.warn_if_busy(load)
    result: dict[str, Any] = {"size": known.size, **amounts} | _files(config, folder, gguf)
    shards = sorted(folder.glob("*.safetensors"))
    result["warming_bytes_per_s"] = round(warm(shards))
    has_drafts = config.pattern.num_mtp_depths > 0
    result["runs"] = []
    for drafts in (0, None) if has_drafts else (0,):
        result["runs"].append(measure_apart(folder, drafts=drafts, **amounts))
        print(json.dumps(result["runs"][-1]), flush=True)
    if known.llama_cpp is not None and gguf is not None:
        result["llama_cpp"] |= measure_llama_cpp(known.llama_cpp, gguf, **amounts)
        print(json.dumps(result["llama_cpp"]), flush=True)
    about = {"load_before": load, "load_after": machine.load_average()}
    print(
        machine.write_result("nano_cpu", result, arguments=arguments, about=about, folder=known.out)
    )


def prepare(config: ModelConfig, folder: Path, gguf: Path | None) -> None:
    """Write what is missing of both; StorageError, before anything, if the disk is too small."""
    missing = []
    if not list(folder.glob("*.safetensors")):
        missing.append((folder, random_checkpoint.num_bytes(planned_model(config))))
    elif read_config(folder) != replace(config, initializer_range=config.init_std):
        raise SystemExit(f"{folder} holds another model; give another --folder")
    if gguf is not None and not gguf.exists():
        missing.append((gguf, random_gguf.num_bytes(config)))
    if missing:
        missing[0][0].parent.mkdir(parents=True, exist_ok=True)
        require_space(missing[0][0].parent, sum(size for _, size in missing))
    for path, size in missing:
        print(f"writing {size / 1e9:.3f} GB to {path}", flush=True)
        write = write_checkpoint if path == folder else write_random_gguf
        write(config, path)


def _files(config: ModelConfig, folder: Path, gguf: Path | None) -> dict[str, Any]:
    """Bytes and bits per parameter of both files; llama.cpp's has no block for drafts."""
    costs = model_costs(config)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    found: dict[str, Any] = {
        "parameters": costs.total,
        "active": costs.total_active,
        "checkpoint_bytes": size,
        "bits_per_parameter": round(8 * size / costs.total, 3),
    }
    if gguf is not None:
        size = gguf.stat().st_size
        main = config.hybrid_override_pattern.partition("/")[0]
        plain = model_costs(replace(config, hybrid_override_pattern=main))
        found["llama_cpp"] = {
            "file_bytes": size,
            "bits_per_parameter": round(8 * size / plain.total, 3),
        }
    return found


if __name__ == "__main__":
    main()
