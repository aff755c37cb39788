"""Writing a directory tensor by tensor: the same files, in any order, with one tensor in memory."""

import weakref

import pytest
import torch

from nemotron3.checkpoint import PlannedWriter, ShardedReader, files
from nemotron3.errors import CheckpointError, StorageError
from tests.checkpoint.test_safetensors import names_in, tensors, write


def plan_of(content):
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in content.items()}


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**9])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_the_files_are_those_of_a_writer_that_holds_shards(tmp_path, max_shard_bytes, is_reversed):
    content = tensors()
    write(tmp_path / "held", content, max_shard_bytes=max_shard_bytes)
    order = list(content)[::-1] if is_reversed else list(content)
    planned = tmp_path / "planned"
    with PlannedWriter(planned, plan_of(content), max_shard_bytes=max_shard_bytes) as writer:
        for name in order:
            writer.add(name, content[name])
    assert names_in(planned) == names_in(tmp_path / "held")
    for name in names_in(planned):
        assert (planned / name).read_bytes() == (tmp_path / "held" / name).read_bytes()


def test_no_more_than_one_tensor_is_held(tmp_path):
    plan = {f"t{n}": torch.empty(100, device="meta") for n in range(5)}
    alive = []
    with PlannedWriter(tmp_path, plan) as writer:
        for name in plan:
            tensor = torch.randn(100)
            assert all(reference() is None for reference in alive)
            alive.append(weakref.ref(tensor))
            writer.add(name, tensor)
            del tensor
    assert len(ShardedReader(tmp_path).names) == 5


def test_an_empty_plan_is_an_empty_model(tmp_path):
    with PlannedWriter(tmp_path, {}):
        pass
    assert ShardedReader(tmp_path).names == ()


def test_what_is_not_planned_is_refused_and_leaves_no_file(tmp_path):
    plan = {"a": torch.empty(2, 3, device="meta"), "b": torch.empty(4, device="meta")}
    for name, tensor, message in (
        ("c", torch.zeros(4), "has none of this name"),
        ("a", torch.zeros(3, 2), r"'a' is \(3, 2\) torch.float32, and the plan .* \(2, 3\)"),
        ("b", torch.zeros(4).half(), r"'b' is \(4,\) torch.float16"),
    ):
        writer = PlannedWriter(tmp_path, plan)
        with pytest.raises(CheckpointError, match=message), writer:
            writer.add(name, tensor)
    writer = PlannedWriter(tmp_path, plan)
    writer.add("a", torch.zeros(2, 3))
    with pytest.raises(CheckpointError, match="'a' was added twice"):
        writer.add("a", torch.zeros(2, 3))
    with pytest.raises(CheckpointError, match="lacks 1 tensors of its plan, first 'b'"):
        writer.finish()
    writer.discard()
    assert names_in(tmp_path) == []


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_computed(tmp_path, monkeypatch):
    def usage(_):
        return files.shutil._ntuple_diskusage(100_000, 0, 100_000)

    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    with pytest.raises(StorageError, match=r"0\.1 MB free and this save needs 4\.1 MB"):
        PlannedWriter(tmp_path, {"a": torch.empty(10**6, device="meta")})
    assert names_in(tmp_path) == []
