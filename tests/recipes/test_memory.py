"""A run says what it will keep in memory, and is refused where that cannot be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.recipes import memory
from nemotron3.recipes.memory import bytes_for_keys, check_memory, needed_bytes, run_plan
from nemotron3.recipes.own_environments import own_environments
from nemotron3.recipes.pretrain import small, tiny
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_pretrain import pretrain
from nemotron3.recipes.run_rl import rl
from nemotron3.rl.policy_objective import PolicyLossConfig
from nemotron3.rl.sampling_plan import EnvironmentConfig
from nemotron3.runtime.memory import plan_of
from tests.rl.playground import save_policy
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
    for part in ("of memory at least", "optimizer moments", "smaller model"):
        assert part in str(raised.value)
    assert "LoRA" not in str(raised.value)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: certain)
    pretrain(run, runs=tmp_path / "runs")


def test_on_the_host_upper_bounds_refuse_nothing():
    plan = run_plan(tiny(), CPU)
    assert plan.total > plan.certain == needed_bytes(plan, CPU)
    check_memory(plan, CPU, plan.certain, may_adapt=False)
    check_memory(plan, CPU, None, may_adapt=False)


def test_on_a_gpu_activations_count_and_the_remedy_is_a_smaller_microbatch(monkeypatch):
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: 80 * 10**9)
    plan = run_plan(small(), GPU)
    needed = needed_bytes(plan, GPU)
    assert plan.certain < needed < plan.total
    check_memory(plan, GPU, needed, may_adapt=False)
    with pytest.raises(ConfigError, match=r"cuda has .*activations.*training\.microbatch_size"):
        check_memory(plan, GPU, needed - 1, may_adapt=False)
    smaller = run_plan(with_leaf(small(), "training.microbatch_size", 2), GPU)
    check_memory(smaller, GPU, needed - 1, may_adapt=False)


@pytest.fixture
def rewarded(tmp_path):
    """A run of reinforcement learning."""
    policy = save_policy(tmp_path / "policy")
    return own_environments(policy, [EnvironmentConfig(name="math")], max_context=96)


def test_an_adapter_is_a_remedy_where_one_can_be_trained(rewarded, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: 10**5)
    with pytest.raises(ConfigError, match=r"train an adapter \(LoRA\) instead of all parameters"):
        rl(replace(rewarded, device="cpu"), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_rewards_need_an_engine_and_a_kl_a_second_model(rewarded):
    plan = {part.name: part.num_bytes for part in run_plan(rewarded, CPU).parts}
    assert {"engine states", "engine keys and values", "engine prefix cache"} <= plan.keys()
    assert "reference model" not in plan
    held = replace(rewarded, loss=PolicyLossConfig(kl=0.1))
    (weights,) = Path(rewarded.model).glob("*.safetensors")
    found = {part.name: part.num_bytes for part in run_plan(held, CPU).parts}
    assert found["reference model"] == pytest.approx(weights.stat().st_size, rel=0.05)
    assert found | {"reference model": 0} == plan | {"reference model": 0}


def test_what_an_engine_can_do_without_is_no_reason_to_refuse(rewarded, monkeypatch):
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: 10**12)
    plan = run_plan(rewarded, GPU)
    assert plan.elastic > 10**9  # the prefix cache, and keys and values
    without = plan_of(part for part in plan.parts if not part.is_elastic)
    assert needed_bytes(plan, GPU) == needed_bytes(without, GPU)


def test_an_engine_on_a_gpu_leaves_room_for_the_trainer(rewarded, monkeypatch):
    crowded = replace(rewarded, max_num_seqs=200_000)

    def keys_of(gpu_bytes):
        monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: gpu_bytes)
        return bytes_for_keys(crowded, GPU), run_plan(crowded, GPU)

    assert bytes_for_keys(rewarded, CPU) is None
    wanted, plan = keys_of(10**12)
    (found,) = (p.num_bytes for p in plan.parts if p.name == "engine keys and values")
    assert wanted == found
    gpu_bytes = int((plan.total - wanted / 2) / 0.9)
    given, plan = keys_of(gpu_bytes)
    assert 0 < given < wanted
    assert plan.total - wanted + given <= gpu_bytes
    assert keys_of(10**6)[0] == 50_000
