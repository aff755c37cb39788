"""The speed of narrow weights: one model with its matrices in float32, bfloat16 and narrower.

    python -m benchmarks.weights
    python -m benchmarks.weights --models 150m-latent --formats int8 nvfp4

The weights are random and the same, rounded to each format, and the formats take turns. A decoding
step must read the weights that its tokens use, so it becomes faster if memory limits it; a prefill
is limited by arithmetic, which stays in float32. With bfloat16 the whole model and its activations
are rounded. Results go to benchmarks/results/ and, with `python -m benchmarks.page`, to
docs/speed.md.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, cast

import torch
from benchmarks.cpu import RESULTS
from benchmarks.models import configs, tokens_of
from benchmarks.timing import Contestant, interleave
from benchmarks.workloads import PROMPT, our_decode, our_prefill

from benchmarks import machine
from nemotron3 import LanguageModel
from nemotron3.models.config import ModelConfig
from nemotron3.models.parameter import state_tensors
from nemotron3.models.precision import convert_weights
from nemotron3.ops.weights import WeightFormat

Workload = Callable[[LanguageModel], Contestant]
MODELS = ("30m-latent", "150m-latent", "150m-standard")
STEPS = 16
"""Decoding steps in one repetition."""


FORMATS = ("bfloat16", "int8", "fp8", "nvfp4")


def formats(config: ModelConfig, names: Sequence[str]) -> dict[str, LanguageModel]:
    """One model in float32 and in each of the formats named."""
    model = LanguageModel.from_config(config, seed=0).eval()
    models = {"float32": model}
    for name in names:
        if name == "bfloat16":
            models[name] = copy.deepcopy(model).to(torch.bfloat16)
        else:
            models[name] = convert_weights(model, weights=cast(WeightFormat, name))
    return models


def num_bytes(model: LanguageModel) -> int:
    """Bytes of all weights in memory."""
    return sum(value.nbytes for _, value in state_tensors(model))


def measure(config: ModelConfig, *, repeats: int, names: Sequence[str]) -> dict[str, Any]:
    """Bytes, and tokens per second of each row in each format."""
    models = formats(config, names)

    def decode(batch: int) -> Workload:
        return lambda model: our_decode(model, tokens_of(config, batch, PROMPT), steps=STEPS)

    rows = {
        "decode 1": (STEPS, decode(1)),
        "decode 8": (8 * STEPS, decode(8)),
        "prefill 512": (512, lambda model: our_prefill(model, tokens_of(config, 1, 512))),
    }
    figures = []
    for name, (tokens, workload) in rows.items():
        runs = {form: workload(model) for form, model in models.items()}
        samples = interleave(runs, repeats=repeats)
        figures.append(
            {
                "name": name,
                "tokens_per_s": {form: sample.rate(tokens) for form, sample in samples.items()},
            }
        )
    return {"bytes": {form: num_bytes(model) for form, model in models.items()}, "figures": figures}


def weights_table(result: dict[str, Any]) -> list[list[str]]:
    """Table rows: tokens per second by format, ratios to float32, and bytes."""
    forms = list(next(iter(result["models"].values()))["bytes"])
    others = [form for form in forms if form != "float32"]
    rows = [["model", "tokens/s", *forms, *(f"{form} against float32" for form in others)]]
    for name, model in result["models"].items():
        for figure in model["figures"]:
            rates = {form: rate["median"] for form, rate in figure["tokens_per_s"].items()}
            ratios = [f"{rates[form] / rates['float32']:.2f}x" for form in others]
            rows.append([name, figure["name"], *(f"{rates[form]:,.0f}" for form in forms), *ratios])
        size = model["bytes"]
        ratios = [f"{size[form] / size['float32']:.2f}x" for form in others]
        rows.append([name, "memory", *(f"{size[form] / 1e6:,.0f} MB" for form in forms), *ratios])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(configs()), default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--repeats", type=int, default=7)
    known = parser.parse_args()
    load = machine.load_average()
    machine.warn_if_busy(load)
    models = {
        name: measure(configs()[name], repeats=known.repeats, names=known.formats)
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
