"""A run says what it will keep in memory, and is refused where that cannot be."""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.recipes import memory
from nemotron3.recipes.memory import check_memory, needed_bytes, run_plan
from nemotron3.recipes.pretrain import small, tiny
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_pretrain import pretrain
from tests.small_run import small_run, with_leaf, write_text

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Listener(RunCallback):
    def __init__(self):
        self.stages = []

    def stage(self, message):
        self.stages.append(message)


@pytest.fixture
def run(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("NEMOTRON3_CACHE", str(tmp_path / "cache"))
    return small_run(write_text(tmp_path / "text", documents=20), training={"steps": 1})


def test_a_run_says_what_it_keeps(run, tmp_path):
    listener = Listener()
    pretrain(run, runs=tmp_path / "runs", callback=listener)
    (said,) = [message for message in listener.stages if message.startswith("Memory")]
    assert "activations" in said
    assert " of " in said


def test_a_run_that_cannot_fit_is_refused_before_it_begins(run, tmp_path, monkeypatch):
    certain = run_plan(run, CPU).certain
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: certain - 1)
    with pytest.raises(ConfigError) as raised:
        pretrain(run, runs=tmp_path / "runs")
    for part in ("of memory at least", "optimizer moments", "smaller model", "LoRA"):
        assert part in str(raised.value)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: certain)
    pretrain(run, runs=tmp_path / "runs")


def test_on_the_host_upper_bounds_refuse_nothing():
    plan = run_plan(tiny(), CPU)
    assert plan.total > plan.certain == needed_bytes(plan, CPU)
    check_memory(plan, CPU, plan.certain)
    check_memory(plan, CPU, None)


def test_on_a_gpu_activations_count_and_the_remedy_is_a_smaller_microbatch(monkeypatch):
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: 80 * 10**9)
    plan = run_plan(small(), GPU)
    needed = needed_bytes(plan, GPU)
    assert plan.certain < needed < plan.total
    check_memory(plan, GPU, needed)
    with pytest.raises(ConfigError, match=r"cuda has .*activations.*training\.microbatch_size"):
        check_memory(plan, GPU, needed - 1)
    smaller = run_plan(with_leaf(small(), "training.microbatch_size", 2), GPU)
    check_memory(smaller, GPU, needed - 1)
