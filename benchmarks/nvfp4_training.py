"""Time of a training step in NVFP4 over that of the step in float32, and of changes of the recipe.

    python -m benchmarks.nvfp4_training
    python -m benchmarks.nvfp4_training --models tiny --rounds 20 --threads 1

All models take turns, a step each; the ratios are medians over the rounds, of processor time and
of wall time. `tiny` has the batch of its recipe, the 30M models one sequence of 512 tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from benchmarks.cpu import RESULTS
from benchmarks.models import configs, objective_of

from benchmarks import machine
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.nvfp4_recipe import NVFP4Config
from nemotron3.models.precision import PrecisionConfig, apply_precision
from nemotron3.ops.segments import Segments
from nemotron3.runtime.malloc import retain_freed_memory
from nemotron3.training.batch import TrainBatch
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep


def _nvfp4(config: NVFP4Config) -> PrecisionConfig:
    return PrecisionConfig(recipe="nvfp4", nvfp4=config)


PRECISIONS: Mapping[str, PrecisionConfig] = {
    "float32": PrecisionConfig(),
    "nvfp4": _nvfp4(NVFP4Config()),
    "four-over-six": _nvfp4(NVFP4Config(weights="1d", scales="four_over_six")),
    "ms-eden": _nvfp4(NVFP4Config(gradients="ms_eden")),
    "both": _nvfp4(NVFP4Config(weights="1d", scales="four_over_six", gradients="ms_eden")),
}
"""The published recipe is `nvfp4`; the first is what the others are compared with."""
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


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the step in each precision, and their ratios to the step in float32."""
    steps = {key: _step(name, precision) for key, precision in PRECISIONS.items()}
    taken: dict[str, list[tuple[float, float]]] = {key: [] for key in steps}
    for turn in range(rounds + 2):  # the first two warm up
        for key, work in steps.items():
            found = _seconds(work)
            if turn > 1:
                taken[key].append(found)
    return {key: _medians(of, taken["float32"]) for key, of in taken.items()}


def _medians(
    taken: Sequence[tuple[float, float]], compared: Sequence[tuple[float, float]]
) -> dict[str, float]:
    result: dict[str, float] = {}
    for index, kind in enumerate(("cpu", "wall")):
        own = [pair[index] for pair in taken]
        ratios = [a / b[index] for a, b in zip(own, compared, strict=True)]
        result[f"{kind}_ms"] = round(1e3 * statistics.median(own), 2)
        result[f"{kind}_ratio"] = round(statistics.median(ratios), 3)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "30m-latent"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    retain_freed_memory()
    steps = {name: measure(name, given.rounds) for name in given.models}
    for name, rows in steps.items():
        for key, row in rows.items():
            cpu, wall = row["cpu_ratio"], row["wall_ratio"]
            print(f"{name:12} {key:14} CPU time {cpu:.2f}, wall time {wall:.2f} of float32")
    machine.write_result("nvfp4_training", {"steps": steps}, arguments=arguments, folder=given.out)


if __name__ == "__main__":
    main()
