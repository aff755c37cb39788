import importlib
import sys

import pytest

from nemotron3.observe.metrics import MetricLog, encode_line, read_metrics
from nemotron3.observe.sinks import JsonlSink, TensorBoardSink


def run(path, steps: range, *, next_step: int) -> None:
    with MetricLog([JsonlSink(path, next_step=next_step)]) as log:
        for step in steps:
            log.log(step, {"train/loss": 1.0 / (step + 1)})


def test_each_line_is_on_its_way_before_the_next_step(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path, next_step=0)
    sink.write(0, {"train/loss": 2.0})
    assert list(read_metrics(path)) == [(0, {"train/loss": 2.0})]
    sink.close()


@pytest.mark.parametrize("killed_at", [5, 7, 12])
@pytest.mark.parametrize("cut", [0, 1, 10])
def test_a_resumed_run_has_the_metrics_of_an_uninterrupted_one(tmp_path, killed_at, cut):
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    run(straight, range(20), next_step=0)
    run(resumed, range(killed_at), next_step=0)
    if cut:
        resumed.write_bytes(resumed.read_bytes()[:-cut])
    run(resumed, range(4, 20), next_step=4)
    assert resumed.read_bytes() == straight.read_bytes()


def test_next_step_zero_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(path, range(5), next_step=0)
    run(path, range(2), next_step=0)
    assert [step for step, _ in read_metrics(path)] == [0, 1]


def test_a_damaged_file_is_not_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = encode_line(0, {}) + "damage\n" + encode_line(2, {})
    path.write_text(text)
    with pytest.raises(ValueError, match=r"line 2 is damaged .*move it away"):
        JsonlSink(path, next_step=2)
    assert path.read_text() == text


@pytest.mark.filterwarnings("ignore")  # tensorboard's imports, not ours
def test_tensorboard_holds_the_scalars_of_a_resumed_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoardSink(tmp_path, next_step=0)
    for step in range(4):
        first.write(step, {"train/loss": float(step)})
    first.close()
    second = TensorBoardSink(tmp_path, next_step=2)
    second.write(2, {"train/loss": 9.0})
    second.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(0, 0.0), (1, 1.0), (2, 9.0)]


@pytest.mark.filterwarnings("ignore")  # tensorboard's imports, not ours
def test_tensorboard_keeps_the_names_of_users_apart(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    names = {"eval/loss/my chats (v2)", "eval/loss/my_chats_(v2)", "reward/mean/a:ß 😀"}
    sink = TensorBoardSink(tmp_path, next_step=0)
    sink.write(1, dict.fromkeys(names, 1.0))
    sink.close()
    found = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(found.Tags()["scalars"]) == names


def test_without_tensorboard_the_install_line_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'nemotron3\[train\]'"):
        TensorBoardSink(tmp_path, next_step=0)


def test_importing_the_sinks_loads_neither_tensorboard_nor_torch(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nemotron3.observe")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    importlib.import_module("nemotron3.observe.sinks")
