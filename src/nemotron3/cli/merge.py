"""`nemotron3 merge` and `merge-adapter`: one model of checkpoints, or of a model and an adapter."""

import argparse

from nemotron3.recipes.adapters import merge_adapter_directory
from nemotron3.recipes.merging import merge_run


def merge_command(known: argparse.Namespace) -> int:
    """Merge and say what was merged."""
    steps = merge_run(known.run, known.out, window_steps=known.window_steps, kind=known.kind)
    print(f"merged the checkpoints of steps {', '.join(map(str, steps))} into {known.out}")
    return 0


def merge_adapter_command(known: argparse.Namespace) -> int:
    """Merge and say how much was changed."""
    merged = merge_adapter_directory(known.model, known.adapter, known.out)
    dtype = str(merged.dtype).removeprefix("torch.")
    how = f"; its {merged.dequantized} weights are now plain {dtype}" if merged.dequantized else ""
    print(
        f"merged {known.adapter} into {merged.num_products} products of {known.model}{how}: "
        f"{known.out}"
    )
    return 0
