"""The figures of the report, as SVG that takes its colours from the page.

Matplotlib draws with placeholder colours, which become CSS variables in the SVG, so the same
drawing works on a light and a dark page. Legends and captions are HTML, which wraps. A long series
is drawn as its moving median in a band from its lowest to its highest values, a short one as its
points. A figure whose series are missing is None, and the report omits it.

This is the only module that imports matplotlib, and it does so on first use.
"""

import hashlib
import importlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Axis: TypeAlias = Literal["linear", "log"]

MAX_POINTS = 240
_MAX_LABEL = 36
_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
# Placeholders for CSS variables: colours that nothing else in the drawing has.
_STAND_INS = {
    name: f"#0{number}0{number}0{number}"
    for number, name in enumerate(("ink", "muted", "grid", *_COLOURS), start=1)
}
_ACCENT = (0.18, 0.44, 0.87)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve: values by step, including values that are not finite."""

    label: str
    steps: Array
    values: Array


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing and its legend."""

    svg: str
    legend: tuple[tuple[str, str], ...] = ()
    """Pairs of a CSS variable's name and a label."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number with an interval around it."""

    label: str
    value: float
    low: float
    high: float
    is_strong: bool
    """Whether it is drawn in colour."""


@dataclass(frozen=True, kw_only=True)
class Thinned:
    """A series reduced to the resolution of a screen."""

    steps: Array
    median: Array
    low: Array
    high: Array


def thin(steps: Array, values: Array, *, max_points: int = MAX_POINTS) -> Thinned:
    """At most `max_points` bins with their moving median, lowest and highest value.

    The median is used because an average would turn one spike into a plateau.
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if not len(values):
        return Thinned(steps=steps, median=values, low=values, high=values)
    starts = np.unique(np.linspace(0, len(values), max_points, endpoint=False).astype(int))
    ends = np.append(starts[1:], len(values))
    half = len(values) // 60
    windows = zip(np.maximum(starts - half, 0), ends + half, strict=True)
    return Thinned(
        steps=steps[(starts + ends - 1) // 2],
        median=np.array([np.median(values[left:right]) for left, right in windows]),
        low=np.minimum.reduceat(values, starts),
        high=np.maximum.reduceat(values, starts),
    )


def lines(
    series: Sequence[Series],
    *,
    y_label: str,
    x_label: str = "step",
    scale: Axis = "linear",
    is_percent: bool = False,
    is_smoothed: bool = True,
    reference: tuple[str, float] | None = None,
) -> Figure | None:
    """Curves over the steps, with an optional dashed reference line."""
    drawn = [one for one in series if np.isfinite(one.values).any()]
    if not drawn:
        return None
    if not any((one.values > 0).any() for one in drawn):
        scale = "linear"  # a logarithmic axis shows only positive values
    with _canvas() as (figure, axes):
        for colour, one in zip(_cycle(len(drawn)), drawn, strict=True):
            _curve(axes, one, _STAND_INS[colour], is_smoothed=is_smoothed)
        legend = list(zip(_cycle(len(drawn)), (one.label for one in drawn), strict=True))
        if reference is not None:
            axes.axhline(reference[1], color=_STAND_INS["muted"], linewidth=1, dashes=(4, 3))
            legend.append(("muted", f"{reference[0]} {reference[1]:.3g}"))
        _dress(axes, x_label=x_label, y_label=y_label, scale=scale, is_percent=is_percent)
        svg = _to_svg(figure)
    lost = sum(int((~np.isfinite(one.values)).sum()) for one in drawn)
    note = f"{lost} values were not finite; red ticks mark them." if lost else ""
    return Figure(svg=svg, legend=tuple(legend) if len(legend) > 1 else (), note=note)


def depth_lines(series: Sequence[Series], *, y_label: str) -> Figure | None:
    """One curve per layer, fainter for layers near the input; at most a dozen curves."""
    drawn = [one for one in series if (one.values[np.isfinite(one.values)] > 0).any()]
    if not drawn:
        return None
    chosen = np.unique(np.linspace(0, len(drawn) - 1, min(len(drawn), 12)).round().astype(int))
    with _canvas() as (figure, axes):
        for place, index in enumerate(chosen):
            thinned = thin(drawn[index].steps, drawn[index].values)
            alpha = min(1.0, 0.25 + 0.75 * (place + 1) / len(chosen))
            axes.plot(thinned.steps, thinned.median, color=_STAND_INS["c1"], alpha=alpha)
            if place in (0, len(chosen) - 1):
                axes.annotate(
                    drawn[index].label,
                    (thinned.steps[-1], thinned.median[-1]),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    color=_STAND_INS["muted"],
                )
        _dress(axes, y_label=y_label, scale="log")
        svg = _to_svg(figure)
    left_out = len(drawn) - len(chosen)
    note = f"{len(chosen)} of {len(drawn)} layers are drawn." if left_out else ""
    return Figure(svg=svg, note=note)


def heat_map(series: Sequence[Series], *, value_label: str) -> Figure | None:
    """Layers by steps, as one image whose shade is the value."""
    drawn = [one for one in series if np.isfinite(one.values).any()]
    if not drawn:
        return None
    first = min(float(one.steps.min()) for one in drawn)
    last = max(float(one.steps.max()) for one in drawn)
    longest = max(len(one.values) for one in drawn)
    edges = np.linspace(first, last, min(longest, 240) + 1)
    image = np.full((len(drawn), len(edges) - 1), np.nan)
    for row, one in enumerate(drawn):
        finite = np.isfinite(one.values)
        columns = np.clip(np.searchsorted(edges, one.steps[finite], side="right") - 1, 0, None)
        columns = np.minimum(columns, len(edges) - 2)
        counts = np.bincount(columns, minlength=len(edges) - 1)
        sums = np.bincount(columns, weights=one.values[finite], minlength=len(edges) - 1)
        image[row, counts > 0] = sums[counts > 0] / counts[counts > 0]
    colours = importlib.import_module("matplotlib.colors")
    shades = colours.ListedColormap([(*_ACCENT, alpha) for alpha in np.linspace(0.04, 1, 128)])
    with _canvas() as (figure, axes):
        half = max((last - first) / 2 / longest, 0.5)
        shown = axes.imshow(
            image,
            aspect="auto",
            interpolation="none",
            cmap=shades,
            vmin=0.0,
            # A single outlier must not determine the colour scale.
            vmax=max(float(np.nanquantile(image, 0.995)), 1e-9),
            extent=(first - half, last + half, len(drawn) - 0.5, -0.5),
        )
        every = max(1, -(-len(drawn) // 12))
        axes.set_yticks(range(0, len(drawn), every), [one.label for one in drawn[::every]])
        bar = figure.colorbar(shown, ax=axes, pad=0.02, fraction=0.05, extend="max")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.set_label(value_label)
        _dress(axes, y_label="", has_grid=False)
        svg = _to_svg(figure)
    return Figure(svg=svg)


def bars(values: Mapping[str, float], *, highlighted: str) -> Figure | None:
    """Horizontal bars, the longest first, with one of them highlighted."""
    finite = {label: value for label, value in values.items() if np.isfinite(value)}
    if not finite:
        return None
    ordered = sorted(finite.items(), key=lambda item: item[1])
    with _canvas() as (figure, axes):
        for row, (label, value) in enumerate(ordered):
            is_ours = label == highlighted
            axes.barh(
                row,
                value,
                height=0.62,
                color=_STAND_INS["c1" if is_ours else "muted"],
                alpha=1.0 if is_ours else 0.45,
            )
            axes.annotate(
                f"{value:.2f}",
                (value, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                weight="bold" if is_ours else "normal",
            )
        axes.set_yticks(range(len(ordered)), [_fitting(label) for label, _ in ordered])
        axes.tick_params(axis="y", labelsize=10, labelcolor=_STAND_INS["ink"])
        axes.set_xlim(0, 1.14 * ordered[-1][1])
        axes.set_ylim(-0.6, max(len(ordered), 3) - 0.4)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([])
        svg = _to_svg(figure)
    return Figure(svg=svg)


def ranges(values: Sequence[Range], *, x_label: str) -> Figure | None:
    """Intervals below each other, beside a line at 0; those that are not finite are left out."""
    drawn = [one for one in values if np.isfinite([one.low, one.value, one.high]).all()]
    if not drawn:
        return None
    with _canvas(height=max(1.4, 0.7 + 0.3 * len(drawn))) as (figure, axes):
        axes.axvline(0, color=_STAND_INS["muted"], linewidth=1, dashes=(4, 3))
        for row, one in enumerate(reversed(drawn)):
            colour = _STAND_INS["c1" if one.is_strong else "muted"]
            axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2)
            axes.plot([one.value], [row], color=colour, marker="o", markersize=5)
        axes.set_yticks(range(len(drawn)), [_fitting(one.label) for one in reversed(drawn)])
        axes.set_ylim(-0.6, len(drawn) - 0.4)
        axes.set_xlabel(x_label)
        axes.tick_params(axis="y", labelcolor=_STAND_INS["ink"])
        for name, spine in axes.spines.items():
            spine.set_visible(name == "bottom")
        axes.tick_params(length=0)
        svg = _to_svg(figure)
    return Figure(svg=svg)


def _curve(axes: Any, one: Series, colour: str, *, is_smoothed: bool) -> None:
    """A line over the band that it summarises, and ticks where it is not finite."""
    thinned = thin(one.steps, one.values)
    count = int(np.isfinite(one.values).sum())
    if count <= 60 or not is_smoothed:
        finite = np.isfinite(one.values)
        every = max(1, count // MAX_POINTS)
        marker = "o" if count <= 60 else None
        steps, values = one.steps[finite][::every], one.values[finite][::every]
        axes.plot(steps, values, color=colour, marker=marker, markersize=3)
    else:
        if count > MAX_POINTS:
            band = (thinned.steps, thinned.low, thinned.high)
            axes.fill_between(*band, color=colour, alpha=0.2, linewidth=0)
        else:
            axes.plot(thinned.steps, thinned.low, color=colour, alpha=0.4, linewidth=0.7)
        axes.plot(thinned.steps, thinned.median, color=colour)
    lost = one.steps[~np.isfinite(one.values)]
    if not len(lost):
        return
    every = max(1, len(lost) // MAX_POINTS)
    bottom = axes.get_xaxis_transform()
    axes.plot(
        lost[::every],
        np.zeros(len(lost[::every])),
        linestyle="none",
        marker="|",
        markersize=9,
        color=_STAND_INS["c5"],
        transform=bottom,
        clip_on=False,
    )


def _dress(
    axes: Any,
    *,
    y_label: str,
    x_label: str = "step",
    scale: Axis = "linear",
    is_percent: bool = False,
    has_grid: bool = True,
) -> None:
    """Set the axes, grid and number formats that all figures share."""
    ticker = importlib.import_module("matplotlib.ticker")
    axes.set_xlabel(x_label)
    axes.set_ylabel(_fitting(y_label))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: _short(x)))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        low, high = axes.get_ylim()
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if high / low < 30 else (1.0, 3.0)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
    if has_grid:
        axes.grid(axis="y", color=_STAND_INS["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        percent = ticker.FuncFormatter(lambda y, _: f"{100 * y:.3g}%")
        plain = ticker.FuncFormatter(lambda y, _: _short(y))
        axes.yaxis.set_major_formatter(percent if is_percent else plain)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom" and has_grid)
    axes.tick_params(length=0)


def _fitting(label: str) -> str:
    """A label that leaves the figure its place."""
    return label if len(label) <= _MAX_LABEL else label[: _MAX_LABEL - 1] + "\u2026"


def _short(value: float) -> str:
    """1,200 as 1.2k, and so on up to peta."""
    for bound, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:.4g}{suffix}"
    return f"{value:.3g}"


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


@contextmanager
def _canvas(*, height: float = 3.1) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in the report's style; `height` is in inches, of 6.6 in width."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "drawing the report needs the package matplotlib: pip install 'nemotron3[train]'"
        ) from error
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "nemotron3",
        "text.parse_math": False,  # labels are names, in which a dollar is a dollar
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.edgecolor": _STAND_INS["muted"],
        "axes.labelcolor": _STAND_INS["muted"],
        "axes.facecolor": "none",
        "xtick.color": _STAND_INS["muted"],
        "ytick.color": _STAND_INS["muted"],
        "text.color": _STAND_INS["ink"],
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(6.6, height), layout="constrained")
        yield figure, figure.add_subplot()


def _to_svg(figure: Any) -> str:
    """The drawing as inline SVG: without prologue, with unique ids and the page's colours."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with warnings.catch_warnings():
        # A label's glyphs come from the reader's fonts; here they only measure its length.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>f{own}-", svg)
    for name, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg
