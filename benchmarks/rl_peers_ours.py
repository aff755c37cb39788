"""Our side of `benchmarks.rl_peers`: engine and trainer on one model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemotron3.environments.registry import load_environment
from nemotron3.environments.rows import Row, prompt_of
from nemotron3.inference.llm import LLM
from nemotron3.inference.output_processor import Prompt
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.recipes.rl import tiny_rl
from nemotron3.rl.advantages import group_advantages
from nemotron3.rl.batches import policy_batches
from nemotron3.rl.policy_objective import PolicyObjective
from nemotron3.rl.rollouts import Rollout, RolloutDriver
from nemotron3.text import Tokenizer
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep

LEARNING_RATE = 1e-7
CLIP_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Turn:
    """What one contestant did in one turn."""

    seconds: float
    tokens: int
    """Of all answers."""


class Ours:
    """Engine and trainer on one model, as a run that takes turns has them."""

    def __init__(self, folder: Path, environments: Sequence[str], *, at_once: int) -> None:
        """`at_once` rollouts are sampled at once, and an update has as many answers.

        Environments of several turns are left out.
        """
        run = replace(tiny_rl(), max_num_seqs=at_once)
        self._run, self.max_tokens, self.group = run, run.rollouts.max_tokens, run.group_size
        self.prompts_per_step = at_once // self.group
        self.model = LanguageModel.from_pretrained(folder, dtype=torch.float32)
        tokenizer = Tokenizer.from_directory(folder)
        self._tokenizer, self._template = tokenizer, chat_template_for(None, tokenizer, str(folder))
        self._environments = {
            name: each
            for name in environments
            if (each := load_environment(name, difficulty=0.0)).max_turns == 1
        }
        self._llm = LLM(self.model, tokenizer=tokenizer, config=run.engine_config())
        self._driver = RolloutDriver(
            self._llm, tokenizer, self._template, self._environments, run.rollouts
        )
        self._update = TrainingStep(
            self.model,
            build_optimizer(self.model, AdamWConfig(lr=LEARNING_RATE, weight_decay=0.0)),
            PolicyObjective(run.loss),
            clip_grad_norm=CLIP_GRAD_NORM,
            bias_update_rate=0.0,
        )
        self._version = 0

    def tasks(self, count: int, *, seed: int) -> list[Row]:
        """Different tasks of all environments in equal shares, as nearly as can be."""
        each = list(self._environments.values())
        drawn = [env.distinct_tasks(-(-count // len(each)), seed=seed) for env in each]
        return [row for rows in zip(*drawn, strict=True) for row in rows][:count]

    def rendered(self, row: Row) -> tuple[str, list[int]]:
        """The prompt of a task as text and as ids."""
        chat = self._template.render(
            prompt_of(row), tools=None, enable_thinking=True, truncate_history_thinking=False
        )
        return chat.text, chat.tokens(self._tokenizer).ids

    def rollouts(self, rows: Sequence[Row], *, seed: int) -> list[Rollout]:
        """An answer to each task, with its reward."""
        return self._driver.play(rows, seed=seed)

    def generate(self, prompts: Sequence[Sequence[int]], *, seed: int) -> Turn:
        """Answer all prompts, with log-probabilities, as in a rollout."""
        self._llm.reset_prefix_cache()
        params = SamplingParams(
            max_tokens=self.max_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=seed, logprobs=0
        )
        start = time.perf_counter()
        given = [Prompt(ids=tuple(p), is_chat=True, is_reasoning_open=True) for p in prompts]
        each = [replace(params, seed=seed + place) for place in range(len(given))]
        found = self._llm.generate(given, each)
        seconds = time.perf_counter() - start
        return Turn(seconds, sum(len(output.outputs[0].token_ids) for output in found))

    def update(self, rows: Sequence[Row], *, seed: int) -> Turn:
        """A whole update, at the end of which the engine has the new weights."""
        start, run = time.perf_counter(), self._run
        rollouts = self._driver.play(rows, group_size=self.group, seed=seed)
        rewards = [rollout.reward for rollout in rollouts]
        assert None not in rewards, "no judge can fail here"
        advantages: list[float] = []
        for first in range(0, len(rewards), self.group):
            group = [float(reward or 0.0) for reward in rewards[first : first + self.group]]
            advantages += group_advantages(group, run.advantages).tolist()
        size = run.training.seq_len * run.training.microbatch_size
        batches = policy_batches(rollouts, advantages, max_tokens=size, shares_prompts=True)
        self._update(batches, learning_rate=LEARNING_RATE)
        self._version += 1
        self._llm.invalidate_caches(version=self._version)
        seconds = time.perf_counter() - start
        return Turn(seconds, sum(rollout.num_sampled for rollout in rollouts))
