"""`nemotron3 merge`: one model from a window of checkpoints."""

import argparse

from nemotron3.recipes.merging import merge_run


def merge_command(known: argparse.Namespace) -> int:
    """Merge and say what was merged."""
    steps = merge_run(known.run, known.out, window_steps=known.window_steps, kind=known.kind)
    print(f"merged the checkpoints of steps {', '.join(map(str, steps))} into {known.out}")
    return 0
