import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.observe.metrics import (
    MetricLog,
    MetricWindow,
    decode_line,
    encode_line,
    read_metrics,
)
from nemotron3.observe.sinks import JsonlSink


class ListSink:
    def __init__(self):
        self.steps = []
        self.is_closed = False

    def write(self, step, metrics):
        self.steps.append((step, dict(metrics)))

    def close(self):
        self.is_closed = True


def test_every_sink_gets_every_step():
    sinks = [ListSink(), ListSink()]
    with MetricLog(sinks) as log:
        log.log(1, {"train/loss": 2})
        log.log(5, {"train/loss": 1.5, "rl/math/reward": 0.25})
    for sink in sinks:
        assert sink.steps == [
            (1, {"train/loss": 2.0}),
            (5, {"train/loss": 1.5, "rl/math/reward": 0.25}),
        ]
        assert sink.is_closed


@pytest.mark.parametrize("step", [3, 2])
def test_steps_rise(step):
    log = MetricLog([])
    log.log(3, {})
    with pytest.raises(ValueError, match=f"step {step} came after step 3"):
        log.log(step, {})


NAMES = (
    "reward/mean/reasoning_gym:chain_sum",
    "eval/loss/my chats (v2)",
    "eval/loss/großes",
    "eval/loss/数学 😀",
    "reward/mean/a/b",
)
"""Areas with what users call their environments and files."""


@pytest.mark.parametrize("name", NAMES)
def test_users_name_their_files_and_environments(name, tmp_path):
    with MetricLog([JsonlSink(tmp_path / "metrics.jsonl", next_step=0)]) as log:
        log.log(1, {name: 0.5})
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [(1, {name: 0.5})]


@pytest.mark.parametrize(
    "name",
    [
        *("", "loss", "train/", "/loss", "Train/loss", "tr ain/loss", "train/ ", "train//loss"),
        *("train/a\nb", "train/a\0", "train/\ud800", "train/\u202e"),
    ],
)
def test_names_have_an_area_and_printable_parts(name):
    with pytest.raises(ValueError, match="must look like 'train/loss'"):
        MetricLog([]).log(1, {name: 1.0})


def test_the_window_averages_the_last_steps():
    window = MetricWindow(2)
    log = MetricLog([window])
    assert window.averages() == {}
    log.log(1, {"train/loss": 9.0, "eval/loss": 4.0})
    log.log(2, {"train/loss": 3.0})
    assert window.averages() == {"train/loss": 6.0, "eval/loss": 4.0}
    log.log(3, {"train/loss": 1.0})
    assert window.averages() == {"train/loss": 2.0}
    log.log(4, {"train/loss": math.nan})
    assert math.isnan(window.averages()["train/loss"])


@settings(deadline=None)
@given(st.integers(0), st.dictionaries(st.sampled_from(["a/b", "c/d", "e/f"]), st.floats()))
def test_a_line_is_strict_json_and_comes_back_bit_for_bit(step, metrics):
    line = encode_line(step, metrics)
    json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    found_step, found = decode_line(line)
    assert found_step == step
    assert {k: v.hex() for k, v in found.items()} == {
        k: abs(v).hex() if math.isnan(v) else v.hex() for k, v in metrics.items()
    }


def test_a_half_written_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(encode_line(1, {"a/b": 1.0}) + encode_line(2, {"a/b": 2.0})[:-3])
    assert list(read_metrics(path)) == [(1, {"a/b": 1.0})]


@pytest.mark.parametrize("line", ["{", "[]", '{"a/b": 1.0}', '{"step": 1, "a/b": "low"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(encode_line(1, {}) + line + "\n" + encode_line(2, {}))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a step"):
        list(read_metrics(path))
