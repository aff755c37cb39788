"""Nanoseconds an element of quantizing to NVFP4, on one thread.

    python -m benchmarks.number_formats

Each case takes turns on every backend; the results are medians over the turns. The tensor, 2048
tokens of width 512, is the size of an activation of the 30M models.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from benchmarks.cpu import RESULTS
from torch import Tensor

from benchmarks import machine
from nemotron3.ops.backends import Backend
from nemotron3.ops.nvfp4 import SIGNS, fake_ms_eden, fake_quantize, quantize
from nemotron3.ops.rounding import Noise
from nemotron3.runtime.malloc import retain_freed_memory

SHAPE = (2048, 512)
NOISE = Noise(seed=0, step=0, layer=0, role="benchmark")
ROTATION = Noise(seed=0, step=0, layer=0, role="rotation")
BACKENDS: tuple[Backend, ...] = ("native", "torch")
_signs = torch.tensor(SIGNS, dtype=torch.float32)

Case = Callable[[Tensor, Backend], object]
CASES: dict[str, Case] = {
    "packed, rows": lambda x, b: quantize(x, backend=b),
    "packed, squares": lambda x, b: quantize(x, "2d", backend=b),
    "values, rows": lambda x, b: fake_quantize(x, backend=b),
    "values, rows, stochastic": lambda x, b: fake_quantize(
        x, "rows", "stochastic", noise=NOISE, backend=b
    ),
    "values, squares": lambda x, b: fake_quantize(x, "tiles", backend=b),
    "values, columns": lambda x, b: fake_quantize(x, "columns", backend=b),
    "values, columns, Hadamard": lambda x, b: fake_quantize(x, "columns", signs=_signs, backend=b),
    "values, columns, Hadamard, stochastic": lambda x, b: fake_quantize(
        x, "columns", "stochastic", noise=NOISE, signs=_signs, backend=b
    ),
    "values, rows, four-over-six": lambda x, b: fake_quantize(x, scales="four_over_six", backend=b),
    "values, rows, MS-EDEN": lambda x, b: fake_ms_eden(x, "rows", ROTATION, NOISE, backend=b),
    "values, columns, MS-EDEN": lambda x, b: fake_ms_eden(x, "columns", ROTATION, NOISE, backend=b),
}


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Nanoseconds an element of each case on each backend."""
    x = torch.randn(SHAPE)
    taken: dict[str, dict[str, list[float]]] = {
        name: {backend: [] for backend in BACKENDS} for name in CASES
    }
    for turn in range(repeats + 1):  # the first warms up
        for name, case in CASES.items():
            for backend in BACKENDS:
                case(x, backend)  # after the other backend, whose memory is in the caches
                start = time.perf_counter()
                case(x, backend)
                if turn:
                    taken[name][backend].append(time.perf_counter() - start)
    return {
        name: {b: round(statistics.median(s) / x.numel() * 1e9, 3) for b, s in of.items()}
        for name, of in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    retain_freed_memory()
    torch.set_num_threads(1)
    result = {
        "date": date.today().isoformat(),
        "processor": machine.processor_name(),
        "shape": SHAPE,
        "ns_per_element": measure(options.repeats),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"number_formats-{machine.processor_name()}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
