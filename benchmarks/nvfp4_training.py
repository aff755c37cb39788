"""Time of a training step in NVFP4 over that of the step in float32.

    python -m benchmarks.nvfp4_training
    python -m benchmarks.nvfp4_training --models tiny --rounds 20

Both models take turns, a step each; the ratios are medians over the rounds, of processor time and
of wall time. `tiny` has the batch of its recipe, the 30M models one sequence of 512 tokens.
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
from benchmarks.models import configs, objective_of

from benchmarks import machine
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig, apply_precision
from nemotron3.ops.segments import Segments
from nemotron3.runtime.malloc import retain_freed_memory
from nemotron3.training.batch import TrainBatch
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep

PLAIN = PrecisionConfig()
NVFP4 = PrecisionConfig(recipe="nvfp4")
BATCHES = {"tiny": (8, 256)}
"""Sequences and their length; of other models 1 x 512."""


def _config(name: str) -> ModelConfig:
    return ModelConfig.preset("tiny") if name == "tiny" else configs()[name]


def _step(name: str, precision: PrecisionConfig) -> Callable[[], object]:
    model = LanguageModel.from_config(_config(name))
    apply_precision(model, precision)
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-4))
    rows, length = BATCHES.get(name, (1, 512))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (rows * length + 1,), generator=draw)
    batch = TrainBatch(
        tokens=tokens[:-1],
        targets=tokens[1:],
        mask=torch.ones(rows * length),
        segments=Segments([length] * rows),
    )
    update = TrainingStep(model, optimizer, objective_of(model), clip_grad_norm=1.0)
    return lambda: update([batch], learning_rate=1e-4)


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(name: str, rounds: int) -> dict[str, float]:
    """Milliseconds of both steps, and their ratios."""
    steps = {"float32": _step(name, PLAIN), "nvfp4": _step(name, NVFP4)}
    taken: dict[str, list[tuple[float, float]]] = {key: [] for key in steps}
    for turn in range(rounds + 2):  # the first two warm up
        for key, work in steps.items():
            found = _seconds(work)
            if turn > 1:
                taken[key].append(found)
    result: dict[str, float] = {}
    for index, kind in enumerate(("cpu", "wall")):
        own = {key: statistics.median(pair[index] for pair in of) for key, of in taken.items()}
        ratios = [
            n[index] / f[index] for n, f in zip(taken["nvfp4"], taken["float32"], strict=True)
        ]
        result |= {f"{kind}_ms_{key}": round(1e3 * value, 2) for key, value in own.items()}
        result[f"{kind}_ratio"] = round(statistics.median(ratios), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "30m-latent"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    retain_freed_memory()
    found = {name: measure(name, options.rounds) for name in options.models}
    result = {
        "date": date.today().isoformat(),
        "processor": machine.processor_name(),
        "threads": torch.get_num_threads(),
        "steps": found,
    }
    for name, row in found.items():
        print(f"{name:12} CPU time {row['cpu_ratio']:.2f}, wall time {row['wall_ratio']:.2f}")
    path = options.out / f"nvfp4_training-{machine.processor_name()}-{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
