"""The speed of narrow weights: one model with its matrices in float32, bfloat16 and narrower.

    python -m benchmarks.weights
    python -m benchmarks.weights --models 150m-latent --formats int8 nvfp4 nvfp4+int8
    python -m benchmarks.weights --models 150m-latent --llama-cpp build/bin/llama-bench

The weights are random and the same, rounded to each format, and the formats take turns. A decoding
step must read the weights that its tokens use, so it becomes faster if memory limits it; a prefill
is limited by arithmetic, which stays in float32. With bfloat16 the whole model and its activations
are rounded; with `+int8` products round their activations too, and are products of integers.

With `--llama-cpp` the same weights are measured in llama.cpp, all matrices in Q8_0 and in Q4_0,
which also round activations to int8. Its `llama-quantize` writes the files. Results go to
benchmarks/results/ and, with `python -m benchmarks.page`, to docs/speed.md.
"""

import argparse
import copy
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
from benchmarks.cpu import RESULTS
from benchmarks.models import configs, tokens_of
from benchmarks.timing import Contestant, interleave
from benchmarks.workloads import PROMPT, our_decode, our_prefill

from benchmarks import llama_cpp, machine
from nemotron3 import LanguageModel
from nemotron3.models.config import ModelConfig
from nemotron3.models.parameter import state_tensors
from nemotron3.models.precision import convert_weights
from nemotron3.models.rounded_activations import round_activations
from nemotron3.ops.weights import ActivationFormat, WeightFormat

Workload = Callable[[LanguageModel], Contestant]
MODELS = ("30m-latent", "150m-latent", "150m-standard")
STEPS = 16
"""Decoding steps in one repetition."""


FORMATS = ("bfloat16", "int8", "fp8", "nvfp4", "int8+int8", "nvfp4+int8")
"""Formats of weights, and after a plus what products round their activations to."""
LLAMA_FORMATS = ("Q8_0", "Q4_0")


def formats(config: ModelConfig, names: Sequence[str]) -> dict[str, LanguageModel]:
    """One model in float32 and in each of the formats named."""
    model = LanguageModel.from_config(config, seed=0).eval()
    models = {"float32": model}
    for name in names:
        if name == "bfloat16":
            models[name] = copy.deepcopy(model).to(torch.bfloat16)
            continue
        weights, _, activations = name.partition("+")
        converted = convert_weights(model, weights=cast(WeightFormat, weights))
        if activations:
            converted = round_activations(converted, cast(ActivationFormat, activations))
        models[name] = converted
    return models


def num_bytes(model: LanguageModel) -> int:
    """Bytes of all weights in memory."""
    return sum(value.nbytes for _, value in state_tensors(model))


def llama_files(binary: Path, model: LanguageModel, folder: Path) -> dict[str, Path]:
    """The model's weights in llama.cpp's formats, every matrix in the same."""
    model.save_pretrained(folder)
    plain = llama_cpp.write_gguf_of(binary, folder, model.config.vocab_size)
    files = {f"llama.cpp {name}": folder / f"{name}.gguf" for name in LLAMA_FORMATS}
    for name, file in zip(LLAMA_FORMATS, files.values(), strict=True):
        command = [binary.with_name("llama-quantize"), "--pure", plain, file, name]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    plain.unlink()
    return files


def measure(
    config: ModelConfig, *, repeats: int, names: Sequence[str], llama: Path | None = None
) -> dict[str, Any]:
    """Bytes, and tokens per second of each row in each format."""
    with tempfile.TemporaryDirectory() as folder:
        models = formats(config, names)
        files = llama_files(llama, models["float32"], Path(folder)) if llama else {}
        return _measure(config, models, files, llama, repeats)


def _measure(
    config: ModelConfig,
    models: dict[str, LanguageModel],
    files: dict[str, Path],
    llama: Path | None,
    repeats: int,
) -> dict[str, Any]:

    def decode(batch: int) -> Workload:
        return lambda model: our_decode(model, tokens_of(config, batch, PROMPT), steps=STEPS)

    def decode_there(batch: int) -> Callable[[Path], Contestant | None]:
        return lambda file: llama_cpp.decode(cast(Path, llama), file, batch, STEPS)

    def prefill_there(file: Path) -> Contestant:
        return llama_cpp.prefill(cast(Path, llama), file, 512)

    def prefill(model: LanguageModel) -> Contestant:
        return our_prefill(model, tokens_of(config, 1, 512))

    rows: dict[str, tuple[int, Workload, Callable[[Path], Contestant | None]]] = {
        "decode 1": (STEPS, decode(1), decode_there(1)),
        "decode 8": (8 * STEPS, decode(8), decode_there(8)),
        "prefill 512": (512, prefill, prefill_there),
    }
    figures = []
    for name, (tokens, workload, there) in rows.items():
        runs = {form: workload(model) for form, model in models.items()}
        peers = {form: there(file) for form, file in files.items()}
        runs |= {form: run for form, run in peers.items() if run is not None}
        samples = interleave(runs, repeats=repeats)
        figures.append(
            {
                "name": name,
                "tokens_per_s": {form: sample.rate(tokens) for form, sample in samples.items()},
            }
        )
    sizes = {form: num_bytes(model) for form, model in models.items()}
    sizes |= {form: file.stat().st_size for form, file in files.items()}
    return {"bytes": sizes, "figures": figures}


def weights_table(result: dict[str, Any]) -> list[list[str]]:
    """A row for each model and format: tokens per second and bytes, with ratios to float32."""
    figures = next(iter(result["models"].values()))["figures"]
    rows = [["model", "matrices", *(figure["name"] for figure in figures), "memory"]]
    for name, model in result["models"].items():
        for form, size in model["bytes"].items():
            cells = [_cell(figure["tokens_per_s"], form) for figure in model["figures"]]
            share = size / model["bytes"]["float32"]
            rows.append([name, form, *cells, f"{size / 1e6:,.0f} MB ({share:.2f}x)"])
    return rows


def _cell(rates: dict[str, dict[str, float]], form: str) -> str:
    """Tokens per second in one format, nothing where its program was not at hand."""
    if form not in rates:
        return ""
    rate = rates[form]["median"]
    return f"{rate:,.0f} ({rate / rates['float32']['median']:.2f}x)"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(configs()), default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--llama-cpp", type=Path, metavar="LLAMA_BENCH", help="its llama-bench")
    known = parser.parse_args()
    load = machine.load_average()
    machine.warn_if_busy(load)
    models = {
        name: measure(
            configs()[name], repeats=known.repeats, names=known.formats, llama=known.llama_cpp
        )
        for name in known.models
    }
    result = {
        "command": machine.command("benchmarks.weights"),
        "date": date.today().isoformat(),
        "machine": machine.description()
        | {"load_before": load, "load_after": machine.load_average()},
        "models": models,
    }
    file = RESULTS / f"weights-{machine.processor_name()}-{result['date']}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
