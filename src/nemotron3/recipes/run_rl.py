"""Executes a reinforcement learning run: rollouts, updates, held-out rewards and a report.

Engine and trainer take turns in one process and share one model in memory: after an update the
engine forgets what the old weights computed, and nothing is copied. An update's rollouts follow
from its step, the seed and the weights, so a run that was interrupted goes on to the same losses.

With an adapter, the engine's model shares all tensors with the trained one but for those that the
adapter changes: of them it has merged copies, which are written again after each update.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nemotron3.config import from_record, to_record, write_json
from nemotron3.data.chat_tokens import check_chat_tokens
from nemotron3.environments.environment import Environment
from nemotron3.environments.registry import environment_files, load_environment
from nemotron3.environments.rows import Row
from nemotron3.errors import ConfigError, DataError
from nemotron3.evaluation.environments import held_out_tasks, play_tasks
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.models.costs import model_costs
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.lora import merge_into, shared_model
from nemotron3.models.nemotron_h import LanguageModel, ModelOutput
from nemotron3.observe.report import write_report
from nemotron3.observe.rollouts import write_rollouts_page
from nemotron3.ops.backends import recorded_backends
from nemotron3.ops.cross_entropy import token_logprobs
from nemotron3.ops.linear import linear
from nemotron3.recipes.adapters import model_to_train
from nemotron3.recipes.chat_model import chat_template_for, save_chat_adapter, save_chat_model
from nemotron3.recipes.input_files import model_files, record_input_files
from nemotron3.recipes.memory import announce_memory, bytes_for_keys
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_summary import RLSummary, rl_report, rl_summary
from nemotron3.recipes.run_folder import BEFORE_FILE, ROLLOUTS_FILE, RunCallback, RunFolder
from nemotron3.rl.batches import policy_batches
from nemotron3.rl.curriculum import Curriculum
from nemotron3.rl.groups import UpdateRollouts, collect
from nemotron3.rl.policy_objective import PolicyBatch, PolicyObjective
from nemotron3.rl.records import (
    AFTER_TRAINING,
    BEFORE_TRAINING,
    RolloutRecord,
    means_by_environment,
    rollout_record,
)
from nemotron3.rl.rollouts import Rollout, RolloutDriver, failure_of
from nemotron3.rl.sampling_plan import SamplingPlan, TaskPlan
from nemotron3.runtime.devices import describe_device, measure_product_rate
from nemotron3.text import Tokenizer
from nemotron3.training.trained_parameters import trained_text
from nemotron3.training.trainer import Trainer

_PASS_RATES_FILE = "pass_rates.json"
_LOGGED_GROUPS = 2
"""Groups of each environment that are kept of a logged update."""


def rl(run: RLRun, *, runs: Path = Path("runs"), callback: RunCallback | None = None) -> RLSummary:
    """Carry out `run` in the folder runs/NAME, from where it stands there."""
    callback = callback or RunCallback()
    started = time.perf_counter()
    folder = RunFolder(run, runs=runs)
    if (finished := folder.summary(RLSummary)) is not None:
        callback.stage(f"{folder.path} is finished; this is what it showed")
        return finished

    own = [file for config in run.environments for file in environment_files(config.name)]
    announce_memory(run, folder.device, callback)
    training = _Training(folder, run, callback)
    record_input_files(folder.path, [*model_files(run.model), *own])
    folder.record({})
    with recorded_backends() as backends:
        before = training.before()
        training.fit()
        callback.stage("Writing the model")
        training.save()
        after = training.after()
    costs = model_costs(training.model.config)
    summary = rl_summary(
        before,
        after,
        held_out_tasks=run.final_held_out_tasks,
        parameters=costs.total + costs.mtp_parameters,
        seconds=time.perf_counter() - started,
    )
    folder.record({"backends": backends})
    write_rollouts_page(folder.path / ROLLOUTS_FILE, title=run.name)
    write_report(folder.path, summary=rl_report(run, summary, folder.device))
    folder.finish(summary)
    return summary


class _Training:
    """Engine and trainer of one run."""

    def __init__(self, folder: RunFolder[RLRun], run: RLRun, callback: RunCallback) -> None:
        self.folder, self.run, self.callback = folder, run, callback
        callback.stage(f"Reading {run.model}")
        self.tokenizer = Tokenizer.from_directory(run.model)
        self.template = chat_template_for(run.chat_style, self.tokenizer, run.model)
        self.model = model_to_train(run.model, run.lora, device=folder.device, seed=run.seed)
        self._played = self.model if run.lora is None else shared_model(self.model)
        """The model that plays: in the same memory, or with merged copies of adapted weights."""
        self._reference = self._load_reference()
        self.environments: dict[str, Environment] = {}
        weights: dict[str, float] = {}
        for config in run.environments:
            environment = load_environment(config.name, difficulty=config.difficulty)
            if environment.name in self.environments:
                raise ConfigError(
                    f"environments has two named {environment.name!r}; a batch has each once"
                )
            self.environments[environment.name] = environment
            weights[environment.name] = config.weight
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
            self._played,
            tokenizer=self.tokenizer,
            config=EngineConfig(
                max_num_seqs=run.max_num_seqs,
                max_model_len=run.rollouts.max_context,
                max_draft_tokens=0,
                return_routed_experts=run.replays_routes,
                kv_cache_bytes=bytes_for_keys(run, folder.device),
            ),
        )
        self._driver = RolloutDriver(
            self._llm,
            self.tokenizer,
            self.template,
            self.environments,
            run.rollouts,
        )
        self._update = UpdateRollouts()

    def before(self) -> list[RolloutRecord]:
        """Held-out tasks played by the model that training starts from."""
        file = self.folder.path / BEFORE_FILE
        if file.exists():
            return [from_record(RolloutRecord, r) for r in json.loads(file.read_text("utf-8"))]
        self.callback.stage("Playing held-out tasks before training")
        played = self.look(self.run.final_held_out_tasks, when=BEFORE_TRAINING)
        self._keep(played)
        write_json(file, played)
        return played

    def after(self) -> list[RolloutRecord]:
        """The same tasks played by the result."""
        self.callback.stage("Playing held-out tasks")
        played = self.look(self.run.final_held_out_tasks, when=AFTER_TRAINING)
        self._keep(played)
        return played

    def look(self, num_tasks: int, *, when: str) -> list[RolloutRecord]:
        """A rollout of each of so many different held-out tasks of every environment."""
        every = [held_out_tasks(each, num_tasks) for each in self.environments.values()]
        return play_tasks(self._driver, [row for rows in every for row in rows], when=when)

    def fit(self) -> None:
        """Train to the last step."""
        config, device = self.run.training, self.folder.device
        trainer = Trainer(
            self.model,
            config,
            objective=PolicyObjective(
                self.run.loss, num_mtp_depths=self.model.config.pattern.num_mtp_depths
            ),
            batches=self._batches,
            evaluation=lambda _: self._held_out_metrics(trainer.step),
            store=self.folder.checkpoints(),
            peak_flops=measure_product_rate(device, config.precision.dtype, product=linear),
            data_metrics=lambda: self._update.metrics(),
        )
        self._played.activation_dtype = self.model.activation_dtype  # the trainer has set it
        self.callback.stage(trained_text(self.model))
        self.callback.stage(f"Training on {describe_device(device)}")
        self.folder.fit(trainer, self.callback)
        self._renew_engine(trainer.step)

    def save(self) -> None:
        """Write the result, with the tokenizer and template that it was trained with."""
        if self.run.lora is not None:
            save_chat_adapter(
                self.model,
                self.run.lora,
                self.tokenizer,
                self.template,
                self.folder.adapter,
                base=self.run.model,
            )
        save_chat_model(self._played, self.tokenizer, self.template, self.folder.model)

    def _load_reference(self) -> LanguageModel | None:
        """The frozen model that the policy is held to, where the loss has a KL."""
        if not self.run.loss.kl:
            return None
        if self.run.lora is not None:
            return shared_model(self.model, {}).eval()
        return LanguageModel.from_pretrained(self.run.model, device=self.folder.device).eval()

    def _batches(self, step: int) -> Sequence[PolicyBatch]:
        self._renew_engine(step)
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

        self._update = collect(
            self._plan,
            play,
            step,
            rounds=run.max_rounds,
            config=run.advantages,
            shaping=run.shaping,
        )
        if step % run.log_rollouts_every_steps == 0:
            self._log_rollouts(step)
        batches = policy_batches(
            self._update.trained,
            self._update.advantages,
            max_tokens=run.training.seq_len * run.training.microbatch_size,
            shaping=run.shaping,
            device=self.model.device,
        )
        if not batches:
            failures = [failure for r in self._update.played if (failure := failure_of(r))]
            why = (
                f"the first of {len(failures)} failures: {failures[0].message}; "
                if failures
                else ""
            )
            raise DataError(
                f"no rollout of update {step + 1} can be trained on ({why}a prompt that fills "
                "rollouts.max_context has none either); the same command goes on from the last "
                "checkpoint"
            )
        return [self._with_reference(batch) for batch in batches]

    def _renew_pass_rates(self, step: int) -> None:
        """Measure the pass rates of a curriculum, unless an earlier part of this run has."""
        curriculum = self._curriculum
        if curriculum is None or self._profiled == (due := curriculum.config.profile_step(step)):
            return
        file = self.folder.path / _PASS_RATES_FILE
        kept: dict[str, dict[str, list[float]]] = (
            json.loads(file.read_text("utf-8")) if file.exists() else {}
        )
        if str(due) not in kept:
            self.callback.stage(f"Measuring pass rates before update {step + 1}")
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

    def _renew_engine(self, step: int) -> None:
        """Have the engine forget what other weights computed; its version is the updates made."""
        if step > self._llm.weight_version:
            if self._played is not self.model:
                merge_into(self._played, self.model)
            self._llm.invalidate_caches(version=step)

    @torch.inference_mode()
    def _with_reference(self, batch: PolicyBatch) -> PolicyBatch:
        if self._reference is None:
            return batch

        def head(output: ModelOutput) -> torch.Tensor:
            return token_logprobs(output.hidden[0], output.output_weight, batch.targets)

        found = self._reference(batch.tokens, layout=SequenceLayout(batch.segments), head=head)
        return replace(batch, reference_logprobs=found)

    def _held_out_metrics(self, step: int) -> dict[str, float]:
        self._renew_engine(step)
        played = self.look(self.run.held_out_tasks, when=f"held-out tasks at step {step}")
        rewards = means_by_environment(played, lambda record: record.reward)
        return {f"eval/reward{'' if n == 'all' else '/' + n}": v for n, v in rewards.items()}

    def _log_rollouts(self, step: int) -> None:
        """Keep the first groups of each environment."""
        update = self._update
        advantages = {
            id(rollout): advantage
            for rollout, advantage in zip(update.trained, update.advantages, strict=True)
        }
        groups: dict[str, list[int]] = {}
        kept: list[RolloutRecord] = []
        for rollout in update.played:
            first = groups.setdefault(rollout.environment, [])
            if rollout.group not in first and len(first) < _LOGGED_GROUPS:
                first.append(rollout.group)
            if rollout.group in first:
                advantage = advantages.get(id(rollout))
                kept.append(rollout_record(rollout, when=f"step {step}", advantage=advantage))
        self._keep(kept)

    def _keep(self, records: Sequence[RolloutRecord]) -> None:
        """Append records; a moment that is played again after an interruption is the same."""
        file = self.folder.path / ROLLOUTS_FILE
        kept = file.read_text("utf-8").splitlines() if file.exists() else []
        if records and records[0].when in {json.loads(line)["when"] for line in kept}:
            return
        with file.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(to_record(record)) + "\n" for record in records)
