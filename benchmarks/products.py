"""Dense products of the model's shapes, compared with those of PyTorch's library.

    python -m benchmarks.products

Both compute the same product in turns: forward and both gradients for many rows, as in training,
and only forward for the few rows of a decoding step. In the latter every call uses another weight
matrix, of more than the caches hold, since a layer's weights were last used a step ago. The results
are medians.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.cpu import RESULTS
from benchmarks.timing import interleave
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine
from nemotron3.ops.linear import linear
from nemotron3.runtime.malloc import retain_freed_memory

SHAPES = {
    "30M, into Mamba": (1552, 256),
    "30M, out of Mamba": (256, 512),
    "30M, output layer": (8192, 256),
    "150M, into Mamba": (4112, 512),
    "150M, shared expert": (1024, 512),
    "150M, output layer": (16384, 512),
}
"""Outputs and inputs of weight matrices, from the models of the other benchmarks."""
FEW, MANY = (1, 8, 32, 128), 2048
COLD_BYTES = 2**27
"""Bytes of the weights in a turn."""

Product = Callable[[Tensor, Tensor], Tensor]
PEERS: dict[str, Product] = {
    "ours": lambda x, w: linear(x, w, backend="native"),
    "library": F.linear,
}


def timed(product: Product, x: Tensor, weights: list[Tensor]) -> Callable[[], float]:
    """Seconds of one product, the mean over all weights."""

    @torch.inference_mode()
    def run() -> float:
        start = time.perf_counter()
        for weight in weights:
            product(x, weight)
        return (time.perf_counter() - start) / len(weights)

    return run


def timed_gradients(product: Product, x: Tensor, weights: list[Tensor]) -> Callable[[], float]:
    """Seconds of the two gradients of a product, the mean over all weights."""
    dy = torch.randn(len(x), len(weights[0]))

    def run() -> float:
        total = 0.0
        for weight in weights:
            y = product(x.requires_grad_(), weight.requires_grad_())
            start = time.perf_counter()
            torch.autograd.grad(y, (x, weight), dy)
            total += time.perf_counter() - start
        return total / len(weights)

    return run


def cases(outputs: int, inputs: int) -> Iterator[tuple[str, float, dict[str, Callable[[], float]]]]:
    """Name, FLOPs and contestants of each measurement of such a matrix."""
    count = max(2, COLD_BYTES // (4 * outputs * inputs))
    weights = [torch.randn(outputs, inputs) for _ in range(count)]
    for rows in (*FEW, MANY):
        x, few = torch.randn(rows, inputs), weights if rows < MANY else weights[:4]
        flops = 2.0 * rows * outputs * inputs
        name = "1 row" if rows == 1 else f"{rows} rows"
        yield name, flops, {peer: timed(p, x, few) for peer, p in PEERS.items()}
        if rows == MANY:
            back = {peer: timed_gradients(p, x, few) for peer, p in PEERS.items()}
            yield f"{name}, back", 2 * flops, back


def measure(repeats: int) -> dict[str, Any]:
    """All results as they are stored."""
    load = machine.load_average()
    machine.warn_if_busy(load)
    at_most = machine.limits()
    shapes: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        shapes[name] = {"outputs": shape[0], "inputs": shape[1], "cases": {}}
        for case, flops, contestants in cases(*shape):
            samples = interleave(contestants, repeats=repeats)
            rates = {peer: sample.rate(flops)["median"] for peer, sample in samples.items()}
            shapes[name]["cases"][case] = rates
            words = ", ".join(f"{peer} {rate / 1e9:.0f}" for peer, rate in rates.items())
            print(f"{name:24}{case:18}{words} GFLOP/s", flush=True)
    return {
        "command": machine.command("benchmarks.products"),
        "date": date.today().isoformat(),
        "machine": machine.description()
        | {"load_before": load, "load_after": machine.load_average()},
        "limits": machine.best_of(at_most, machine.limits()),
        "shapes": shapes,
    }


def product_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: the matrix, and for each case our rate and its ratio to the library's."""
    shapes = result["shapes"]
    names = list(next(iter(shapes.values()))["cases"])
    rows = [("GFLOP/s of ours (times the library's)", *names)]
    for name, shape in shapes.items():
        cells = [
            f"{rates['ours'] / 1e9:.0f} ({rates['ours'] / rates['library']:.2f}x)"
            for rates in shape["cases"].values()
        ]
        rows.append((f"{name}, {shape['outputs']} x {shape['inputs']}", *cells))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    retain_freed_memory()
    torch.set_num_threads(options.threads)
    result = measure(options.repeats)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"products-{machine.processor_name()}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
