"""The style of all plots in the documentation."""

import importlib
from typing import Any

BLUE, ORANGE, GREEN, GREY, INK = "#2e70de", "#d9642c", "#2b9a66", "#c9ccd1", "#3b4048"


def pyplot() -> Any:
    """matplotlib's pyplot in this style; the same numbers give the same bytes."""
    plt: Any = importlib.import_module("matplotlib.pyplot")
    plt.rcParams |= {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "svg.hashsalt": "nemotron3",
        "axes.edgecolor": GREY,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    return plt
