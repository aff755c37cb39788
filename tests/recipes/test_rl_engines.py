"""Engines in processes of their own: the rollouts of one engine, whatever happens to a process."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron3.errors import ConfigError, DataError
from nemotron3.models.lora import LoRAConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes.memory import run_plan
from nemotron3.recipes.rl_engine import own_engine, run_environments
from nemotron3.recipes.rl_engines import ProcessEngines
from nemotron3.recipes.run_rl import rl
from nemotron3.rl.curriculum import CurriculumConfig
from nemotron3.rl.data_parallel import EnginesConfig, shares
from nemotron3.rl.generator import AsyncConfig
from nemotron3.rl.weight_sync import PublishedWeights, SharedWeights, check_rollouts
from tests.recipes.small_rl import LETTER, metrics_of, small
from tests.small_run import Listener, killed_after
from tests.tiny import randomized

CPU = torch.device("cpu")
TWO = EnginesConfig(num_processes=2)
PLAYED = ("row", "group", "ids", "is_sampled", "weight_versions", "weight_checksums", "reward")

TRAINER = """
import torch

from nemotron3.recipes.rl_engine import run_environments
from nemotron3.recipes.rl_engines import ProcessEngines
from nemotron3.rl.data_parallel import EnginesConfig
from tests.recipes.small_rl import small

if __name__ == "__main__":
    run = small({policy!r}, {letter!r}, engines=EnginesConfig(num_processes=1))
    tasks = [each.task(n) for each in run_environments(run).values() for n in range(500)]
    engines = ProcessEngines(run, device=torch.device("cpu"), threads=1)
    engines.play(tasks[:1])
    engines.on_step = lambda: print("they play", flush=True)
    engines.play(tasks, group_size=8)
"""


def same_rollouts(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for name in PLAYED:
            assert getattr(one, name) == getattr(other, name), name
        logprobs = torch.tensor(one.logprobs), torch.tensor(other.logprobs)
        torch.testing.assert_close(*logprobs, atol=1e-5, rtol=0)


class Pair:
    """Two engines in processes, one in this process, and a trainer's weights."""

    def __init__(self, run):
        self.run, self.environments = run, run_environments(run)
        self.one = own_engine(run, self.environments, device=CPU, on_step=lambda: None)
        self.model = LanguageModel.from_pretrained(run.model)
        self.weights = PublishedWeights(self.model, self.model.state_dict().keys())
        self.two = ProcessEngines(run, device=CPU, threads=2)

    def update(self):
        """Other weights, and their version."""
        version = self.weights.version + 1
        self.weights.publish(randomized(self.model, seed=version), version)
        return version

    def rows(self, count):
        every = list(self.environments.values())
        return [every[n * len(every) // count].task(n) for n in range(count)]


@pytest.fixture(scope="module")
def pair(policy, tmp_path_factory):
    file = tmp_path_factory.mktemp("environment") / "letter.py"
    file.write_text(LETTER, encoding="utf-8")
    found = Pair(small(policy, str(file), "math", engines=TWO, max_num_seqs=5))
    with closing(found.two):
        yield found


@pytest.mark.long
@pytest.mark.parametrize("count", [7, 2, 1])
def test_rollouts_and_proofs_are_those_of_one_engine(pair, count):
    version = pair.update()
    assert pair.one.install(pair.weights, running="recompute") == version
    assert pair.two.install(pair.weights, running="recompute") == version
    rows = pair.rows(count)
    ours, theirs = (each.play(rows, group_size=3, seed=9) for each in (pair.two, pair.one))
    same_rollouts(ours, theirs)
    check_rollouts(ours, version=version, max_staleness=0, checksums=pair.weights.checksums)
    assert pair.two.play([]) == []


@pytest.mark.slow
def test_a_process_that_is_killed_is_replaced_and_plays_its_share_again(pair):
    pair.update()
    pair.two.install(pair.weights, running="recompute")
    rows, before = pair.rows(6), pair.two.num_restarts
    expected = pair.two.play(rows, group_size=2, seed=4)
    killed = []

    def kill():
        if not killed:
            killed.append(pair.two._engines[1].process)
            killed[0].kill()

    pair.two.on_step = kill
    found = pair.two.play(rows, group_size=2, seed=4)
    pair.two.on_step = lambda: None
    assert pair.two.num_restarts == before + 1
    assert not killed[0].is_alive()
    same_rollouts(found, expected)
    pair.two._engines[0].process.kill()  # while it has nothing to do
    pair.two._engines[0].process.join()
    version = pair.update()
    pair.two.install(pair.weights, running="recompute")
    found = pair.two.play(rows, seed=4)
    assert {version} == set().union(*(rollout.versions for rollout in found))
    check_rollouts(found, version=version, max_staleness=0, checksums=pair.weights.checksums)


@pytest.mark.slow
def test_all_engines_take_up_weights_in_the_middle_of_answers(pair):
    first = pair.update()
    pair.two.install(pair.weights, running="recompute")
    calls = 0

    def update():
        nonlocal calls
        calls += 1
        if calls % 4 == 0 and pair.weights.version < first + 40:
            assert pair.update() == pair.two.install(pair.weights, running="recompute")

    pair.two.on_step = update
    found = pair.two.play(pair.rows(20), group_size=4)
    pair.two.on_step = lambda: None
    newest, checksums = pair.weights.version, pair.weights.checksums
    check_rollouts(found, version=newest, max_staleness=newest - first, checksums=checksums)
    for engine in (0, 1):
        groups = shares([rollout.row for rollout in found[::4]], 2)[engine]
        own = [rollout for rollout in found if rollout.group in groups]
        assert len(set().union(*(rollout.versions for rollout in own))) > 1


@pytest.mark.slow
def test_an_engine_with_other_weights_than_it_says_is_caught(pair, monkeypatch):
    copy = SharedWeights.copy

    def forget_one(self, weights):
        name = next(iter(self.tensors))
        before = self.tensors[name].clone()
        version = copy(self, weights)
        self.tensors[name].copy_(before)
        return version

    version = pair.update()
    with monkeypatch.context() as patch:
        patch.setattr(SharedWeights, "copy", forget_one)
        pair.two.install(pair.weights, running="recompute")
    found = pair.two.play(pair.rows(2))
    with pytest.raises(DataError, match=rf"version {version} whose checksum in the engine is"):
        check_rollouts(found, version=version, max_staleness=0, checksums=pair.weights.checksums)


OUT_OF_MEMORY = """
import multiprocessing
from nemotron3.inference.llm import LLM

def requests(*_):
    raise RuntimeError("out of memory")

if multiprocessing.parent_process() is not None:  # in an engine's process alone
    LLM.requests = requests
"""


@pytest.mark.slow
def test_what_fails_again_and_again_reaches_the_user(policy, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(LETTER + OUT_OF_MEMORY)
    engines = EnginesConfig(num_processes=1, max_restarts=1)
    run = small(policy, str(file), engines=engines)
    rows = [environment.task(0) for environment in run_environments(run).values()]
    with closing(ProcessEngines(run, device=CPU, threads=1)) as broken:
        with pytest.raises(
            DataError,
            match=r"failed 2 times in one play, at last with .*RuntimeError: out of memory",
        ):
            broken.play(rows)
        assert broken.num_restarts == 1
    assert not any(engine.process.is_alive() for engine in broken._engines)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it reads /proc")
def test_no_engine_hears_ctrl_c(pair):
    """From its first instruction on: the first one, too, which starts multiprocessing's tracker."""
    for engine in pair.two._engines:
        status = Path(f"/proc/{engine.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        assert int(fields["SigBlk"], 16) >> (signal.SIGINT - 1) & 1


@pytest.mark.slow
def test_the_trainer_s_death_ends_the_engines(policy, letter, tmp_path):
    """They hold the trainer's output open, so that ends with the last of them."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(policy=str(policy), letter=letter))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "they play\n"
        trainer.kill()
        assert set(trainer.stdout.read().splitlines()) <= {"they play"}


@pytest.mark.long
def test_by_turns_a_run_that_was_killed_goes_on_to_the_same_losses(policy, letter, tmp_path):
    """And they are those of one engine in the trainer's process."""
    curriculum = CurriculumConfig(pool=12, samples=3)
    training = {"checkpoint_every_steps": 1, "evaluate_every_steps": 2}
    one = small(
        policy, letter, "math", steps=3, prompts=3, curriculum=curriculum, training=training
    )
    rl(one, runs=tmp_path / "one")
    run, listener = replace(one, engines=TWO), Listener()
    others = multiprocessing.active_children()
    with killed_after(2):
        rl(run, runs=tmp_path / "two", callback=listener)
    assert set(multiprocessing.active_children()) <= set(others)
    assert "Measuring pass rates before update 1" in listener.said
    rl(run, runs=tmp_path / "two")
    ours, theirs = (metrics_of(tmp_path / name / "small") for name in ("two", "one"))
    for step in theirs:
        for name in ("train/loss", "reward/mean", "optim/grad_norm", "eval/reward"):
            if name in theirs[step]:
                assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-4, abs=1e-6)
        assert ours[step]["policy/logprob_error"] < 1e-5
        assert ours[step]["engines/restarts"] == 0
    ours, theirs = (
        [task["answer"] for task in json.loads((tmp_path / name / "small/before.json").read_text())]
        for name in ("two", "one")
    )
    assert ours == theirs
    backends = [
        json.loads((tmp_path / name / "small/run.json").read_text())["extra"]["backends"]
        for name in ("two", "one")
    ]
    assert backends[0] == backends[1]


@pytest.mark.slow
def test_only_what_an_adapter_changes_travels(policy, letter, tmp_path, monkeypatch):
    shared, make = [], SharedWeights.__init__

    def keep(self, layout, block=None):
        make(self, layout, block)
        shared.append(self)

    monkeypatch.setattr(SharedWeights, "__init__", keep)
    lora = LoRAConfig(rank=2, targets=("in_proj",))
    training = {"bias_update_rate": 0.0}
    run = small(policy, letter, lora=lora, training=training, engines=replace(TWO, num_processes=1))
    rl(run, runs=tmp_path / "runs")
    assert {name.rsplit(".", 2)[1] for name in shared[0].tensors} == {"in_proj"}
    logged = metrics_of(tmp_path / "runs/small")
    assert max(metrics["policy/logprob_error"] for metrics in logged.values()) < 1e-5


def test_shared_weights_keep_every_bit(policy):
    model = randomized(LanguageModel.from_pretrained(policy))
    weights = PublishedWeights(model, model.state_dict().keys())
    weights.publish(model, 3)
    shared = SharedWeights(weights.tensors)
    assert shared.copy(weights) == shared.version == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(shared.tensors[name], tensor)
        assert shared.tensors[name].dtype == tensor.dtype


def test_an_engine_with_its_own_model_computes_as_the_trainer_does(policy, letter):
    precision = PrecisionConfig(activations="bfloat16")
    run = small(policy, letter, training={"precision": precision})
    engine = own_engine(run, run_environments(run), device=CPU, on_step=lambda: None)
    assert engine.model.activation_dtype == torch.bfloat16


def test_every_engine_is_in_the_memory_plan(policy, letter):
    one = run_plan(small(policy, letter), CPU)
    three = small(policy, letter, engines=EnginesConfig(num_processes=3))
    plan = run_plan(three, CPU)
    sizes = {part.name: part.num_bytes for part in plan.parts}
    assert sizes["engines' weights"] == 3 * sizes["weights"]
    assert sizes["further engine states"] == 2 * sizes["engine states"]
    ahead = replace(three, asynchronous=AsyncConfig(max_staleness=1))
    assert run_plan(ahead, CPU) == plan
    engine = sum(part.num_bytes for part in one.parts if part.name.startswith("engine"))
    assert plan.total == one.total + 2 * engine + 5 * sizes["weights"]


def test_restarts_of_an_engine_that_has_no_copy_are_refused(policy, letter):
    with pytest.raises(ConfigError, match=r"engines\.max_restarts is 5 and engines\.num_proc"):
        small(policy, letter, engines=EnginesConfig(max_restarts=5))
