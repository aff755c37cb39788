"""Our bfloat16 against our float32 on this CPU, in turns.

    python -m benchmarks.bfloat16 [--models 30m-latent 150m-latent]

Training has float32 weights in both cases, and activations of either dtype (a step of 4 x 512
tokens). For prompts and decoding the weights of the bfloat16 model are bfloat16 too, rounded from
those of the other. The result says how far their predictions are apart: the mean KL divergence of
bfloat16 from float32 with the same rounded weights, over 512 tokens.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.cpu import RESULTS
from benchmarks.models import configs, our_loss, tokens_of
from benchmarks.timing import Contestant, interleave, warmed
from torch import Tensor

from benchmarks import machine, workloads
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops import native
from nemotron3.runtime.malloc import retain_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT, DECODED = 512, 128
KINDS = ("train", "prefill", "decode")
_Row = tuple[str, int, dict[str, Contestant]]


def rows(config: ModelConfig, kinds: list[str]) -> Iterator[_Row]:
    """Each workload: its name, its tokens, and the contestants."""
    if "train" in kinds:
        yield "train", 4 * PROMPT, _training(config)
    if set(kinds) == {"train"}:
        return
    models = {n: LanguageModel.from_config(config, dtype=dtype) for n, dtype in DTYPES.items()}
    if "prefill" in kinds:
        tokens = tokens_of(config, 1, PROMPT)
        peers = {name: workloads.our_prefill(model, tokens) for name, model in models.items()}
        yield f"prefill {PROMPT}", PROMPT, peers
    if "decode" in kinds:
        tokens = tokens_of(config, 1, workloads.PROMPT)
        peers = {n: workloads.our_decode(model, tokens, DECODED) for n, model in models.items()}
        yield "decode, batch 1", DECODED, peers


def _training(config: ModelConfig) -> dict[str, Contestant]:
    """Steps of one model, whose activations have one dtype and then the other."""
    model = LanguageModel.from_config(config)
    tokens = tokens_of(config, 4, PROMPT)
    optimizer = workloads.optimizer_of(model)

    def step_in(dtype: torch.dtype) -> Contestant:
        def step() -> None:
            model.activation_dtype = dtype
            optimizer.zero_grad(set_to_none=True)
            our_loss(model, tokens).backward()
            optimizer.step()

        return warmed(step)

    return {name: step_in(dtype) for name, dtype in DTYPES.items()}


@torch.inference_mode()
def divergence(config: ModelConfig) -> float:
    """Mean KL divergence of bfloat16 from float32 in nats, with the same weights."""
    model = LanguageModel.from_config(config, dtype=torch.bfloat16)
    tokens = tokens_of(config, 1, PROMPT)
    logprobs: list[Tensor] = []
    for dtype in DTYPES.values():
        model.activation_dtype = dtype
        logprobs.append(model(tokens)[0].log_softmax(-1))
    wide, narrow = logprobs
    return (wide.exp() * (wide - narrow)).sum(-1).mean().item()


def measure(models: list[str], kinds: list[str], repeats: int) -> dict[str, Any]:
    """Rates and divergence of each model."""
    result: dict[str, Any] = {}
    for model in models:
        config = configs()[model]
        result[model] = {"divergence": divergence(config), "rows": {}}
        for name, tokens, peers in rows(config, kinds):
            samples = interleave(peers, repeats=repeats)
            rates = {peer: sample.rate(tokens) for peer, sample in samples.items()}
            result[model]["rows"][name] = rates
            print(f"{model:12} {name:16} {_ratio(rates):.2f}x", flush=True)
    return {"has_instructions": native.multiplies_bfloat16(), "models": result}


def _ratio(rates: dict[str, dict[str, float]]) -> float:
    return rates["bfloat16"]["median"] / rates["float32"]["median"]


def bfloat16_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: a workload, tokens per second of both dtypes, and their ratio."""
    table: list[tuple[str, ...]] = [("tokens/s", *DTYPES, "ratio", "KL of bfloat16")]
    for model, of in result["models"].items():
        for name, rates in of["rows"].items():
            cells = [
                f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})"
                for rate in (rates[dtype] for dtype in DTYPES)
            ]
            kl = f"{of['divergence']:.1e}"
            table.append((f"{model}, {name}", *cells, f"{_ratio(rates):.2f}x", kl))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(configs())
    parser.add_argument("--models", nargs="+", choices=names, default=["30m-latent", "150m-latent"])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args(arguments)
    retain_freed_memory()
    torch.set_num_threads(options.threads)
    load = machine.load_average()
    machine.warn_if_busy(load)
    result = measure(options.models, options.only, options.repeats)
    about = {"load_before": load, "load_after": machine.load_average()}
    folder = options.out
    print(machine.write_result("bfloat16", result, arguments=arguments, about=about, folder=folder))


if __name__ == "__main__":
    main()
