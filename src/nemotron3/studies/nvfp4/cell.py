"""A cell: one arm with one seed, trained, and measured on held-out text while it is."""

from dataclasses import dataclass
from pathlib import Path

from nemotron3.data import Corpus
from nemotron3.errors import DivergenceError
from nemotron3.models.precision import apply_precision
from nemotron3.observe.metrics import read_metrics
from nemotron3.recipes.run_folder import METRICS_FILE, RunCallback, RunFolder
from nemotron3.recipes.run_pretrain import held_out_bits, train_model
from nemotron3.studies.nvfp4.arms import Cell, run_of
from nemotron3.studies.nvfp4.config import NVFP4Study
from nemotron3.studies.study import Stopwatch

_BITS = "eval/bits_per_byte"
_ZEROS = "precision/zero_gradients"
_FLUSHED = "precision/flushed_"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number at a step of a training."""

    step: int
    """Updates made."""
    value: float


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What is kept of a cell."""

    cell: Cell
    failure: str | None
    """Why the training could not go on to its end: a gradient that is not finite."""
    bits_per_byte: tuple[Point, ...]
    """Of held-out text, in the precision of training."""
    unrounded: float | None
    """Bits per byte of the same text at the end, with no operand rounded: the model as it is
    written."""
    flushed: dict[str, float]
    """Values of operands that became zero, as `fprop_layer_07`, at the last measurement of each."""
    zero_gradients: tuple[Point, ...]
    """Share of zeros in the gradients of rounded products' weights."""
    seconds: float
    """Wall time."""


def run_cell(
    study: NVFP4Study,
    cell: Cell,
    *,
    steps: int,
    corpus: Corpus,
    work: Path,
    callback: RunCallback,
) -> CellResult:
    """Train a cell of so many updates in the folder `work`, from where it stands there.

    Training that diverges is a result.
    """
    run = run_of(study, cell, steps=steps)
    folder = RunFolder(run, runs=work)
    folder.record({})
    failure = unrounded = None
    with Stopwatch(work / "seconds.json") as stopwatch:
        try:
            model, _ = train_model(folder, corpus, callback)
            apply_precision(model, run.training.precision.unrounded)
            unrounded = held_out_bits(run, corpus, model, run.evaluation_rows)[0][_BITS]
        except DivergenceError as error:
            failure = f"{type(error).__name__}: {error}"
    file = folder.path / METRICS_FILE
    metrics = list(read_metrics(file)) if file.exists() else []
    flushed: dict[str, float] = {}
    for _, values in metrics:
        flushed |= {
            name.removeprefix(_FLUSHED): value
            for name, value in values.items()
            if name.startswith(_FLUSHED)
        }

    def points(name: str) -> tuple[Point, ...]:
        return tuple(
            Point(step=step, value=values[name]) for step, values in metrics if name in values
        )

    return CellResult(
        cell=cell,
        failure=failure,
        bits_per_byte=points(_BITS),
        unrounded=unrounded,
        flushed=flushed,
        zero_gradients=points(_ZEROS),
        seconds=stopwatch.seconds,
    )
