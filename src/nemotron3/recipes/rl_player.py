"""What plays the tasks of a reinforcement learning run: environments, their plan, and an engine.

A run that trains and plays by turns has one, whose engine works on the model in training. One that
does both at once has a second, with a copy of the model, in another thread or process.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nemotron3.config import write_json
from nemotron3.data.chat_tokens import check_chat_tokens
from nemotron3.environments.environment import Environment
from nemotron3.environments.registry import load_environment
from nemotron3.environments.rows import Row
from nemotron3.errors import ConfigError
from nemotron3.evaluation.environments import held_out_tasks, play_tasks
from nemotron3.inference.llm import LLM
from nemotron3.inference.model_runner.weights import RunningRequests
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.recipes.memory import bytes_for_keys
from nemotron3.recipes.rl import RLRun
from nemotron3.rl.curriculum import Curriculum
from nemotron3.rl.failures import check_rewards
from nemotron3.rl.groups import UpdateRollouts, collect
from nemotron3.rl.records import RolloutRecord
from nemotron3.rl.rollouts import Rollout, RolloutDriver
from nemotron3.rl.sampling_plan import SamplingPlan, TaskPlan
from nemotron3.rl.weight_sync import PublishedWeights, SharedWeights, weights_checksum
from nemotron3.text import Tokenizer

_PASS_RATES_FILE = "pass_rates.json"


class RLPlayer:
    """Plays a run's tasks with one model."""

    def __init__(
        self,
        run: RLRun,
        model: LanguageModel,
        *,
        folder: Path,
        say: Callable[[str], None],
        on_step: Callable[[], None] | None = None,
    ) -> None:
        """`folder` is the run's. `on_step` is that of `RolloutDriver`."""
        self.run, self.model = run, model
        self._folder, self._say = folder, say
        self.tokenizer = Tokenizer.from_directory(run.model)
        self.template = chat_template_for(run.chat_style, self.tokenizer, run.model)
        self.environments, weights = _environments(run)
        has_tools = any(environment.tools for environment in self.environments.values())
        check_chat_tokens(self.tokenizer, with_tools=has_tools)
        plan = SamplingPlan(
            self.environments,
            weights,
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
        self._llm = LLM(
            model,
            tokenizer=self.tokenizer,
            config=run.engine_config(kv_cache_bytes=bytes_for_keys(run, model.device)),
        )
        self._driver = RolloutDriver(
            self._llm,
            self.tokenizer,
            self.template,
            self.environments,
            run.rollouts,
            on_step=on_step,
        )

    def play(self, step: int) -> UpdateRollouts:
        """The rollouts of the update that follows so many updates."""
        self._renew_pass_rates(step)
        self._llm.reset_prefix_cache()  # a run that goes on from here has none either
        run = self.run

        def play(rows: Sequence[Row], round_: int) -> list[Rollout]:
            seed = run.seed * 2**32 + step * run.max_rounds + round_
            return self._driver.play(
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

    def look(self, num_tasks: int, *, when: str) -> list[RolloutRecord]:
        """A rollout of each of so many different held-out tasks of every environment."""
        every = [held_out_tasks(each, num_tasks) for each in self.environments.values()]
        return play_tasks(self._driver, [row for rows in every for row in rows], when=when)

    def renew(self, version: int, *, running: RunningRequests = "recompute") -> None:
        """Have the engine forget what the weights of earlier versions computed."""
        if version > self._llm.weight_version:
            self._llm.invalidate_caches(version=version, running=running)

    def install(
        self, weights: PublishedWeights | SharedWeights, *, running: RunningRequests
    ) -> tuple[int, int]:
        """Take up the newest weights; returns their version and the engine's own checksum."""
        version = weights.write_into(self.model)
        self.renew(version, running=running)
        return version, weights_checksum(self.model)

    def use_threads(self, count: int) -> None:
        """Compute with so many threads from the next step on; they are the calling thread's."""
        torch.set_num_threads(count)

    def close(self) -> None:
        """Nothing goes on when `play` has ended."""

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
        for rollout in self._driver.play(rows, group_size=samples, seed=seed):
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
    """A player with a model of its own, which `install` gives the weights of the trainer."""
    model = LanguageModel.from_pretrained(run.model, device=device, dtype=torch.float32)
    return RLPlayer(run, model.eval(), folder=folder, say=say, on_step=on_step)


def _environments(run: RLRun) -> tuple[dict[str, Environment], dict[str, float]]:
    """Environments and their weights, by name."""
    environments: dict[str, Environment] = {}
    weights: dict[str, float] = {}
    for config in run.environments:
        environment = load_environment(config.name, difficulty=config.difficulty)
        if environment.name in environments:
            raise ConfigError(
                f"environments has two named {environment.name!r}; a batch has each once"
            )
        environments[environment.name] = environment
        weights[environment.name] = config.weight
    return environments, weights
