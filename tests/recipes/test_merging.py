"""A merge of a run's checkpoints: the weighted mean, as a model that works by itself."""

import pytest
import torch

from nemotron3.checkpoint.merging import merge_weights
from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.errors import ConfigError
from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.merging import merge_run
from nemotron3.recipes.run_pretrain import pretrain
from nemotron3.training.trainer import model_weights
from tests.small_run import StopAt, StoppedError, small_run, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that was stopped after four checkpoints; merging is for runs that still go on."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("merging")
    run = small_run(
        write_text(folder / "text", documents=20),
        training={"steps": 9, "checkpoint_every_steps": 2},
        retention=RetentionConfig(keep_last=1, keep_every_steps=2),
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("NEMOTRON3_CACHE", str(folder / "cache"))
        with pytest.raises(StoppedError):
            pretrain(run, runs=folder, callback=StopAt(8))
    return folder / "small"


@pytest.mark.parametrize("kind", ["minus_sqrt", "linear", "uniform"])
def test_the_weighted_mean_of_all_kept_checkpoints(folder, tmp_path, kind):
    assert merge_run(folder, tmp_path, window_steps=None, kind=kind) == [2, 4, 6, 8]
    store = CheckpointStore(folder / "checkpoints")
    weights = merge_weights(kind, 4)
    parts = [model_weights(store.load(step)) for step in (2, 4, 6, 8)]
    for name, tensor in LanguageModel.from_pretrained(tmp_path).state_dict().items():
        wanted = sum(w * part[name].double() for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)


def test_a_window_takes_the_last(folder, tmp_path):
    assert merge_run(folder, tmp_path, window_steps=3, kind="uniform") == [6, 8]


def test_the_merge_of_an_unfinished_run_writes_text(folder, tmp_path):
    merge_run(folder, tmp_path, window_steps=None, kind="minus_sqrt")
    (output,) = LLM(tmp_path).generate("the old", SamplingParams(max_tokens=5))
    assert len(output.outputs[0].token_ids) > 0


@pytest.mark.parametrize("window", [0, 1])
def test_one_checkpoint_is_no_merge(folder, tmp_path, window):
    with pytest.raises(ConfigError, match=r"steps \[8\]; a merge needs two.*keep-every-steps"):
        merge_run(folder, tmp_path, window_steps=window, kind="uniform")


def test_checkpoints_at_uneven_distances_are_refused(folder, tmp_path):
    other = CheckpointStore(folder / "checkpoints")
    checkpoint = other.load(8)
    uneven = CheckpointStore(
        tmp_path / "run" / "checkpoints", retention=RetentionConfig(keep_last=9)
    )
    for step in (1, 2, 9):
        uneven.save(step, tensors=checkpoint.tensors, state={})
    (tmp_path / "run" / "run.json").write_bytes((folder / "run.json").read_bytes())
    with pytest.raises(ConfigError, match=r"\[1, 2, 9\]; a merge needs two or more at equal"):
        merge_run(tmp_path / "run", tmp_path / "out", window_steps=None, kind="uniform")


@pytest.mark.parametrize("window", [None, 4])
def test_a_run_without_checkpoints_is_refused(folder, tmp_path, window):
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    with pytest.raises(ConfigError, match=r"steps \[\]; a merge needs two"):
        merge_run(tmp_path, tmp_path / "out", window_steps=window, kind="uniform")
