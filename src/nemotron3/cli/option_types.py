"""Types of options, beside those that argparse has."""

import argparse
import math


def seconds(text: str) -> float:
    """A time to wait, as an option has it."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait; give seconds, 0 or more")
    return value
