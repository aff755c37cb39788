"""A run says what it will keep in memory, and is refused where that cannot be."""

import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from nemotron3.data.conversations import ConversationsConfig
from nemotron3.errors import ConfigError
from nemotron3.models.config import ModelConfig
from nemotron3.models.huggingface import nemotron_h
from nemotron3.models.lora import LoRAConfig
from nemotron3.recipes import memory
from nemotron3.recipes.memory import (
    announce_memory,
    bytes_for_keys,
    check_memory,
    needed_bytes,
    run_plan,
)
from nemotron3.recipes.own_environments import own_environments
from nemotron3.recipes.pretrain import small, tiny
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_pretrain import pretrain
from nemotron3.recipes.run_rl import rl
from nemotron3.recipes.sft import SFTRun, tiny_sft
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
    for part in ("of memory at least", "optimizer moments", "smaller model, or a device"):
        assert part in str(raised.value)
    assert "lora" not in str(raised.value)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: certain)
    pretrain(run, runs=tmp_path / "runs")


def test_on_the_host_upper_bounds_refuse_nothing():
    plan = run_plan(tiny(), CPU)
    assert plan.total > plan.certain == needed_bytes(plan, CPU)
    check_memory(plan, CPU, plan.certain, remedy=lambda: None)
    check_memory(plan, CPU, None, remedy=lambda: None)


def refusal(run, gpu_bytes, monkeypatch):
    """What a run is told on a GPU of so much memory."""
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: gpu_bytes)
    with pytest.raises(ConfigError) as raised:
        announce_memory(run, GPU, Listener())
    return str(raised.value)


def test_on_a_gpu_activations_count_and_the_remedy_keeps_fewer(monkeypatch):
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: 80 * 10**9)
    run = small()
    plan = run_plan(run, GPU)
    needed = needed_bytes(plan, GPU)
    assert plan.certain < needed < plan.total
    check_memory(plan, GPU, needed, remedy=lambda: None)
    said = refusal(run, int(0.7 * needed), monkeypatch)
    assert "activations" in said
    assert said.partition("it would fit with ")[2].startswith("training.recompute true (")
    narrow = with_leaf(run, "training.recompute", True)
    announce_memory(narrow, GPU, Listener())
    said = refusal(narrow, run_plan(narrow, GPU).certain, monkeypatch)
    assert "training.microbatch_size 1" in said


@pytest.fixture
def rewarded(tmp_path):
    """A run of reinforcement learning."""
    policy = save_policy(tmp_path / "policy")
    return own_environments(policy, [EnvironmentConfig(name="math")], max_context=96)


def test_an_adapter_is_a_remedy_where_one_can_be_trained(rewarded, tmp_path, monkeypatch):
    certain = run_plan(rewarded, CPU).certain
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: certain - 1)
    with pytest.raises(ConfigError, match=r"it would fit with .*lora.rank"):
        rl(replace(rewarded, device="cpu"), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


NANO_ADAPTER = LoRAConfig(rank=16)


@pytest.fixture
def nano(tmp_path):
    """The configuration of nano without its weights, which is all that a plan reads."""
    fields = nemotron_h.config_to(ModelConfig.preset("nano"))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return str(tmp_path)


def on_80_gb(run, monkeypatch):
    monkeypatch.setattr(memory, "usable_memory_bytes", lambda _: 80 * 10**9)
    return run_plan(run, GPU)


def changed_as_said(run, said):
    """The run with the settings of a refusal."""
    settings = said.partition("it would fit with ")[2].rpartition(" (")[0]
    for setting in settings.split(", "):
        name, *values = setting.split()
        if name == "lora.rank" and run.lora is None:
            run = replace(run, lora=LoRAConfig())
        kind = type(attrgetter(name)(run))
        (value,) = values if kind is not tuple else (tuple(values),)
        run = with_leaf(run, name, value == "true" if kind is bool else kind(value))
    return run


def test_an_adapter_of_all_layers_of_nano_is_fine_tuned_in_80_gb(nano, monkeypatch):
    run = SFTRun(
        name="nano-sft",
        model=nano,
        data=(ConversationsConfig(path="chats.jsonl"),),
        lora=NANO_ADAPTER,
        training=replace(tiny_sft().training, seq_len=4096, bias_update_rate=0.0),
    )
    said = refusal(run, 80 * 10**9, monkeypatch)
    for part in ("recompute true", "activations bfloat16", "microbatch_size 1"):
        assert part in said
    assert "lora" not in said.partition("it would fit with ")[2]
    assert on_80_gb(changed_as_said(run, said), monkeypatch).total < 80 * 10**9


def test_rewards_of_nano_need_an_adapter_without_experts_in_80_gb(nano, monkeypatch):
    run = own_environments(nano, [EnvironmentConfig(name="math")], lora=NANO_ADAPTER)
    said = refusal(run, 80 * 10**9, monkeypatch)
    assert "lora.targets in_proj shared_experts.up_proj shared_experts.down_proj q_proj" in said
    fitting = changed_as_said(run, said)
    plan = on_80_gb(fitting, monkeypatch)
    assert plan.total < 80 * 10**9
    sizes = {part.name: part.num_bytes for part in plan.parts}
    assert sizes["engine merged weights"] < 0.05 * sizes["weights"]
    announce_memory(fitting, GPU, Listener())


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
