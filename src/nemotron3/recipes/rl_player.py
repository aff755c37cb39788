"""What plays the updates of a reinforcement learning run: their plan, and engines.

The plan (tasks, curriculum, groups and advantages) is the trainer's process'. The engine is the one
there, on the model in training or with a copy of it, or several in processes of their own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from nemotron3.config import write_json
from nemotron3.data.chat_tokens import check_chat_tokens
from nemotron3.environments.environment import Environment
from nemotron3.environments.rows import Row
from nemotron3.evaluation.environments import held_out_tasks, play_tasks
from nemotron3.inference.model_runner.weights import RunningRequests
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_engine import own_engine, run_environments
from nemotron3.rl.curriculum import Curriculum
from nemotron3.rl.data_parallel import TaskPlayer
from nemotron3.rl.groups import UpdateRollouts, collect
from nemotron3.rl.records import RolloutRecord
from nemotron3.rl.rollouts import Rollout
from nemotron3.rl.sampling_plan import SamplingPlan, TaskPlan
from nemotron3.rl.weight_sync import PublishedWeights
from nemotron3.text import Tokenizer

_PASS_RATES_FILE = "pass_rates.json"


class Engines(TaskPlayer, Protocol):
    """One engine or several, with copies of the trainer's weights."""

    @property
    def num_restarts(self) -> int:
        """Engines that failed and were replaced."""
        ...

    def install(self, weights: PublishedWeights, *, running: RunningRequests) -> int:
        """Take up the newest weights; returns their version."""
        ...

    def use_threads(self, count: int) -> None:
        """Compute with so many threads, all together, from the next step on."""
        ...

    def close(self) -> None:
        """End what it runs."""
        ...


class RLPlayer:
    """Plays a run's tasks."""

    def __init__(
        self,
        run: RLRun,
        engines: Engines,
        environments: Mapping[str, Environment],
        *,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        """`folder` is the run's."""
        self.run, self.environments = run, environments
        self._engines, self._folder, self._say = engines, folder, say
        self.tokenizer = Tokenizer.from_directory(run.model)
        self.template = chat_template_for(run.chat_style, self.tokenizer, run.model)
        has_tools = any(environment.tools for environment in self.environments.values())
        check_chat_tokens(self.tokenizer, with_tools=has_tools)
        weights = [config.weight for config in run.environments]
        plan = SamplingPlan(
            self.environments,
            dict(zip(self.environments, weights, strict=True)),
            prompts=run.training.batch_size // run.group_size,
            rounds=run.max_rounds,
            seed=run.seed,
        )
        self._pools: dict[str, list[Row]] = {}
        self._curriculum: Curriculum | None = None
        if run.curriculum is not None:
            size, seed = run.curriculum.pool, run.seed
            self._pools = {
                name: environment.distinct_tasks(size, split="train", seed=seed)
                for name, environment in self.environments.items()
            }
            self._curriculum = Curriculum(
                run.curriculum, plan.quotas, self._pools, steps=run.training.steps, seed=seed
            )
        self._plan: TaskPlan = self._curriculum or plan
        self._profiled: int | None = None

    @property
    def num_restarts(self) -> int:
        """Engines that failed and were replaced."""
        return self._engines.num_restarts

    def play(self, step: int) -> UpdateRollouts:
        """The rollouts of the update that follows so many updates."""
        self._renew_pass_rates(step)
        run = self.run

        def play(rows: Sequence[Row], round_: int) -> list[Rollout]:
            seed = run.seed * 2**32 + step * run.max_rounds + round_
            return self._engines.play(
                rows,
                group_size=run.group_size,
                seed=seed,
                effort_fraction=run.rollouts.effort_fraction,
            )

        return collect(
            self._plan,
            play,
            step,
            rounds=run.max_rounds,
            config=run.advantages,
            shaping=run.shaping,
        )

    def look(self, num_tasks: int, *, when: str) -> list[RolloutRecord]:
        """A rollout of each of so many different held-out tasks of every environment."""
        every = [held_out_tasks(each, num_tasks) for each in self.environments.values()]
        return play_tasks(self._engines, [row for rows in every for row in rows], when=when)

    def install(self, weights: PublishedWeights, *, running: RunningRequests) -> int:
        """Have the engines take up the newest weights; returns their version."""
        return self._engines.install(weights, running=running)

    def use_threads(self, count: int) -> None:
        """Have the engines compute with so many threads, all together, from the next step on."""
        self._engines.use_threads(count)

    def close(self) -> None:
        """End the engines."""
        self._engines.close()

    def _renew_pass_rates(self, step: int) -> None:
        """Measure the pass rates of a curriculum, unless an earlier part of this run has."""
        curriculum = self._curriculum
        if curriculum is None or self._profiled == (due := curriculum.config.profile_step(step)):
            return
        file = self._folder / _PASS_RATES_FILE
        kept: dict[str, dict[str, list[float]]] = (
            json.loads(file.read_text("utf-8")) if file.exists() else {}
        )
        if str(due) not in kept:
            self._say(f"Measuring pass rates before update {step + 1}")
            rates = {name: self._pass_rates(rows, seed=due) for name, rows in self._pools.items()}
            kept[str(due)] = rates
            write_json(file, kept)
        curriculum.use(kept[str(due)])
        self._profiled = due

    def _pass_rates(self, rows: Sequence[Row], *, seed: int) -> list[float]:
        """Mean reward of each task; 0 where every rollout failed."""
        assert self.run.curriculum is not None
        samples = self.run.curriculum.samples
        rewards: dict[int, list[float]] = {}
        for rollout in self._engines.play(rows, group_size=samples, seed=seed):
            if rollout.reward is not None:
                rewards.setdefault(rollout.group, []).append(rollout.reward)
        means = {group: sum(found) / len(found) for group, found in rewards.items()}
        return [means.get(group, 0.0) for group in range(len(rows))]


def own_player(
    run: RLRun,
    *,
    device: torch.device,
    folder: Path,
    on_step: Callable[[], None],
    say: Callable[[str], None],
) -> RLPlayer:
    """A player whose engine, in this thread, has a model of its own."""
    environments = run_environments(run)
    engine = own_engine(run, environments, device=device, on_step=on_step)
    return RLPlayer(run, engine, environments, folder=folder, say=say)
