"""Rollouts ahead of the trainer: staleness, checksums, players that die, and the end."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nemotron3.errors import ConfigError, DataError
from nemotron3.rl.generator import AsyncConfig, RolloutGenerator
from nemotron3.rl.groups import UpdateRollouts
from nemotron3.rl.rollouts import Rollout
from nemotron3.rl.weight_sync import PublishedWeights, check_rollouts, weights_checksum

ROW = {
    "responses_create_params": {"input": []},
    "agent_ref": {"type": "responses_api_agents", "name": "fake"},
}


class Policy(nn.Module):
    """Weights that say which version they are."""

    def __init__(self):
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("bias", torch.zeros(2))

    @torch.no_grad()
    def update(self):
        self.trained += 1
        self.bias -= 1
        return self


class FakePlayer:
    """Samples tokens of whatever weights it has; between them weights may change."""

    def __init__(self, on_step, say, *, pauses=(0.0,), dies_at=None, corrupts=False):
        self.model, self.version = Policy(), 0
        self.on_step, self.say = on_step, say
        self.pauses, self.dies_at, self.corrupts = pauses, dies_at, corrupts
        self.is_closed, self.threads, self.checksums = False, [], {}
        self.num_restarts = 0

    def install(self, weights, *, running):
        self.version, self.running = weights.write_into(self.model), running
        if self.corrupts:
            with torch.no_grad():
                self.model.frozen[0] = 99.0
        self.checksums[self.version] = weights_checksum(self.model)
        return self.version

    def rollout(self, versions):
        return rollout(versions, weight_checksums={v: self.checksums[v] for v in set(versions)})

    def play(self, step):
        self.say(f"playing {step}")
        rollouts = []
        for number in range(4):
            versions = []
            for token in range(3):
                time.sleep(self.pauses[(step * 12 + number * 3 + token) % len(self.pauses)])
                self.on_step()
                if self.dies_at == (step, number):
                    raise RuntimeError("killed")
                assert (self.model.trained == self.version).all()
                assert (self.model.bias == -self.version).all()
                versions.append(self.version)
            rollouts.append(self.rollout(versions))
        return UpdateRollouts(trained=rollouts, advantages=[1.0] * 4, played=rollouts)

    def use_threads(self, count):
        self.threads.append(count)

    def close(self):
        self.is_closed = True


def rollout(versions, **changes):
    return Rollout(
        row=ROW,
        group=0,
        ids=[1] * len(versions),
        is_sampled=[True] * len(versions),
        logprobs=[0.0] * len(versions),
        weight_versions=list(versions),
        **changes,
    )


class Players:
    """Makes players, and keeps them; `first` are the settings of the first ones."""

    def __init__(self, *first, **rest):
        self.made, self.first, self.rest = [], list(first), rest

    def __call__(self, on_step, say):
        settings_ = self.first.pop(0) if self.first else self.rest
        self.made.append(FakePlayer(on_step, say, **settings_))
        return self.made[-1]


def run(players, config, *, first=0, last=6, pauses=(0.0,), say=lambda _: None, **how):
    """A trainer's loop; returns what it took, and the generator's metrics at the end."""
    model, taken, metrics = Policy(), [], {}
    for _ in range(first):
        model.update()
    generator = RolloutGenerator(
        players, PublishedWeights(model), config, first=first, last=last, **how
    )
    try:
        for step in range(first, last):
            generator.publish(model, step)
            taken.append(generator.take(step, say=say))
            metrics = generator.metrics()
            time.sleep(pauses[step % len(pauses)])
            model.update()
    finally:
        generator.close()
    return taken, metrics


PAUSES = st.lists(st.sampled_from([0.0, 0.0, 1e-4, 2e-3]), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(
    staleness=st.integers(1, 3),
    in_flight=st.sampled_from(["recompute", "keep", "off"]),
    first=st.integers(0, 2),
    engine=PAUSES,
    trainer=PAUSES,
)
def test_every_token_is_of_weights_that_are_fresh_enough(
    staleness, in_flight, first, engine, trainer
):
    config = AsyncConfig(max_staleness=staleness, in_flight_updates=in_flight)
    players = Players(pauses=engine)
    taken, _ = run(players, config, first=first, last=first + 5, pauses=trainer)
    for step, update in enumerate(taken, start=first):
        versions = [v for each in update.played for v in each.weight_versions]
        assert max(0, step - staleness) <= min(versions) <= max(versions) <= step
        assert versions == sorted(versions)
        assert in_flight != "off" or len(set(versions)) == 1
        assert all(set(each.weight_checksums) == each.versions for each in update.played)
    assert len(players.made) == 1


def test_the_next_rollouts_are_played_while_the_trainer_is_busy():
    model = Policy()
    generator = RolloutGenerator(
        Players(), PublishedWeights(model), AsyncConfig(max_staleness=2), first=0, last=9
    )
    try:
        generator.publish(model, 0)
        generator.take(0)
        deadline = time.monotonic() + 30
        while len(generator._ready) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert sorted(generator._ready) == [1, 2]  # update 3 has to wait for version 1
        assert {v for u in generator._ready.values() for r in u.played for v in r.versions} == {0}
    finally:
        generator.close()


def test_whoever_works_alone_has_all_processors():
    goes_on, model = threading.Semaphore(0), Policy()

    class Slow(FakePlayer):
        def play(self, step):
            if step:
                assert goes_on.acquire(timeout=30)  # the trainer has taken the last one
            return super().play(step)

    players = []
    generator = RolloutGenerator(
        lambda *given: players.append(Slow(*given)) or players[-1],
        PublishedWeights(model),
        AsyncConfig(max_staleness=1, engine_threads=3),
        first=0,
        last=3,
        threads=8,
    )
    try:
        generator.publish(model, 0)
        generator.take(0)
        assert generator.trainer_threads() == 5
        goes_on.release()
        deadline = time.monotonic() + 30
        while generator.trainer_threads() != 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert generator.trainer_threads() == 8  # the engine waits for version 1
        assert players[0].threads == [8, 3]  # the trainer waited at first, and then worked
    finally:
        goes_on.release(2)
        generator.close()


def test_answers_take_up_new_weights_in_flight():
    """The update comes when the first tokens have been sampled: the others are of its weights."""
    model, sampled, went_on = Policy(), threading.Event(), threading.Event()

    class Waiting(FakePlayer):
        def play(self, step):
            if step == 1:
                first = self.rollout([self.version])
                sampled.set()
                assert went_on.wait(30)
                self.on_step()
                both = [first, self.rollout([self.version])]
                return UpdateRollouts(trained=both, advantages=[1.0, 1.0], played=both)
            return super().play(step)

    generator = RolloutGenerator(
        Waiting,
        PublishedWeights(model),
        AsyncConfig(max_staleness=1, in_flight_updates="keep"),
        first=0,
        last=2,
    )
    try:
        generator.publish(model, 0)
        generator.take(0)
        assert sampled.wait(30)
        generator.publish(model.update(), 1)
        went_on.set()
        played = generator.take(1).played
    finally:
        generator.close()
    assert [each.weight_versions for each in played] == [[0], [1]]
    assert generator._player is None


@settings(max_examples=20, deadline=None)
@given(staleness=st.integers(1, 3), engine=PAUSES, trainer=PAUSES, dies=st.booleans())
def test_held_out_tasks_are_played_with_the_newest_weights(staleness, engine, trainer, dies):
    """Before the first update, between any two, and after the last."""

    class Looking(FakePlayer):
        def look(self, num_tasks, *, when, on_ended):
            self.on_step()
            if dies and when == 2 and len(players) == 1:
                raise RuntimeError("killed")
            on_ended(num_tasks)
            return [(when, self.version)] * num_tasks

    players, model, found, ended = [], Policy(), [], []

    def make(on_step, say):
        players.append(Looking(on_step, say, pauses=engine))
        return players[-1]

    config = AsyncConfig(max_staleness=staleness)
    generator = RolloutGenerator(make, PublishedWeights(model), config, first=0, last=4)
    try:
        for step in range(5):
            generator.publish(model, step)
            found.append(generator.look(2, when=step, on_ended=ended.append))
            if step < 4:
                assert len(generator.take(step).played) == 4
                time.sleep(trainer[step % len(trainer)])
                model.update()
        assert generator.metrics()["engines/restarts"] == dies
    finally:
        generator.close()
    assert found == [[(step, step)] * 2 for step in range(5)]
    assert ended == [2] * 5


def test_a_player_that_dies_is_replaced_and_nothing_is_counted_twice():
    players = Players({"dies_at": (2, 3)}, {"dies_at": (2, 0)})
    taken, metrics = run(players, AsyncConfig(max_staleness=1))
    assert metrics["engines/restarts"] == 2
    assert [len(update.played) for update in taken] == [4] * 6
    assert [player.is_closed for player in players.made] == [True] * 3


def test_engines_that_a_player_replaces_count_as_well():
    """Also those of a player that died itself."""

    class Replacing(FakePlayer):
        def play(self, step):
            self.num_restarts += 1
            return super().play(step)

    made = []

    def make(on_step, say):
        made.append(Replacing(on_step, say, dies_at=None if made else (1, 2)))
        return made[-1]

    _, metrics = run(make, AsyncConfig(max_staleness=1), last=3)
    assert metrics["engines/restarts"] == 2 + 1 + 2


def test_a_player_that_dies_again_and_again_ends_the_run():
    with pytest.raises(DataError, match=r"update 2 failed 2 times, at last with RuntimeError: kil"):
        run(Players(dies_at=(1, 0)), AsyncConfig(max_staleness=1), max_restarts=1)
    assert not any(thread.name == "rollouts" for thread in threading.enumerate())


def test_what_a_user_has_to_change_is_not_tried_again():
    def refuse(on_step, say):
        raise ConfigError("no environment 'maths'")

    with pytest.raises(ConfigError, match="maths"):
        run(refuse, AsyncConfig(max_staleness=1))


def test_other_weights_than_the_trainer_s_are_noticed():
    with pytest.raises(DataError, match=r"version 0 whose checksum in the engine is (\w{8}), and"):
        run(Players(corrupts=True), AsyncConfig(max_staleness=1))


def test_closing_ends_a_play_in_the_middle():
    model = Policy()
    generator = RolloutGenerator(
        Players(pauses=[0.01]),
        PublishedWeights(model),
        AsyncConfig(max_staleness=1),
        first=0,
        last=10**6,
    )
    generator.publish(model, 0)
    generator.close()
    assert not generator._thread.is_alive()


def test_an_interruption_of_a_waiting_trainer_ends_the_thread():
    def interrupt(message):
        raise KeyboardInterrupt

    players = Players(pauses=[0.01])
    with pytest.raises(KeyboardInterrupt):
        run(players, AsyncConfig(max_staleness=1), say=interrupt)
    assert players.made[0].is_closed
    assert not any(thread.name == "rollouts" for thread in threading.enumerate())


def test_messages_of_the_player_reach_the_trainer():
    heard = []
    run(Players(pauses=[0.005]), AsyncConfig(max_staleness=1), last=3, say=heard.append)
    assert heard == [f"playing {step}" for step in range(len(heard))]
    assert heard


def test_checksums_tell_every_tensor_and_every_bit():
    model = Policy()
    seen = {weights_checksum(model)}
    for tensor in model.state_dict().values():
        for index in range(len(tensor)):
            tensor[index] = torch.nextafter(tensor[index], torch.tensor(9.0))
            seen.add(weights_checksum(model))
    assert len(seen) == 8
    assert weights_checksum(model) in seen
    assert weights_checksum(Policy().to(torch.bfloat16)) not in seen


def test_only_what_training_may_change_is_copied():
    weights = PublishedWeights(Policy())
    assert set(weights.tensors) == {"trained", "bias"}
    other = Policy()
    weights.publish(Policy().update(), 1)
    assert weights.write_into(other) == 1
    assert weights_checksum(other) == weights.checksums[1]
    assert set(PublishedWeights(Policy(), ["frozen"]).tensors) == {"frozen"}


@pytest.mark.parametrize(
    ("versions", "checksums", "said"),
    [
        ([3, 2], {3: 7, 2: 7}, r"tokens of weights of version 2; versions 3 to 4 are allowed"),
        ([5], {5: 7}, r"version 5; versions 3 to 4"),
        (
            [4],
            {},
            r"version 4 whose checksum in the engine is unknown, and in the trainer 00000007",
        ),
        ([4], {4: 8}, r"in the engine is 00000008, and in the trainer 00000007"),
    ],
)
def test_rollouts_of_other_weights_are_refused(versions, checksums, said):
    rollouts = [rollout([4], weight_checksums={4: 7}), rollout(versions)]
    rollouts[1] = replace(rollouts[1], weight_checksums=checksums)
    with pytest.raises(DataError, match=said):
        check_rollouts(rollouts, version=4, max_staleness=1, checksums={2: 7, 3: 7, 4: 7})
    check_rollouts(rollouts[:1], version=4, max_staleness=0)


def test_processors_are_shared_and_both_sides_have_one_at_least():
    assert AsyncConfig(max_staleness=1).threads(1) == (1, 1)
    assert AsyncConfig(max_staleness=1).threads(2) == (1, 1)
    assert AsyncConfig(max_staleness=1).threads(7) == (3, 4)
    assert AsyncConfig(max_staleness=1, engine_threads=6).threads(8) == (6, 2)
    assert AsyncConfig(max_staleness=1, engine_threads=9).threads(8) == (8, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_staleness": -1}, "asynchronous.max_staleness is -1; it must be 0"),
        ({"max_staleness": 0, "engine_threads": 2}, "max_staleness is 0: .* take turns, and not"),
        ({"engine_threads": 0}, "asynchronous.engine_threads is 0"),
        ({"in_flight_updates": "yes"}, "in_flight_updates is 'yes'; it must be one of recompute"),
    ],
)
def test_settings_are_checked(changes, said):
    with pytest.raises(ConfigError, match=said):
        AsyncConfig(**{"max_staleness": 1} | changes)
