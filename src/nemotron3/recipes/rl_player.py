"""What plays the updates of a reinforcement learning run: their plan, and engines.

The plan (tasks, curriculum, groups and advantages) is the trainer's process'. The engine is the one
there, on the model in training or with a copy of it, or several in processes of their own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from nemotron3.config import write_json
from nemotron3.data.chat_tokens import check_chat_tokens
from nemotron3.environments.rows import Row
from nemotron3.evaluation.environments import held_out_tasks, play_tasks
from nemotron3.inference.model_runner.weights import RunningRequests
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_engine import run_environments
from nemotron3.rl.curriculum import Curriculum
from nemotron3.rl.data_parallel import TaskPlayer
from nemotron3.rl.failures import check_rewards
from nemotron3.rl.groups import UpdateRollouts, collect
from nemotron3.rl.prompts import check_prompts
from nemotron3.rl.records import RolloutRecord
from nemotron3.rl.rollouts import OnEnded, Rollout
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

    @property
    def backends(self) -> Mapping[str, str]:
        """What operations ran on, as `recorded_backends` has it."""
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


class RunTasks:
    """The tasks of a run: which an update plays, how groups and advantages come of them."""

    def __init__(self, run: RLRun, *, folder: Path) -> None:
        """`folder` is the run's. Raises ConfigError for what cannot be played."""
        self.environments = run_environments(run)
        self._run, self._folder = run, folder
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
        rows = [row for own in self._pools.values() for row in own] or [
            *plan.tasks(0, missing=plan.quotas)
        ]
        for each in self.environments.values():
            rows += held_out_tasks(each, max(run.held_out_tasks, run.final_held_out_tasks))
        check_prompts(rows, run.rollouts, self.template, self.tokenizer)

    def play(self, player: TaskPlayer, step: int, *, say: Callable[[str], None]) -> UpdateRollouts:
        """The rollouts of the update that follows so many updates."""
        self._renew_pass_rates(player, step, say)
        run = self._run

        def play(rows: Sequence[Row], round_: int) -> list[Rollout]:
            seed = run.seed * 2**32 + step * run.max_rounds + round_
            return player.play(
                rows,
                group_size=run.group_size,
                seed=seed,
                effort_fraction=run.rollouts.effort_fraction,
            )

        update = collect(
            self._plan,
            play,
            step,
            rounds=run.max_rounds,
            config=run.advantages,
            shaping=run.shaping,
        )
        check_rewards(update.played)
        return update

    def look(
        self, player: TaskPlayer, num_tasks: int, *, when: str, on_ended: OnEnded
    ) -> list[RolloutRecord]:
        """A rollout of each of so many different held-out tasks of every environment."""
        every = [held_out_tasks(each, num_tasks) for each in self.environments.values()]
        tasks = [row for rows in every for row in rows]
        return play_tasks(player, tasks, when=when, on_ended=on_ended)

    def _renew_pass_rates(self, player: TaskPlayer, step: int, say: Callable[[str], None]) -> None:
        """Measure the pass rates of a curriculum, unless an earlier part of this run has."""
        curriculum = self._curriculum
        if curriculum is None or self._profiled == (due := curriculum.config.profile_step(step)):
            return
        file = self._folder / _PASS_RATES_FILE
        kept: dict[str, dict[str, list[float]]] = (
            json.loads(file.read_text("utf-8")) if file.exists() else {}
        )
        if str(due) not in kept:
            say(f"Measuring pass rates before update {step + 1}")
            rates = {
                name: self._pass_rates(player, rows, seed=due) for name, rows in self._pools.items()
            }
            kept[str(due)] = rates
            write_json(file, kept)
        curriculum.use(kept[str(due)])
        self._profiled = due

    def _pass_rates(self, player: TaskPlayer, rows: Sequence[Row], *, seed: int) -> list[float]:
        """Mean reward of each task; 0 where every rollout failed."""
        assert self._run.curriculum is not None
        samples = self._run.curriculum.samples
        rewards: dict[int, list[float]] = {}
        for rollout in player.play(rows, group_size=samples, seed=seed):
            if rollout.reward is not None:
                rewards.setdefault(rollout.group, []).append(rollout.reward)
        means = {group: sum(found) / len(found) for group, found in rewards.items()}
        return [means.get(group, 0.0) for group in range(len(rows))]


class RLPlayer:
    """The `Player` of a run: plays its tasks with its engines."""

    def __init__(self, tasks: RunTasks, engines: Engines, *, say: Callable[[str], None]) -> None:
        self._tasks, self._engines, self._say = tasks, engines, say

    @property
    def num_restarts(self) -> int:
        """Engines that failed and were replaced."""
        return self._engines.num_restarts

    def play(self, step: int) -> UpdateRollouts:
        """The rollouts of the update that follows so many updates."""
        return self._tasks.play(self._engines, step, say=self._say)

    def look(self, num_tasks: int, *, when: str, on_ended: OnEnded) -> list[RolloutRecord]:
        """A rollout of each of so many different held-out tasks of every environment."""
        return self._tasks.look(self._engines, num_tasks, when=when, on_ended=on_ended)

    def install(self, weights: PublishedWeights, *, running: RunningRequests) -> int:
        """Have the engines take up the newest weights; returns their version."""
        return self._engines.install(weights, running=running)

    def use_threads(self, count: int) -> None:
        """Have the engines compute with so many threads, all together, from the next step on."""
        self._engines.use_threads(count)

    def close(self) -> None:
        """End the engines."""
        self._engines.close()
