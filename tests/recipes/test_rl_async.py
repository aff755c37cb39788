"""Reinforcement learning runs whose engine plays ahead of the trainer."""

import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from nemotron3.errors import DataError
from nemotron3.models.lora import LoRAConfig, changed_parameters, with_own_changes
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes import rl_ahead
from nemotron3.recipes.memory import run_plan
from nemotron3.recipes.rl_ahead import dropped_rollouts
from nemotron3.recipes.rl_player import RLPlayer
from nemotron3.recipes.run_rl import rl
from nemotron3.rl.alarms import AlarmConfig
from nemotron3.rl.curriculum import CurriculumConfig
from nemotron3.rl.data_parallel import EnginesConfig
from nemotron3.rl.generator import AsyncConfig, RolloutGenerator
from nemotron3.rl.groups import UpdateRollouts
from nemotron3.rl.weight_sync import PublishedWeights, weights_checksum
from tests.recipes.small_rl import metrics_of, small
from tests.small_run import Listener, killed_after


@pytest.fixture(autouse=True)
def _ends_its_threads():
    threads = torch.get_num_threads()
    yield
    assert not any(thread.name == "rollouts" for thread in threading.enumerate())
    assert torch.get_num_threads() == threads


def watched(monkeypatch):
    """Everything that is trained on, by update."""
    taken = {}
    take = rl_ahead.RolloutsAhead.take

    def keep(self, step, *, say):
        taken[step] = take(self, step, say=say)
        return taken[step]

    monkeypatch.setattr(rl_ahead.RolloutsAhead, "take", keep)
    return taken


def updates_arrive_in_the_middle(monkeypatch):
    """Every update is made while the first answers of the next one are half sampled."""
    published, published_version = threading.Condition(), 0
    publish, play, make = RolloutGenerator.publish, RLPlayer.play, rl_ahead.own_engine
    playing = steps = 0

    def tell(self, model, version):
        nonlocal published_version
        publish(self, model, version)
        with published:
            published_version = version
            published.notify_all()

    def count(self, step):
        nonlocal playing, steps
        playing, steps = step, 0
        return play(self, step)

    def own_engine(*given, on_step, **named):
        def wait_in_the_middle():
            nonlocal steps
            steps += 1
            if steps == 6:
                with published:
                    assert published.wait_for(lambda: published_version >= playing, timeout=60)
            on_step()

        return make(*given, on_step=wait_in_the_middle, **named)

    monkeypatch.setattr(RolloutGenerator, "publish", tell)
    monkeypatch.setattr(RLPlayer, "play", count)
    monkeypatch.setattr(rl_ahead, "own_engine", own_engine)


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", ["recompute", "keep"])
def test_rewards_grow_and_tokens_of_the_current_weights_agree(
    policy, letter, tmp_path, monkeypatch, in_flight
):
    taken = watched(monkeypatch)
    updates_arrive_in_the_middle(monkeypatch)
    run = small(
        policy,
        letter,
        steps=24,
        prompts=6,
        group_size=8,
        final_held_out_tasks=40,
        max_num_seqs=16,  # of 48 answers: some begin after the update
        asynchronous=AsyncConfig(max_staleness=1, in_flight_updates=in_flight),
    )
    summary = rl(run, runs=tmp_path / "runs")
    assert summary.reward["letter"] > summary.reward_before["letter"] + 0.2
    logged = metrics_of(tmp_path / "runs/small")
    assert max(m["policy/logprob_error_current"] for m in logged.values()) < 1e-5
    assert max(m["alarm/logprob_error"] for m in logged.values()) == 0
    assert logged[1]["policy/current"] == 1.0
    assert max(m["policy/logprob_error"] for m in logged.values()) > 1e-4  # earlier weights
    assert min(m["policy/kept"] for m in logged.values()) > 0.8
    for step, update in taken.items():
        for rollout in update.played:
            assert rollout.versions <= {max(step - 1, 0), step}
            assert rollout.weight_checksums.keys() == rollout.versions
            tokens = zip(rollout.weight_versions, rollout.is_sampled, strict=True)
            sampled = [version for version, is_sampled in tokens if is_sampled]
            assert sampled == sorted(sampled)  # after an update every token is of its weights
        played_by = [rollout.versions for rollout in update.played]
        assert step == 0 or ({step - 1, step} in played_by and {step} in played_by)
        continue_old = [rollout.continues_old_states for rollout in update.played]
        assert any(continue_old) == (step > 0 and in_flight == "keep")
    file = tmp_path / "runs/small/buffer.jsonl"
    assert dropped_rollouts(file, first=24) == 0
    assert len(file.read_text().splitlines()) == 24


def test_a_run_that_was_killed_goes_on_and_counts_what_it_lost(policy, letter, tmp_path):
    run = small(
        policy,
        letter,
        steps=4,
        training={"checkpoint_every_steps": 1},
        asynchronous=AsyncConfig(max_staleness=2),
    )
    with killed_after(2):
        rl(run, runs=tmp_path / "runs")
    file = tmp_path / "runs/small/buffer.jsonl"
    played = [json.loads(line) for line in file.read_text().splitlines()]
    lost = sum(each["rollouts"] for each in played if each["update"] >= 2)
    rl(run, runs=tmp_path / "runs")
    logged = metrics_of(tmp_path / "runs/small")
    assert sorted(logged) == [1, 2, 3, 4]
    assert [logged[step]["async/dropped"] for step in (3, 4)] == [lost, lost]
    assert dropped_rollouts(file, first=4) == lost
    assert [logged[step]["policy/current"] for step in (1, 3)] == [1.0, 1.0]


def test_the_engine_s_copy_of_the_weights_is_in_the_memory_plan(policy, letter):
    by_turns = small(policy, letter)
    ahead = replace(by_turns, asynchronous=AsyncConfig(max_staleness=1))
    ours, theirs = (run_plan(run, torch.device("cpu")) for run in (ahead, by_turns))
    sizes = {part.name: part.num_bytes for part in ours.parts}
    assert sizes["published weights"] == sizes["engines' weights"] == sizes["weights"]
    assert ours.total == theirs.total + 2 * sizes["weights"]


@pytest.mark.parametrize("processes", [0, 2])
def test_beside_an_adapter_an_engine_in_a_thread_shares_frozen_weights(policy, letter, processes):
    run = small(
        policy,
        letter,
        lora=LoRAConfig(rank=2, targets=("in_proj",)),
        asynchronous=AsyncConfig(max_staleness=1),
        engines=EnginesConfig(num_processes=processes),
        training={"bias_update_rate": 0.0},
    )
    sizes = {part.name: part.num_bytes for part in run_plan(run, torch.device("cpu")).parts}
    merged = sizes["engine merged weights"]
    assert sizes["published weights"] == merged < 0.2 * sizes["weights"]
    own = processes * sizes["weights"] if processes else merged
    assert sizes["engines' weights"] == own


def test_a_model_with_its_own_changes_shares_the_rest(policy):
    model, lora = LanguageModel.from_pretrained(policy), LoRAConfig(targets=("in_proj", "up_proj"))
    served = with_own_changes(model, lora)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    own = {name for name, t in served.state_dict().items() if t.data_ptr() != places[name]}
    assert own == set(changed_parameters(model, lora))
    assert weights_checksum(served) == weights_checksum(model)


def test_what_was_played_in_vain_is_told_by_the_updates_that_come_again(tmp_path):
    file = tmp_path / "buffer.jsonl"
    assert dropped_rollouts(file, 0) == 0
    rows = [(0, 8), (1, 16), (2, 8), (1, 8), (2, 32), (3, 8)]
    lines = [json.dumps({"update": update, "rollouts": count}) for update, count in rows]
    file.write_text("\n".join(lines) + "\n")
    assert dropped_rollouts(file, 4) == 16 + 8
    assert dropped_rollouts(file, 3) == 16 + 8 + 8
    assert dropped_rollouts(file, 0) == 80
    with file.open("a") as half_written:
        half_written.write('{"update": 4, "rol')
    assert dropped_rollouts(file, 0) == 80
    rl_ahead._note_played(file, 4, UpdateRollouts())
    assert [json.loads(line) for line in file.read_text().splitlines()][-1]["update"] == 4


def test_an_engine_that_dies_is_replaced(policy, letter, tmp_path, monkeypatch):
    play, calls = RLPlayer.play, []

    def dies(self, step):
        calls.append(step)
        found = play(self, step)
        if calls.count(1) == 1 and step == 1:
            raise RuntimeError("out of memory")
        return found

    monkeypatch.setattr(RLPlayer, "play", dies)
    rl(
        small(policy, letter, steps=3, asynchronous=AsyncConfig(max_staleness=1)),
        runs=tmp_path / "runs",
    )
    logged = metrics_of(tmp_path / "runs/small")
    assert logged[3]["engines/restarts"] == 1
    assert logged[3]["async/dropped"] == 0
    assert calls == [0, 1, 1, 2]


@pytest.mark.slow
def test_an_engine_s_process_that_is_killed_is_replaced(policy, letter, tmp_path, monkeypatch):
    taken, killed = watched(monkeypatch), []
    take = rl_ahead.RolloutsAhead.take

    def kill_first(self, step, *, say):
        found = take(self, step, say=say)
        if step == 1:
            killed.append(self._generator._player._engines._engines[1].process)
            killed[0].kill()
        return found

    monkeypatch.setattr(rl_ahead.RolloutsAhead, "take", kill_first)
    run = small(
        policy,
        letter,
        steps=5,
        asynchronous=AsyncConfig(max_staleness=1),
        engines=EnginesConfig(num_processes=2),
    )
    rl(run, runs=tmp_path / "runs")
    assert not killed[0].is_alive()
    assert not multiprocessing.active_children()
    logged = metrics_of(tmp_path / "runs/small")
    assert logged[5]["engines/restarts"] == 1
    assert max(m["policy/logprob_error_current"] for m in logged.values()) < 1e-5
    file = tmp_path / "runs/small/buffer.jsonl"
    played = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["update"] for each in played] == [0, 1, 2, 3, 4]
    assert [each["rollouts"] for each in played] == [len(taken[n].played) for n in range(5)]


@pytest.mark.slow
def test_the_engine_s_process_says_what_it_does_and_ends_with_the_run(policy, letter, tmp_path):
    listener = Listener()
    curriculum = CurriculumConfig(pool=12, samples=3)
    run = small(
        policy,
        letter,
        curriculum=curriculum,
        asynchronous=AsyncConfig(max_staleness=1),
        engines=EnginesConfig(num_processes=1),
    )
    with killed_after(2):
        rl(run, runs=tmp_path / "runs", callback=listener)
    assert "Measuring pass rates before update 1" in listener.said
    assert not multiprocessing.active_children()


def test_weights_that_did_not_arrive_end_the_run(policy, letter, tmp_path, monkeypatch):
    """The fault of a fast path that skips a tensor: all metrics would look well."""
    write = PublishedWeights.write_into

    def forgetful(self, model):
        version = write(self, model)
        with torch.no_grad():
            next(iter(model.parameters()))[0, 0] += 1  # frozen or not, it was loaded wrongly
        return version

    monkeypatch.setattr(PublishedWeights, "write_into", forgetful)
    with pytest.raises(DataError, match="version 0 whose checksum in the engine is"):
        rl(small(policy, letter, asynchronous=AsyncConfig(max_staleness=1)), runs=tmp_path / "runs")


def test_two_runs_in_one_process(policy, letter, tmp_path):
    runs = [
        small(policy, letter, steps=3, asynchronous=AsyncConfig(max_staleness=1, engine_threads=1)),
        small(
            policy,
            letter,
            steps=3,
            asynchronous=AsyncConfig(max_staleness=1, in_flight_updates="off"),
        ),
    ]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(rl, run, runs=tmp_path / str(place)) for place, run in enumerate(runs)]
        assert [each.result().held_out_tasks for each in both] == [6, 6]
    for place in (0, 1):
        logged = metrics_of(tmp_path / str(place) / "small")
        assert max(m["policy/logprob_error_current"] for m in logged.values()) < 1e-5


def test_a_curriculum_is_measured_by_the_engine_that_plays_ahead(policy, letter, tmp_path):
    listener = Listener()
    curriculum = CurriculumConfig(pool=12, samples=3, profile_every_steps=2)
    run = small(
        policy, letter, steps=3, curriculum=curriculum, asynchronous=AsyncConfig(max_staleness=1)
    )
    rl(run, runs=tmp_path / "runs", callback=listener)
    rates = json.loads((tmp_path / "runs/small/pass_rates.json").read_text())
    assert rates.keys() == {"0", "2"}
    assert [m for m in listener.said if "pass rates" in m] == [
        "Measuring pass rates before update 1",
        "Measuring pass rates before update 3",
    ]


@pytest.mark.parametrize("asynchronous", [AsyncConfig(), AsyncConfig(max_staleness=1)])
def test_alarms_are_said_once(policy, letter, tmp_path, asynchronous):
    listener = Listener()
    alarms = AlarmConfig(max_logprob_error=1e-12)
    run = small(policy, letter, steps=3, alarms=alarms, asynchronous=asynchronous)
    rl(run, runs=tmp_path / "runs", callback=listener)
    (warning,) = [message for message in listener.said if "max_logprob_error" in message]
    assert warning.startswith("Warning at update 1: ")
    assert metrics_of(tmp_path / "runs/small")[1]["alarm/logprob_error"] == 1


@pytest.mark.parametrize(
    ("processes", "activations"),
    [
        (0, "float32"),
        pytest.param(0, "bfloat16", marks=pytest.mark.slow),
        pytest.param(1, "float32", marks=pytest.mark.slow),
    ],
)
def test_an_adapters_updates_reach_the_engine_that_plays_ahead(
    policy, letter, tmp_path, processes, activations
):
    """Versions and checksums of all rollouts are checked: a stale copy would end the run."""
    precision = PrecisionConfig(activations=activations)
    training = {"bias_update_rate": 0.0, "precision": precision}
    run = small(
        policy,
        letter,
        steps=3,
        lora=LoRAConfig(rank=2),
        asynchronous=AsyncConfig(max_staleness=1),
        engines=EnginesConfig(num_processes=processes),
        training=training,
    )
    rl(run, runs=tmp_path / "runs")
    base, result = (
        LanguageModel.from_pretrained(folder).state_dict()
        for folder in (policy, tmp_path / "runs/small/model")
    )
    assert any(not torch.equal(tensor, base[name]) for name, tensor in result.items())
    assert (tmp_path / "runs/small/adapter/adapter_config.json").exists()
