"""The protocol between trainer and engines, with engines that die at any moment.

Threads stand for the processes, at the real ends of real sockets: a process takes seconds to start.
"""

import os
import threading
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from nemotron3.errors import ConfigError, DataError
from nemotron3.recipes import rl_process
from nemotron3.recipes.rl_engines import ProcessEngines
from nemotron3.rl.data_parallel import EnginesConfig
from nemotron3.rl.rollouts import Rollout
from nemotron3.rl.weight_sync import PublishedWeights
from tests.recipes.small_rl import small

ROW = {"responses_create_params": {"input": []}, "agent_ref": {"name": "fake"}}
CPU = torch.device("cpu")


class DiesError(Exception):
    """The process is gone: nothing is said any more."""


class FakeEngine:
    """Samples tokens of whatever weights it has; `dies_after` so many things, if ever."""

    def __init__(self, server, dies_after, error):
        self.server, self.left, self.error = server, dies_after, error
        self.version, self.backends, self.threads = 0, {"ssd": "fake"}, None

    def live(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise self.error

    def play(self, rows, *, places, group_size, seed, effort_fraction, on_ended):
        del seed, effort_fraction
        found = []
        for row, place in zip(rows, places, strict=True):
            for _ in range(group_size):
                versions = []
                for _ in range(3):
                    self.server.between_steps()
                    self.live()
                    versions.append(self.version)
                found.append(played(row, place, versions))
                on_ended(len(found))
        return found

    def install(self, weights, *, running):
        del running
        self.live()
        assert (weights.tensors["weight"] == weights.version).all()
        self.version = weights.version
        return self.version

    def use_threads(self, count):
        self.live()
        self.threads = count


def played(row, place, versions):
    count = len(versions)
    return Rollout(
        row=row,
        group=place,
        ids=[1] * count,
        is_sampled=[True] * count,
        logprobs=[0.0] * count,
        weight_versions=versions,
    )


class FakeProcesses:
    """Starts threads; the first processes die as `deaths` says, the others never."""

    def __init__(self, deaths=(), error=None):
        self.deaths, self.error, self.processes = list(deaths), error, []

    def spawn(self, target, *arguments, name):
        """As `runtime.processes.spawn`."""
        del target, arguments
        ours, theirs = Pipe()
        dies_after = self.deaths.pop(0) if self.deaths else None
        self.processes.append(FakeProcess(theirs, dies_after, self.error or DiesError(), name))
        self.processes[-1].start()
        theirs.close()
        return self.processes[-1], ours

    @property
    def count(self):
        return len(self.processes)


class FakeProcess:
    exitcode = -9

    def __init__(self, socket, dies_after, error, name):
        self.socket = Connection(os.dup(socket.fileno()))  # the trainer closes its copy
        server = rl_process._Server(self.socket)
        self.engine = server.engine = FakeEngine(server, dies_after, error)
        self.thread = threading.Thread(target=self._serve, args=(server,), daemon=True)
        self.name = name

    def _serve(self, server):
        with self.socket, suppress(rl_process._TrainerGoneError):
            try:
                while True:
                    server.obey()
            except DiesError:
                return
            except ConfigError as error:
                server.send("error", error)

    def start(self):
        self.thread.start()

    def terminate(self):
        """The trainer's end of the socket is closed, which ends the thread."""

    def join(self, timeout=None):
        self.thread.join(timeout)

    def is_alive(self):
        return self.thread.is_alive()

    def kill(self):
        raise AssertionError("it ended by itself")


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))

    @torch.no_grad()
    def update(self):
        self.weight += 1


@pytest.fixture(scope="module")
def run(policy):
    return small(policy, "math")


@contextmanager
def engines_of(run, started, *, num_processes, threads=1, max_restarts=3):
    config = EnginesConfig(num_processes=num_processes, max_restarts=max_restarts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_process, "spawn", started.spawn)
        engines = ProcessEngines(replace(run, engines=config), device=CPU, threads=threads)
        with closing(engines):
            yield engines
    assert not any(engine.thread.is_alive() for engine in started.processes)


@settings(max_examples=60, deadline=None)
@given(
    num_processes=st.integers(1, 3),
    num_rows=st.integers(0, 7),
    deaths=st.lists(st.one_of(st.none(), st.integers(0, 25)), max_size=5),
    updates=st.sets(st.integers(1, 6)),
)
@example(num_processes=1, num_rows=2, deaths=[14], updates={1})  # it had played its share
def test_whenever_engines_die_every_rollout_is_played_once_with_weights_that_are_new_enough(
    run, num_processes, num_rows, deaths, updates
):
    started, model = FakeProcesses(deaths), Policy()
    weights, calls = PublishedWeights(model), 0
    with engines_of(run, started, num_processes=num_processes, max_restarts=5) as engines:

        def publish():
            weights.publish(model, weights.version + 1)
            model.update()
            assert engines.install(weights, running="recompute") == weights.version

        def on_step():
            nonlocal calls
            calls += 1
            if calls in updates:
                publish()

        engines.on_step = on_step
        for _ in range(3):
            publish()
            oldest = weights.version
            ended = [0]
            found = engines.play([ROW] * num_rows, group_size=2, on_ended=ended.append)
            assert ended[-1] == len(found) == max(ended)
            assert [each.group for each in found] == [n for n in range(num_rows) for _ in "ab"]
            for rollout in found:
                assert rollout.weight_versions == sorted(rollout.weight_versions)
                assert oldest <= rollout.weight_versions[0]
                assert rollout.weight_versions[-1] <= weights.version
        assert engines.num_restarts == started.count - num_processes


def test_an_engine_that_dies_again_and_again_ends_the_play_with_the_cause(run):
    started = FakeProcesses([0] * 9)
    with (
        engines_of(run, started, num_processes=1, max_restarts=2) as engines,
        pytest.raises(DataError, match=r"3 times in one play, .* exit code -9"),
    ):
        engines.play([ROW])
    assert started.count == 3


def test_what_a_user_has_to_change_is_not_tried_again(run):
    started = FakeProcesses([1], ConfigError("no environment 'maths'"))
    with (
        engines_of(run, started, num_processes=1) as engines,
        pytest.raises(ConfigError, match="maths"),
    ):
        engines.play([ROW])
    assert started.count == 1


@pytest.mark.parametrize(("threads", "expected"), [(7, [3, 2, 2]), (3, [1, 1, 1]), (1, [1, 1, 1])])
def test_engines_share_the_processors(run, threads, expected):
    started = FakeProcesses()
    with engines_of(run, started, num_processes=3, threads=9) as engines:
        engines.use_threads(threads)
        engines.play([ROW] * 3)
        assert [each.engine.threads for each in started.processes] == expected
        assert engines.backends == {"ssd": "fake"}
