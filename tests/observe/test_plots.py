import math
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.observe.plots import (
    MAX_POINTS,
    Range,
    Series,
    bars,
    depth_lines,
    heat_map,
    lines,
    ranges,
    thin,
)

pytest.importorskip("matplotlib")


def series(values, label="loss", first=1) -> Series:
    values = np.asarray(values, dtype=float)
    return Series(
        label=label, steps=np.arange(first, first + len(values), dtype=float), values=values
    )


def wave(count: int) -> np.ndarray:
    return 2 + np.sin(np.arange(count) / 50) + np.random.default_rng(0).normal(size=count) / 10


def assert_is_svg(svg: str) -> None:
    ET.fromstring(svg)
    assert svg.startswith("<svg")
    assert not re.search(r"<script|<metadata|https?://(?!www\.w3\.org)", svg)
    assert not re.search(r"#(0\d)\1\1", svg), "a stand-in colour was left"
    assert "var(--" in svg


@settings(deadline=None)
@given(st.lists(st.floats(-1e9, 1e9) | st.just(math.nan), max_size=2000), st.integers(1, 50))
def test_thinning_keeps_the_extremes_and_the_order(values, max_points):
    one = series(values)
    thinned = thin(one.steps, one.values, max_points=max_points)
    finite = one.values[np.isfinite(one.values)]
    assert len(thinned.steps) <= max_points
    assert (np.diff(thinned.steps) > 0).all()
    assert (thinned.low <= thinned.high).all()
    if len(finite):
        assert thinned.low.min() == finite.min()
        assert thinned.high.max() == finite.max()
        assert finite.min() <= thinned.median.min() <= thinned.median.max() <= finite.max()


def test_a_short_series_is_not_changed_by_thinning():
    values = wave(MAX_POINTS // 5)
    thinned = thin(series(values).steps, values)
    assert np.array_equal(thinned.median, values)
    assert np.array_equal(thinned.steps, np.arange(1, len(values) + 1))


@pytest.mark.parametrize("count", [1, 2, 20, 500, 20_000])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_any_length_is_drawn(count, scale):
    figure = lines(
        [series(wave(count)), series(wave(count) + 1, "mtp")], y_label="nats", scale=scale
    )
    assert_is_svg(figure.svg)
    assert figure.legend == (("c1", "loss"), ("c2", "mtp"))
    assert len(figure.svg) < 200_000


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0] * 100, [1e-30, 1e30], [-1.0, 2.0]])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_awkward_values_are_drawn(values, scale):
    assert_is_svg(lines([series(values)], y_label="nats", scale=scale).svg)
    assert_is_svg(heat_map([series(values)], value_label="v").svg)


def test_values_that_are_not_finite_are_marked():
    figure = lines([series([3.0, math.nan, 2.0, math.inf, 1.0])], y_label="nats", scale="log")
    assert figure.note.startswith("2 values were not finite")
    assert_is_svg(figure.svg)


def test_nothing_to_draw_is_no_figure():
    empty = series([])
    lost = series([math.nan, math.inf])
    for missing in ([], [empty], [lost]):
        assert lines(missing, y_label="nats") is None
        assert heat_map(missing, value_label="v") is None
        assert depth_lines(missing, y_label="norm") is None
    assert bars({}, highlighted="a") is None
    assert bars({"a": math.nan}, highlighted="a") is None


@pytest.mark.parametrize("layers", [1, 6, 108])
@pytest.mark.parametrize("count", [1, 20, 3000])
def test_any_number_of_layers_is_drawn(layers, count):
    if layers == 108 and count == 3000:
        count = 600
    found = [series(wave(count) + i, f"layer {i}") for i in range(layers)]
    assert_is_svg(heat_map(found, value_label="MaxVio").svg)
    figure = depth_lines(found, y_label="norm")
    assert_is_svg(figure.svg)
    assert figure.note == ("12 of 108 layers are drawn." if layers == 108 else "")


def test_series_of_different_steps_share_a_heat_map():
    found = [series([1.0, 2.0], "a", first=1), series([3.0] * 40, "b", first=100)]
    assert_is_svg(heat_map(found, value_label="MaxVio").svg)


def test_bars_and_references():
    assert_is_svg(bars({"unigram": 4.6, "gzip": 3.0, "ours": 1.8}, highlighted="ours").svg)
    figure = lines([series(wave(20))], y_label="bits", reference=("gzip", 3.0))
    assert figure.legend[-1] == ("muted", "gzip 3")


def test_drawings_on_one_page_do_not_share_ids():
    svgs = [lines([series(wave(n))], y_label="nats").svg for n in (20, 21)]
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in svgs]
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]
    for svg, own in zip(svgs, ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= own


def test_drawing_is_deterministic():
    assert lines([series(wave(90))], y_label="a") == lines([series(wave(90))], y_label="a")


def test_without_matplotlib_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'nemotron3\[train\]'"):
        lines([series([1.0])], y_label="nats")


def test_ranges_are_drawn_where_they_are_finite():
    one = Range(label="<a>", value=0.1, low=-0.1, high=0.3, is_strong=True)
    endless = Range(label="b", value=0.0, low=-math.inf, high=math.inf, is_strong=False)
    figure = ranges([one, endless], x_label="difference")
    assert_is_svg(figure.svg)
    assert "&lt;a&gt;" in figure.svg
    assert ">b<" not in figure.svg
    assert ranges([endless], x_label="difference") is None


@pytest.mark.parametrize(
    "name", [r"costs $5 or $\frac{", "<b>&'\"", "数学 ß 😀", "x" * 300, "a:b c"]
)
def test_labels_are_what_users_name_their_files(name):
    one = Range(label=name, value=0.1, low=-0.2, high=0.3, is_strong=True)
    drawn = [
        ranges([one], x_label="difference"),
        bars({name: 1.0}, highlighted=name),
        lines([series([1.0, 2.0], label=name)], y_label=name),
        heat_map([series([1.0, 2.0], label=name[:20])], value_label="share"),
        depth_lines([series([1.0, 2.0], label=name[:20])], y_label="norm"),
    ]
    for figure in drawn:
        assert figure is not None
        assert_is_svg(figure.svg)
    shown = name if len(name) <= 36 else name[:35]
    assert any(shown in (text or "") for text in ET.fromstring(drawn[0].svg).itertext())
