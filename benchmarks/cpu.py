"""Speed on this CPU compared with transformers, and optionally llama.cpp, in one run.

    python -m benchmarks.cpu                                  # about 30M parameters, both forms
    python -m benchmarks.cpu --large                          # and about 150M
    python -m benchmarks.cpu --llama-cpp build/bin/llama-bench
    python -m benchmarks.cpu --only decode                    # measure these figures again

All programs use float32, the same weights and tokens, and PyTorch's number of threads
(OMP_NUM_THREADS). First their results must agree (benchmarks/models.py), or nothing is timed. Then
they take turns. The output has medians with lowest and highest, ratios of medians, and the share of
the machine's limit (benchmarks/limits.py), which is measured in turn with them. Results go to
benchmarks/results/, into the newest file of this machine: a new figure replaces the old one, and
each figure names its run.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.models import TOLERANCE, Pair, build_pair, configs, parity, tokens_of
from benchmarks.timing import Contestant, Sample, interleave

from benchmarks import limits, llama_cpp, machine, memory, workloads
from nemotron3.models.costs import model_costs
from nemotron3.runtime.malloc import retain_freed_memory

RESULTS = Path(__file__).parent / "results"
LIMIT = "limit"
"""Name of the contestant that measures the machine's limit."""
KINDS = ("train", "prefill", "decode")
"""Kinds of workloads, which `--only` selects."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the workloads."""

    train_batch: int = 4
    train_length: int = 512
    prefill_lengths: tuple[int, ...] = (512, 4096)
    decode_batches: tuple[int, ...] = (1, 8)
    decode_steps: int = 128


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One figure: the contestants, the number of tokens, and the limit."""

    name: str
    tokens: int
    limit: str
    """The machine's limit that applies: FLOP/s or bandwidth."""
    demand: float
    """FLOPs or bytes of one token."""
    peers: dict[str, Contestant] = field(default_factory=dict)


def workload_list(
    pair: Pair, sizes: Sizes, kinds: Sequence[str], llama: Path | None
) -> Iterator[Workload]:
    """All workloads of a model, created one by one to limit memory."""
    if "train" in kinds:
        yield train_workload(pair, sizes)
        for model in (pair.ours, pair.theirs):
            model.zero_grad(set_to_none=True)
    if set(kinds) == {"train"}:
        return
    gguf = llama_cpp.write_gguf(llama, pair) if llama else None
    for length in sizes.prefill_lengths if "prefill" in kinds else ():
        yield prefill_workload(pair, length, llama, gguf)
    for batch in sizes.decode_batches if "decode" in kinds else ():
        yield decode_workload(pair, batch, sizes.decode_steps, llama, gguf)


def train_workload(pair: Pair, sizes: Sizes) -> Workload:
    """A training step: forward pass, backward pass and update."""
    tokens = tokens_of(pair.ours.config, sizes.train_batch, sizes.train_length)
    return Workload(
        name="train",
        tokens=tokens.numel(),
        limit="product_flops_per_s",
        demand=limits.training_flops(pair.ours.config, length=sizes.train_length),
        peers={
            "ours": workloads.training(pair.ours, tokens),
            "transformers": workloads.training(pair.theirs, tokens),
        },
    )


def prefill_workload(pair: Pair, length: int, llama: Path | None, gguf: Path | None) -> Workload:
    """The prefill of one prompt."""
    tokens = tokens_of(pair.ours.config, 1, length)
    peers = {
        "ours": workloads.our_prefill(pair.ours, tokens),
        "transformers": workloads.their_prefill(pair.theirs, tokens),
    }
    if llama and gguf:
        peers["llama.cpp"] = llama_cpp.prefill(llama, gguf, length)
    return Workload(
        name=f"prefill {length}",
        tokens=length,
        limit="product_flops_per_s",
        demand=limits.prefill_flops(pair.ours.config, length=length),
        peers=peers,
    )


def decode_workload(
    pair: Pair, batch: int, steps: int, llama: Path | None, gguf: Path | None
) -> Workload:
    """Decoding of one or several sequences, a token at a time."""
    config = pair.ours.config
    prompts = tokens_of(config, batch, workloads.PROMPT)
    peers = {
        "ours": workloads.our_decode(pair.ours, prompts, steps),
        "transformers": workloads.their_decode(pair.theirs, prompts, steps),
    }
    if llama and gguf:
        third = llama_cpp.decode(llama, gguf, batch, steps)
        peers |= {"llama.cpp": third} if third else {}
    context = workloads.PROMPT + steps // 2
    return Workload(
        name=f"decode, batch {batch}",
        tokens=batch * steps,
        limit="read_bytes_per_s",
        demand=limits.decode_bytes(config, batch=batch, context=context) / batch,
        peers=peers,
    )


def measure_model(
    name: str, sizes: Sizes, *, repeats: int, kinds: Sequence[str] = KINDS, llama: Path | None
) -> dict[str, Any]:
    """All figures of one model; only the parity if that fails."""
    config = configs()[name]
    costs = model_costs(config)
    with tempfile.TemporaryDirectory() as folder:
        pair = build_pair(config, Path(folder))
        differences = parity(pair)
        result: dict[str, Any] = {
            "parameters": costs.total,
            "active": costs.total_active,
            "parity": differences,
            "figures": [],
        }
        print(
            f"{name}: {costs.total / 1e6:.1f}M parameters, {costs.total_active / 1e6:.1f}M active"
        )
        print("  parity  " + ", ".join(f"{k} {v:.1e}" for k, v in differences.items()))
        if not max(differences.values()) <= TOLERANCE:
            print(f"  NOT COMPARED: a difference is above {TOLERANCE:.0e} of the scale")
            return result
        for workload in workload_list(pair, sizes, kinds, llama):
            beside = {LIMIT: machine.limit_now(workload.limit)}
            samples = interleave(workload.peers | beside, repeats=repeats)
            result["figures"].append(as_figure(workload, samples))
            print(f"  {figure_line(result['figures'][-1])}", flush=True)
        if "train" in kinds and (used := measure_memory(pair.folder, sizes)):
            result["train_memory"] = {"bytes": used}
    return result


def measure_memory(folder: Path, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Peak memory of a training step of both programs."""
    if not memory.can_measure():
        print("  memory is left out: only Linux says how much a process had at most\n")
        return {}
    used = {
        program: memory.measure(
            program,
            folder,
            batch=sizes.train_batch,
            length=sizes.train_length,
            threads=torch.get_num_threads(),
        )
        for program in ("ours", "transformers")
    }
    cells = ", ".join(f"{m} {u['total'] / 1e6:.0f} MB" for m, u in used.items())
    ratio = used["ours"]["total"] / used["transformers"]["total"]
    print(f"  {'train, memory':18}{cells}   {ratio:.2f} of transformers'\n", flush=True)
    return used


def as_figure(workload: Workload, samples: dict[str, Sample]) -> dict[str, Any]:
    """One figure as it is stored; a ratio is our speed divided by the other program's.

    The limit is the median of the measurements between the contestants' turns.
    """
    ours = samples["ours"].median
    least = samples[LIMIT].median * workload.demand * workload.tokens
    peers = {name: sample for name, sample in samples.items() if name != LIMIT}
    return {
        "name": workload.name,
        "limit": workload.limit,
        "limit_per_s": 1 / samples[LIMIT].median,
        "demand_per_token": workload.demand,
        "tokens_per_s": {name: s.rate(workload.tokens) for name, s in peers.items()},
        "ratio": {name: s.median / ours for name, s in peers.items() if name != "ours"},
        "share_of_limit": {name: least / s.median for name, s in peers.items()},
    }


def figure_line(figure: dict[str, Any]) -> str:
    """One figure as a line of text."""
    cells = [
        f"{name} {rate['median']:.0f} ({rate['min']:.0f}-{rate['max']:.0f})"
        for name, rate in figure["tokens_per_s"].items()
    ]
    ratios = [f"{ratio:.2f}x {name}" for name, ratio in figure["ratio"].items()]
    return f"{figure['name']:18}{', '.join(cells)} tokens/s   {', '.join(ratios)}"


def measure(
    names: list[str],
    sizes: Sizes,
    *,
    repeats: int,
    kinds: Sequence[str] = KINDS,
    llama: Path | None = None,
) -> dict[str, Any]:
    """All results as they are stored: models, and for each figure the run that measured it."""
    load = machine.load_average()
    machine.warn_if_busy(load)
    before = machine.limits()
    models = {
        name: measure_model(name, sizes, repeats=repeats, kinds=kinds, llama=llama)
        for name in names
    }
    run = {
        "command": machine.command("benchmarks.cpu"),
        "date": date.today().isoformat(),
        "machine": machine.description()
        | {"load_before": load, "load_after": machine.load_average()},
        "limits": machine.best_of(before, machine.limits()),
    }
    for model in models.values():
        for figure in model["figures"]:
            figure["run"] = run
        if "train_memory" in model:
            model["train_memory"]["run"] = run
    return {"models": models}


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` updated with the figures of `new`; a model whose parity fails has no figures."""
    models = dict(old["models"])
    for name, model in new["models"].items():
        before = models.get(name)
        if before is None or not model["figures"]:
            models[name] = model
            continue
        figures = {figure["name"]: figure for figure in before["figures"] + model["figures"]}
        models[name] = before | model | {"figures": list(figures.values())}
    return {"models": models}


def write(result: dict[str, Any], folder: Path) -> Path:
    """Merge a result into this processor's newest file in a folder; the name has today's date."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"cpu-{machine.processor_name()}"
    for newest in sorted(folder.glob(f"{name}-????-??-??.json"))[-1:]:
        result = merge(json.loads(newest.read_text()), result)
    path = folder / f"{name}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def print_shares(result: dict[str, Any]) -> None:
    figures = [f for model in result["models"].values() for f in model["figures"]]
    if not figures:
        return
    words = machine.limits_in_words(figures[0]["run"]["limits"])
    print(f"share of what the machine gave between turns (at best {words})")
    for name, model in result["models"].items():
        for figure in model["figures"]:
            cells = [f"{who} {share:.0%}" for who, share in figure["share_of_limit"].items()]
            limit = f"{figure['limit_per_s'] / 1e9:.0f} G/s {figure['limit'].partition('_')[0]}"
            print(f"  {name:16}{figure['name']:18}{limit:17}{', '.join(cells)}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(configs()), help="only these")
    parser.add_argument("--large", action="store_true", help="also about 150M parameters")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="only these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama-cpp", type=Path, metavar="PATH", help="a built llama-bench")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args(arguments)
    retain_freed_memory()  # as an engine does; for both programs of this process
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    llama = options.llama_cpp
    if llama is None or not llama.exists():
        missing = (
            f"{llama} does not exist" if llama else "no --llama-cpp PATH to a built llama-bench"
        )
        print(f"llama.cpp is left out: {missing}\n")
        llama = None
    names = options.models or ["30m-latent", "30m-standard"]
    names += ["150m-latent", "150m-standard"] if options.large else []
    result = measure(names, Sizes(), repeats=options.repeats, kinds=options.only, llama=llama)
    print_shares(result)
    print(f"\n{write(result, options.out)}")


if __name__ == "__main__":
    main()
