"""Train the example's reasoner at a benchmark's size, to measure drafts with expensive steps.

    python -m benchmarks.reasoner 30m-latent          # some minutes, into runs/reasoner-30m-latent
    python -m benchmarks.speculation runs/reasoner-30m-latent/model

The task, the data and the schedule are those of examples/reasoner.py, the widths those of
benchmarks/models.py, with two depths of multi-token prediction.
"""

import argparse
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.models import configs

from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_pretrain import pretrain
from nemotron3.training.optimizers import AdamWConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # as where it is run
example: Any = import_module("reasoner")


def run_of(size: str, base: PretrainRun) -> PretrainRun:
    """The example's run with a larger model and a smaller learning rate."""
    config = configs()[size]
    model = replace(
        config,
        hybrid_override_pattern=config.hybrid_override_pattern + "/*E/*E",
        vocab_size=example.VOCABULARY,
    )
    training = replace(base.training, optimizer=AdamWConfig(lr=1.5e-3))
    return replace(base, name=f"reasoner-{size}", model=model, training=training)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=list(configs()), help="whose widths")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--conversations", type=int, default=30_000)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    known = parser.parse_args()
    folder = known.runs / f"reasoner-{known.size}"
    corpus = example.write_corpus(folder / "corpus", conversations=known.conversations)
    run = run_of(known.size, example.recipe(corpus, steps=known.steps))
    pretrain(run, runs=known.runs, callback=example.Line())


if __name__ == "__main__":
    main()
