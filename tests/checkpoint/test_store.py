import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.errors import CheckpointError, StorageError

KEEP_ALL = RetentionConfig(keep_last=100)


def names_in(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, tensors={"w": torch.full((50,), float(step))}, state={"step": step})


def assert_holds(store: CheckpointStore, step: int) -> None:
    checkpoint = store.load()
    assert checkpoint.step == step
    assert checkpoint.state == {"step": step}
    assert torch.equal(checkpoint.tensors["w"], torch.full((50,), float(step)))


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)


def test_tensors_and_state_come_back_exactly(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "column": base[:, 1],
        "transposed": base.t(),
        "tied": base,
        "half": torch.tensor([1.0, float("nan"), float("inf")]).bfloat16(),
        "count": torch.tensor(2**62 + 1),
        "mask": torch.tensor([[True], [False]]),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0),
    }
    state = {"tokens": 2**60 + 1, "lr": 0.1 + 0.2, "name": "é", "nested": {"a": [1, None, True]}}
    store = CheckpointStore(tmp_path)
    store.save(7, tensors=tensors, state=state)
    checkpoint = store.load()
    assert (checkpoint.step, checkpoint.state) == (7, state)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = checkpoint.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        pair = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, tensor)]
        assert torch.equal(*pair)
    assert names_in(tmp_path) == ["step-00000007"]


def test_an_empty_store_has_no_latest(tmp_path):
    store = CheckpointStore(tmp_path / "new")
    assert store.latest() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        store.load()


def test_a_step_is_loaded_by_number(tmp_path):
    store = CheckpointStore(tmp_path, retention=KEEP_ALL)
    for step in (1, 2, 3):
        save(store, step)
    assert store.steps() == [1, 2, 3]
    assert store.latest() == 3
    assert store.load(2).state == {"step": 2}
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; it has \[1, 2, 3\]"):
        store.load(9)


def test_old_checkpoints_are_deleted(tmp_path):
    store = CheckpointStore(tmp_path, retention=RetentionConfig(keep_last=2, keep_every_steps=4))
    for step in range(1, 10):
        save(store, step)
    assert store.steps() == [4, 8, 9]
    assert names_in(tmp_path) == ["step-00000004", "step-00000008", "step-00000009"]


def test_the_same_step_twice_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with pytest.raises(CheckpointError, match="already saved"):
        save(store, 1)
    assert_holds(store, 1)


def test_two_processes_saving_one_step_leave_one_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    rename = os.rename

    def other_process_first(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr("os.rename", other_process_first)
    with pytest.raises(CheckpointError, match="being saved by another process"):
        save(store, 1)
    monkeypatch.undo()
    assert names_in(tmp_path) == ["step-00000001"]
    assert_holds(store, 1)


def test_two_threads_saving_one_step_leave_one_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    barrier = threading.Barrier(4)
    outcomes = []

    def run():
        barrier.wait()
        try:
            save(store, 1)
        except CheckpointError:
            outcomes.append("refused")
        else:
            outcomes.append("saved")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 3 + ["saved"]
    assert_holds(store, 1)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_a_damaged_checkpoint_costs_one_checkpoint(tmp_path, caplog, name, damage):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    path = tmp_path / "step-00000002" / name
    match damage:
        case "flip":
            flip_bit(path, path.read_bytes().index(b"2") if name == "manifest.json" else -3)
        case "truncate":
            path.write_bytes(path.read_bytes()[:-5])
        case "remove":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert_holds(store, 1)
    assert "step-00000002" in caplog.text
    assert "trying the checkpoint before it" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000002"):
        store.load(2)


def test_every_bit_of_the_tensors_counts(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = tmp_path / "step-00000001" / "tensors.safetensors"
    whole = path.read_bytes()
    for position in range(0, len(whole), 17):
        flip_bit(path, position)
        with pytest.raises(CheckpointError, match="is corrupted"):
            store.load(1)
        path.write_bytes(whole)
    assert_holds(store, 1)


def test_all_damaged_is_an_error_that_names_each(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        save(store, step)
        flip_bit(tmp_path / f"step-0000000{step}" / "state.json", 3)
    with pytest.raises(CheckpointError, match=r"every checkpoint.*step-00000002.*step-00000001"):
        store.load()


def test_a_damaged_checkpoint_is_set_aside_when_its_step_is_saved_again(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    flip_bit(tmp_path / "step-00000002" / "tensors.safetensors", -1)
    assert store.load().step == 1
    save(store, 2)
    assert_holds(store, 2)
    assert names_in(tmp_path) == ["step-00000001", "step-00000002", "step-00000002.damaged"]


def test_a_damaged_checkpoint_does_not_push_a_sound_one_out(tmp_path):
    store = CheckpointStore(tmp_path, retention=RetentionConfig(keep_last=2))
    save(store, 10)
    save(store, 20)
    flip_bit(tmp_path / "step-00000020" / "tensors.safetensors", -1)
    assert store.load().step == 10
    save(store, 15)
    assert store.steps() == [10, 15, 20]


def test_leftovers_are_removed_on_start(tmp_path):
    save(CheckpointStore(tmp_path), 1)
    for name in ("step-00000002.tmp-999999999", "step-00000000.trash-1"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    living = tmp_path / f"step-00000003.tmp-{os.getppid()}"
    living.mkdir()
    assert_holds(CheckpointStore(tmp_path), 1)
    assert names_in(tmp_path) == ["step-00000001", living.name]


def test_a_state_that_is_not_json_leaves_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(1, tensors={}, state={"weight": torch.ones(1)})
    assert names_in(tmp_path) == []


def test_a_disk_without_room_is_refused_up_front(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"0\.0 MB free and this save needs 0\.1 MB"):
        save(store, 2)
    assert names_in(tmp_path) == ["step-00000001"]


def test_a_disk_that_fills_up_leaves_the_old_checkpoints(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, retention=RetentionConfig(keep_last=1))
    save(store, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="keep fewer checkpoints"):
        save(store, 2)
    monkeypatch.undo()
    assert names_in(tmp_path) == ["step-00000001"]
    assert_holds(store, 1)


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        store = CheckpointStore(disk)
        save(store, 1)
        with pytest.raises(StorageError, match="MB free and this save needs"):
            store.save(2, tensors={"w": torch.ones(60_000)}, state={})
        assert names_in(disk) == ["step-00000001"]
        assert_holds(store, 1)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# One interpreter forks a child per kill, since importing torch costs more than the kills.
# Children die at the n-th file operation that Python audits (open, mkdir, rename, remove), or in
# the middle of a write, or at a random moment; the parent then opens the store and checks it.
KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.checkpoint.store import CheckpointStore

SIZE = 20_000

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def save(store, step):
    tensors = {"w": torch.full((SIZE,), float(step)), "n": torch.tensor(step)}
    store.save(step, tensors=tensors, state={"step": step})

def in_child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid

def check(directory, completed):
    store = CheckpointStore(directory, retention=RetentionConfig(keep_last=2))
    checkpoint = store.load()
    assert checkpoint.step in (completed, completed + 1), (checkpoint.step, completed)
    assert checkpoint.step == store.latest()
    assert checkpoint.state == {"step": checkpoint.step}
    assert torch.equal(checkpoint.tensors["w"], torch.full((SIZE,), float(checkpoint.step)))
    leftovers = [p.name for p in Path(directory).iterdir() if "." in p.name]
    assert not leftovers, leftovers
    save(store, checkpoint.step + 1)
    assert store.load().step == checkpoint.step + 1
    return checkpoint.step

def at_operation(directory, number):
    CheckpointStore(directory, retention=RetentionConfig(keep_last=2))
    def work():
        store = CheckpointStore(directory, retention=RetentionConfig(keep_last=2))
        seen = 0
        def audit(event, arguments):
            nonlocal seen
            if event == "open" or event.startswith(("os.", "shutil.")):
                seen += 1
                if seen == number:
                    die()
        sys.addaudithook(audit)
        save(store, 4)
    return os.waitpid(in_child(work), 0)[1]

def in_a_write(directory, file_number):
    def work():
        from nemotron3.checkpoint import files
        fsync, seen = os.fsync, 0
        def cut(descriptor):
            nonlocal seen
            seen += 1
            if seen == file_number:
                if os.fstat(descriptor).st_size > 10:
                    try:
                        os.ftruncate(descriptor, 10)
                    except OSError:
                        pass  # a directory, or a descriptor for reading
                die()
            fsync(descriptor)
        os.fsync = cut
        save(CheckpointStore(directory, retention=RetentionConfig(keep_last=2)), 4)
    return os.waitpid(in_child(work), 0)[1]

def at_random(directory, delay):
    progress = Path(directory).with_suffix(".progress")
    progress.write_text("3")
    def saves():
        return int(progress.read_text() or 3)
    def work():
        store = CheckpointStore(directory, retention=RetentionConfig(keep_last=2))
        step = 3
        while True:
            step += 1
            save(store, step)
            progress.write_text(str(step))
    pid = in_child(work)
    # However busy the machine is, the child has saved once when the delay begins.
    while saves() == 3:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    # The child may die between emptying and filling the note; the store is then the only witness.
    return int(progress.read_text() or CheckpointStore(directory).latest())

def fresh(root, name):
    directory = Path(root) / name
    store = CheckpointStore(directory, retention=RetentionConfig(keep_last=2))
    for step in (2, 3):
        save(store, step)
    return directory

root = sys.argv[1]
outcomes = {"operation": [], "write": [], "random": []}
number = 1
while True:
    directory = fresh(root, f"operation-{number}")
    status = at_operation(directory, number)
    outcomes["operation"].append(check(directory, 3))
    if status == 0:
        break
    number += 1
for file_number in range(1, 6):
    directory = fresh(root, f"write-{file_number}")
    assert os.WIFSIGNALED(in_a_write(directory, file_number))
    outcomes["write"].append(check(directory, 3))
generator = random.Random(0)
for i in range(12):
    directory = fresh(root, f"random-{i}")
    completed = at_random(directory, generator.uniform(0.001, 0.06))
    outcomes["random"].append(check(directory, completed))
print(json.dumps(outcomes))
"""


def test_a_kill_at_any_moment_leaves_a_sound_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    # Killed at every file operation: at first the old checkpoint remains, in the end the new one.
    assert len(outcomes["operation"]) > 10
    assert outcomes["operation"] == sorted(outcomes["operation"])
    assert set(outcomes["operation"]) == {3, 4}
    assert outcomes["write"] == [3, 3, 3, 3, 4]  # three files and two directories are synced
    assert min(outcomes["random"]) > 3
