import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.checkpoint.merging import merge_checkpoints, merge_weights
from nemotron3.checkpoint.safetensors import ShardedReader, ShardedWriter
from nemotron3.errors import CheckpointError, ConfigError

KINDS = ["minus_sqrt", "linear", "uniform"]


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 200))
def test_weights_are_an_average(kind, count):
    weights = merge_weights(kind, count)
    assert len(weights) == count
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    assert min(weights) > 0


def test_weights_by_hand():
    # Two intervals of linear decay have mean rates 3/4 and 1/4.
    assert merge_weights("linear", 3) == pytest.approx([1 / 4, 1 / 2, 1 / 4])
    # One interval of 1 - sqrt(r) has the mean 1/3.
    assert merge_weights("minus_sqrt", 2) == pytest.approx([2 / 3, 1 / 3])
    assert merge_weights("uniform", 4) == [0.25] * 4


@pytest.mark.parametrize("kind", ["minus_sqrt", "linear"])
def test_merging_emulates_the_decay(kind):
    """Weights that move evenly within an interval end where a decayed run would."""
    decay = {"minus_sqrt": lambda r: 1 - r**0.5, "linear": lambda r: 1 - r}[kind]
    steps, intervals = 20_000, 5
    gradients = torch.tensor([3.0, -1.0, 2.0, 0.5, -4.0], dtype=torch.float64)
    gradient = gradients.repeat_interleave(steps // intervals)
    constant = torch.cat([torch.zeros(1), gradient.cumsum(0)])[:: steps // intervals]
    rates = torch.tensor([decay((t + 0.5) / steps) for t in range(steps)], dtype=torch.float64)
    merged = sum(c * x for c, x in zip(merge_weights(kind, intervals + 1), constant, strict=True))
    assert merged / steps == pytest.approx(float((rates * gradient).sum()) / steps, abs=1e-6)


def test_bad_merges_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="0 checkpoints is empty"):
        merge_weights("linear", 0)
    with pytest.raises(ConfigError, match="'cubic'"):
        merge_weights("cubic", 3)
    write(tmp_path / "a", {"w": torch.ones(1)})
    with pytest.raises(ConfigError, match="is one of the sources"):
        merge_checkpoints([tmp_path / "a"], tmp_path / "a")


def write(directory, tensors, **options):
    with ShardedWriter(directory, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def test_a_merge_is_the_weighted_average(tmp_path):
    generator = torch.Generator().manual_seed(0)
    models = [
        {
            "weight": torch.randn(4, 3, generator=generator),
            "half": torch.randn(5, generator=generator).bfloat16(),
            "steps": torch.tensor(7),
        }
        for _ in range(3)
    ]
    for i, model in enumerate(models):
        write(tmp_path / str(i), model, max_shard_bytes=10 if i == 1 else 10**9)
    (tmp_path / "2" / "config.json").write_text("{}")
    merge_checkpoints([tmp_path / str(i) for i in range(3)], tmp_path / "merged", kind="linear")

    merged = ShardedReader(tmp_path / "merged")
    for name in ("weight", "half"):
        wanted = sum(
            c * model[name].double() for c, model in zip([0.25, 0.5, 0.25], models, strict=True)
        )
        assert torch.equal(merged.load(name), wanted.to(models[0][name].dtype))
    assert merged.load("steps") == 7
    assert (tmp_path / "merged" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": torch.ones(2), "extra": torch.ones(1)}, "1 differ, first 'extra'"),
        ({"v": torch.ones(2)}, "2 differ, first 'v'"),
        ({"w": torch.ones(3)}, r"'w' is torch\.float32 \[3\].*torch\.float32 \[2\]"),
        ({"w": torch.ones(2).half()}, r"'w' is torch\.float16 \[2\]"),
    ],
)
def test_models_that_differ_are_refused(tmp_path, other, message):
    write(tmp_path / "a", other)
    write(tmp_path / "b", {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_integers_that_differ_have_no_average(tmp_path):
    write(tmp_path / "a", {"n": torch.tensor(1)})
    write(tmp_path / "b", {"n": torch.tensor(2)})
    with pytest.raises(CheckpointError, match=r"'n' is torch\.int64 and differs"):
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
