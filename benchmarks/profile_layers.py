"""The time of a training step and of a decoding step, by part of the model.

    python -m benchmarks.profile_layers [--model 30m-latent]

For each part it prints the share of the step, and for training the share of the machine's product
rate, for decoding (which memory and the number of operations limit) the time. Hooks and the
profiler identify the parts (benchmarks/layers.py). The results are medians over the repeats.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.cpu import RESULTS
from benchmarks.layers import OUTPUT, clocked, flops_per_token, profiled
from benchmarks.models import configs, our_loss, tokens_of
from benchmarks.workloads import OPTIMIZER, PROMPT

from benchmarks import machine
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.runtime.malloc import retain_freed_memory
from nemotron3.training.optimizers import build_optimizer

Parts = dict[str, float]
_WARMUPS = 4
"""Steps until the heap has the memory of a step: new pages take longer than the arithmetic."""


def training_parts(
    model: LanguageModel, *, batch: int, length: int, repeats: int
) -> dict[str, Parts]:
    """Median seconds of each part, forward and backward."""
    tokens = tokens_of(model.config, batch, length)
    optimizer = build_optimizer(model, OPTIMIZER)

    def once() -> dict[str, Parts]:
        optimizer.zero_grad(set_to_none=True)
        return profiled(model, lambda: our_loss(model, tokens), optimizer.step)

    for _ in range(_WARMUPS):
        once()
    runs = [once() for _ in range(repeats)]
    return {way: _medians([run[way] for run in runs]) for way in ("forward", "backward")}


@torch.inference_mode()
def decoding_parts(model: LanguageModel, *, batch: int, steps: int) -> Parts:
    """Median seconds of each part of a decoding step."""
    prompts = tokens_of(model.config, batch, PROMPT)
    state = model.new_state(batch)
    layout = state.layout([PROMPT] * batch)
    chosen = model.next_logits(prompts.flatten(), layout=layout, state=state).argmax(-1)

    def step() -> None:
        nonlocal chosen
        layout = state.layout([1] * batch)
        chosen = model.next_logits(chosen, layout=layout, state=state).argmax(-1)

    step()
    return _medians([clocked(model, step) for _ in range(steps)])


def _medians(runs: list[Parts]) -> Parts:
    return {part: statistics.median(run.get(part, 0.0) for run in runs) for part in runs[0]}


def measure(name: str, *, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """All results as they are stored."""
    load = machine.load_average()
    machine.warn_if_busy(load)
    at_most = machine.limits()
    config = configs()[name]
    model = LanguageModel.from_config(config)
    train = training_parts(model, batch=batch, length=length, repeats=repeats)
    flops = flops_per_token(model, context=length)
    parts = sorted(train["forward"], key=lambda part: -_both(train, part))
    rows = {
        part: {
            "forward_s": train["forward"].get(part, 0.0),
            "backward_s": train["backward"].get(part, 0.0),
            "flops": 3 * batch * length * flops.get(part, 0.0),
        }
        for part in parts
    }
    decode = {str(size): decoding_parts(model, batch=size, steps=8 * repeats) for size in (1, 8)}
    return {
        "command": machine.command("benchmarks.profile_layers"),
        "date": date.today().isoformat(),
        "machine": machine.description()
        | {"load_before": load, "load_after": machine.load_average()},
        "limits": at_most,
        "model": name,
        "train": {"batch": batch, "length": length, "parts": rows},
        "decode": decode,
    }


def _both(train: dict[str, Parts], part: str) -> float:
    return train["forward"].get(part, 0.0) + train["backward"].get(part, 0.0)


def training_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: part, milliseconds forward and backward, share of the step, share of the rate."""
    parts = result["train"]["parts"]
    total = sum(row["forward_s"] + row["backward_s"] for row in parts.values())
    rows = [("part", "forward, ms", "backward, ms", "of the step", "of the product rate")]
    for part, row in parts.items():
        seconds = row["forward_s"] + row["backward_s"]
        rate = row["flops"] / seconds / result["limits"]["product_flops_per_s"] if seconds else 0
        rows.append(
            (
                part,
                f"{row['forward_s'] * 1e3:.1f}",
                f"{row['backward_s'] * 1e3:.1f}",
                f"{seconds / total:.0%}",
                f"{rate:.0%}" if row["flops"] else "",
            )
        )
    return rows


def decoding_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: part, and milliseconds and share of a step for each batch size."""
    decode = result["decode"]
    first = next(iter(decode.values()))
    heads = [f"batch {batch}, {what}" for batch in decode for what in ("ms", "share")]
    rows = [("part", *heads)]
    for part in sorted(first, key=lambda part: -first[part]):
        cells = []
        for parts in decode.values():
            cells += [f"{parts[part] * 1e3:.2f}", f"{parts[part] / sum(parts.values()):.0%}"]
        name = "output layer and choice" if part == OUTPUT else part
        rows.append((name, *cells))
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for name, *cells in rows:
        line = [name.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join(line))
    print()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(configs()), default="30m-latent")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args(arguments)
    retain_freed_memory()  # as training does
    result = measure(
        options.model, batch=options.batch, length=options.length, repeats=options.repeats
    )
    tables: list[Callable[[dict[str, Any]], list[tuple[str, ...]]]] = [
        training_table,
        decoding_table,
    ]
    for table in tables:
        print_table(table(result))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"profile-{options.model}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
