import errno
import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron3.checkpoint import files
from nemotron3.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, ShardedReader, ShardedWriter
from nemotron3.errors import CheckpointError, StorageError


def tensors() -> dict[str, torch.Tensor]:
    """Every awkward kind at once."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    return {
        "flag": torch.tensor([True, False, True]),
        "weight": base,
        "transposed": base.t(),
        "row": base[2],
        "tied": base,
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "count": torch.tensor(2**62 + 1),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "byte": torch.arange(7, dtype=torch.uint8),
        "eighth": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
        "broadcast": torch.ones(1, 3).expand(4, 3),
        "double": torch.randn(3, generator=generator, dtype=torch.float64),
    }


def write(directory, content, **options):
    with ShardedWriter(directory, **options) as writer:
        for name, tensor in content.items():
            writer.add(name, tensor)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted)]
    assert torch.equal(*as_bytes)


def names_in(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**9])
def test_what_is_written_is_read_bit_for_bit(tmp_path, max_shard_bytes):
    wanted = tensors()
    write(tmp_path, wanted, max_shard_bytes=max_shard_bytes)
    reader = ShardedReader(tmp_path)
    assert set(reader.names) == set(wanted)
    assert reader.total_bytes == sum(tensor.nbytes for tensor in wanted.values())
    for name, tensor in wanted.items():
        assert (reader.info(name).shape, reader.info(name).dtype) == (tensor.shape, tensor.dtype)
        assert_same(reader.load(name), tensor)
    streamed = dict(reader.tensors())
    assert set(streamed) == set(wanted)
    for name, tensor in streamed.items():
        assert_same(tensor, wanted[name])


def test_one_shard_is_a_single_file_without_index(tmp_path):
    write(tmp_path, tensors())
    assert names_in(tmp_path) == [SINGLE_FILE]


def test_the_layout_is_the_published_one(tmp_path):
    wanted = {name: torch.full((10,), float(i)) for i, name in enumerate("abcde")}
    write(tmp_path, wanted, max_shard_bytes=80)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names_in(tmp_path) == [*shards, INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"] == dict(
        zip("abcde", [shards[i] for i in (0, 0, 1, 1, 2)], strict=True)
    )
    for shard in shards:
        found = load_file(tmp_path / shard)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    header = (tmp_path / shards[0]).read_bytes()[8:]
    assert b'"__metadata__":{"format":"pt"}' in header


def test_files_of_the_safetensors_library_are_read(tmp_path):
    save_file({"a": torch.arange(5), "b": torch.ones(2).bfloat16()}, tmp_path / SINGLE_FILE)
    reader = ShardedReader(tmp_path)
    assert torch.equal(reader.load("a"), torch.arange(5))
    assert "b" in reader
    assert "c" not in reader


def test_loaded_tensors_belong_to_the_caller(tmp_path):
    write(tmp_path, {"a": torch.zeros(3)})
    reader = ShardedReader(tmp_path)
    tensor = reader.load("a")
    tensor += 1
    shutil.rmtree(tmp_path)
    assert torch.equal(tensor, torch.ones(3))


@pytest.mark.parametrize(("before", "after"), [(40, 10**9), (10**9, 40), (40, 80), (40, 40)])
def test_a_model_is_replaced_as_a_whole(tmp_path, before, after):
    write(tmp_path, {name: torch.zeros(10) for name in "abcd"}, max_shard_bytes=before)
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, {name: torch.ones(10) for name in "bcde"}, max_shard_bytes=after)
    reader = ShardedReader(tmp_path)
    assert set(reader.names) == set("bcde")
    assert all(torch.equal(tensor, torch.ones(10)) for _, tensor in reader.tensors())
    shards = {reader.info(name).file.name for name in "bcde"}
    assert set(names_in(tmp_path)) - {INDEX_FILE} == {*shards, "config.json"}


def test_an_interrupted_replacement_is_refused_not_mixed(tmp_path, monkeypatch):
    write(tmp_path, {name: torch.zeros(10) for name in "ab"}, max_shard_bytes=40)
    replace = files.os.replace
    calls = []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, {name: torch.ones(10) for name in "ab"}, max_shard_bytes=40)
    with pytest.raises(CheckpointError, match=f"neither {SINGLE_FILE} nor {INDEX_FILE}"):
        ShardedReader(tmp_path)
    assert not [name for name in names_in(tmp_path) if "tmp" in name]


def write_half(directory):
    with ShardedWriter(directory, max_shard_bytes=4) as writer:
        writer.add("a", torch.ones(2))
        writer.add("b", torch.ones(2))
        raise RuntimeError("midway")


def test_an_error_in_the_block_leaves_the_old_model(tmp_path):
    write(tmp_path, {"a": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="midway"):
        write_half(tmp_path)
    assert names_in(tmp_path) == [SINGLE_FILE]
    assert torch.equal(ShardedReader(tmp_path).load("a"), torch.zeros(2))


def sharded(directory):
    write(directory, {name: torch.ones(10) for name in "abcd"}, max_shard_bytes=80)
    return directory


def edit_index(directory, edit) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(index))


FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_a_truncated_shard_is_named(tmp_path, cut):
    shard = sharded(tmp_path) / SECOND
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=f"{SECOND} cannot be read.*truncated"):
        ShardedReader(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND} is missing"):
        ShardedReader(tmp_path)


def test_a_tensor_that_the_shard_lacks_is_named(tmp_path):
    edit_index(sharded(tmp_path), lambda index: index.update(lost=SECOND))
    with pytest.raises(CheckpointError, match=f"{SECOND} lacks tensor 'lost'"):
        ShardedReader(tmp_path)


def test_a_tensor_that_the_index_does_not_name_is_named(tmp_path):
    edit_index(sharded(tmp_path), lambda index: index.pop("b"))
    with pytest.raises(CheckpointError, match=f"{FIRST} holds tensor 'b'.*does not name"):
        ShardedReader(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    save_file({name: torch.ones(10) for name in "bcd"}, sharded(tmp_path) / SECOND)
    with pytest.raises(CheckpointError, match=f"{SECOND} holds tensor 'b'.*places in {FIRST}"):
        ShardedReader(tmp_path)


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path):
    text = f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'
    (sharded(tmp_path) / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="'a' stands twice"):
        ShardedReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_is_named(tmp_path, text):
    (sharded(tmp_path) / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        ShardedReader(tmp_path)


def test_an_index_may_not_point_outside_its_directory(tmp_path):
    edit_index(sharded(tmp_path), lambda index: index.update(a=f"../{FIRST}"))
    with pytest.raises(CheckpointError, match="its own directory"):
        ShardedReader(tmp_path)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no tensor 'z'"):
        ShardedReader(sharded(tmp_path)).load("z")


def test_adding_a_name_twice_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'a' was added twice"):
        write_twice(tmp_path)
    assert names_in(tmp_path) == []


def write_twice(directory):
    with ShardedWriter(directory) as writer:
        writer.add("a", torch.ones(1))
        writer.add("a", torch.ones(1))


def test_a_dtype_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tensor 'a' is torch\.complex64"):
        write(tmp_path, {"a": torch.ones(1, dtype=torch.complex64)})
    assert names_in(tmp_path) == []


def test_too_little_space_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(StorageError, match=r"MB free and this save needs 1,000,000,000,000\.\d MB"):
        ShardedWriter(tmp_path / "model", total_bytes=10**18)
    assert names_in(tmp_path / "model") == []


def test_a_disk_that_fills_up_leaves_nothing_under_final_names(tmp_path, monkeypatch):
    write(tmp_path, {"a": torch.zeros(2)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="MB free and this save needs"):
        write(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, max_shard_bytes=8)
    assert names_in(tmp_path) == [SINGLE_FILE]
    assert torch.equal(ShardedReader(tmp_path).load("a"), torch.zeros(2))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(small_disk):
    write(small_disk / "old", {"a": torch.zeros(1000)})
    with pytest.raises(StorageError, match="free some space"):
        write(small_disk / "new", {n: torch.ones(100_000) for n in "abc"}, max_shard_bytes=400_000)
    assert names_in(small_disk / "new") == []
    assert torch.equal(ShardedReader(small_disk / "old").load("a"), torch.zeros(1000))
