"""Executes a reinforcement learning run: rollouts, updates, held-out rewards and a report.

Engines and trainer take turns (`rl_turns.py`), so a run that was interrupted goes on to the same
losses; or engines play the rollouts of the next updates meanwhile (`rl_ahead.py`).

With an adapter, the engine's model shares all tensors with the trained one but for those that the
adapter changes: of them it has merged copies, which are written again after each update. Beside
quantized weights it has copies of the adapter instead, and the result is the adapter alone.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nemotron3.config import from_record, to_record, write_json
from nemotron3.environments.registry import environment_files
from nemotron3.environments.rows import prompt_text
from nemotron3.errors import DataError
from nemotron3.models.costs import model_costs
from nemotron3.models.lora import (
    changed_parameters,
    has_quantized_base,
    merge_into,
    shared_model,
)
from nemotron3.models.nemotron_h import LanguageModel, ModelOutput
from nemotron3.observe.json_lines import append_lines
from nemotron3.observe.report import write_report
from nemotron3.observe.rollouts import write_rollouts_page
from nemotron3.ops.backends import recorded_backends
from nemotron3.ops.cross_entropy import token_logprobs
from nemotron3.ops.linear import linear
from nemotron3.recipes.adapters import check_stored_weights, model_to_train
from nemotron3.recipes.chat_model import save_chat_adapter, save_chat_model
from nemotron3.recipes.input_files import check_model_directory, model_files, record_input_files
from nemotron3.recipes.memory import announce_memory
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_ahead import RolloutsAhead
from nemotron3.recipes.rl_engine import check_drafts
from nemotron3.recipes.rl_summary import RLSummary, rl_report, rl_summary, run_failures
from nemotron3.recipes.rl_turns import RolloutsByTurns
from nemotron3.recipes.run_folder import BEFORE_FILE, ROLLOUTS_FILE, RunCallback, RunFolder
from nemotron3.recipes.run_lock import holds_folder
from nemotron3.rl.alarms import Alarms
from nemotron3.rl.batches import policy_batches
from nemotron3.rl.groups import UpdateRollouts
from nemotron3.rl.policy_objective import PolicyBatch, PolicyObjective
from nemotron3.rl.records import (
    AFTER_TRAINING,
    BEFORE_TRAINING,
    RolloutRecord,
    means_by_environment,
    rollout_record,
)
from nemotron3.rl.rollouts import Rollout, failure_of
from nemotron3.runtime.devices import describe_device, measure_product_rate
from nemotron3.training.trained_parameters import trained_text
from nemotron3.training.trainer import Trainer

_LOGGED_GROUPS = 2
"""Groups of each environment that are kept of a logged update."""


@holds_folder()
def rl(run: RLRun, *, runs: Path = Path("runs"), callback: RunCallback | None = None) -> RLSummary:
    """Carry out `run` in the folder runs/NAME, from where it stands there."""
    callback = callback or RunCallback()
    started = time.perf_counter()
    folder = RunFolder(run, runs=runs)
    if (finished := folder.summary(RLSummary)) is not None:
        callback.stage(f"{folder.path} is finished; this is what it showed")
        return finished

    check_model_directory(run.model)
    check_stored_weights(run.model, run.lora, run.training.precision)
    check_drafts(run)
    own = [file for config in run.environments for file in environment_files(config.name)]
    announce_memory(run, folder.device, callback)
    rollouts = (RolloutsAhead if run.asynchronous.is_ahead else RolloutsByTurns)(run, folder)
    with rollouts:
        training = _Training(folder, run, callback, rollouts)
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
        failures=run_failures(folder.path),
        held_out_tasks=run.final_held_out_tasks,
        parameters=costs.total + costs.mtp_parameters,
        seconds=time.perf_counter() - started,
    )
    folder.record({"backends": {**rollouts.backends, **backends}})
    write_rollouts_page(folder.path / ROLLOUTS_FILE, title=run.name)
    write_report(folder.path, summary=rl_report(run, summary, folder.device))
    folder.finish(summary)
    return summary


class _Training:
    """The trainer of one run, and what it does with rollouts."""

    def __init__(
        self,
        folder: RunFolder[RLRun],
        run: RLRun,
        callback: RunCallback,
        rollouts: RolloutsByTurns | RolloutsAhead,
    ) -> None:
        self.folder, self.run, self.callback = folder, run, callback
        callback.stage(f"Reading {run.model}")
        self.model = model_to_train(
            run.model,
            run.lora,
            precision=run.training.precision,
            device=folder.device,
            seed=run.seed,
        )
        self._played = self.model if run.lora is None else shared_model(self.model)
        """The model that plays: in the same memory, or with merged copies of adapted weights."""
        self._published = run.lora and changed_parameters(self._played, run.lora)
        self._merged: int | None = None  # updates after which the copies were written
        self._reference = self._load_reference()
        self._rollouts = rollouts
        if isinstance(rollouts, RolloutsAhead):
            self.model.register_forward_pre_hook(rollouts.share_processors)
        self._alarms = Alarms(run.alarms, callback.stage)
        self._step = 0
        self._update = UpdateRollouts()
        self._failures: set[tuple[str, str, str | None]] = set()
        """Kinds of failures of which a rollout is kept."""

    def before(self) -> list[RolloutRecord]:
        """Held-out tasks played by the model that training starts from."""
        file = self.folder.path / BEFORE_FILE
        if file.exists():
            return [from_record(RolloutRecord, r) for r in json.loads(file.read_text("utf-8"))]
        self.callback.stage("Playing held-out tasks before training")
        self._publish(0)
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
        total = num_tasks * len(self._rollouts.tasks.environments)

        def on_ended(count: int) -> None:
            self.callback.progress("held-out tasks", count, total)

        return self._rollouts.look(num_tasks, when=when, say=self.callback.stage, on_ended=on_ended)

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
            data_metrics=self._metrics,
        )
        self.callback.stage(trained_text(self.model))
        self.callback.stage(f"Training on {describe_device(device)}")
        self.folder.fit(trainer, self.callback)
        self._publish(trainer.step)

    def save(self) -> None:
        """Write the result, with the tokenizer and template that it was trained with."""
        tasks = self._rollouts.tasks
        if self.run.lora is not None:
            save_chat_adapter(
                self.model,
                self.run.lora,
                tasks.tokenizer,
                tasks.template,
                self.folder.adapter,
                base=self.run.model,
            )
        if has_quantized_base(self.model):
            return
        save_chat_model(self._played, tasks.tokenizer, tasks.template, self.folder.model)

    def _load_reference(self) -> LanguageModel | None:
        """The frozen model that the policy is held to, where the loss has a KL."""
        if not self.run.loss.kl:
            return None
        if self.run.lora is not None:
            return shared_model(self.model, {}).eval()
        return LanguageModel.from_pretrained(self.run.model, device=self.folder.device).eval()

    def _batches(self, step: int) -> Sequence[PolicyBatch]:
        run, self._step = self.run, step
        self._publish(step)
        self._update = self._rollouts.take(step, say=self.callback.stage)
        self._log_rollouts(
            step, groups=0 if step % run.log_rollouts_every_steps else _LOGGED_GROUPS
        )
        batches = policy_batches(
            self._update.trained,
            self._update.advantages,
            max_tokens=run.training.seq_len * run.training.microbatch_size,
            # Depths of multi-token prediction need the one token that comes next.
            shares_prompts=self.model.config.continues_prefixes and not run.loss.mtp_loss_scaling,
            shaping=run.shaping,
            version=step,
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

    def _publish(self, step: int) -> None:
        """Give the engines the weights after so many updates, which are their version."""
        if self._played is not self.model and step != self._merged:
            merge_into(self._played, self.model)
            self._merged = step
        self._rollouts.publish(self._played, step, names=self._published)

    def _metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What there is to say of the rollouts of an update with these metrics."""
        found = self._update.metrics() | self._rollouts.metrics()
        return found | self._alarms.check({**metrics, **found}, update=self._step + 1)

    @torch.inference_mode()
    def _with_reference(self, batch: PolicyBatch) -> PolicyBatch:
        if self._reference is None:
            return batch

        def head(output: ModelOutput) -> torch.Tensor:
            return token_logprobs(output.hidden[0], output.output_weight, batch.targets)

        found = self._reference(batch.tokens, layout=batch.layout, head=head)
        return replace(batch, reference_logprobs=found)

    def _held_out_metrics(self, step: int) -> dict[str, float]:
        self._publish(step)
        played = self.look(self.run.held_out_tasks, when=f"held-out tasks at step {step}")
        rewards = means_by_environment(played, lambda record: record.reward)
        return {f"eval/reward{'' if n == 'all' else '/' + n}": v for n, v in rewards.items()}

    def _log_rollouts(self, step: int, *, groups: int) -> None:
        """Keep the first `groups` of each environment, and the first failure of each kind."""
        update = self._update
        advantages = {
            id(rollout): advantage
            for rollout, advantage in zip(update.trained, update.advantages, strict=True)
        }
        prompts: dict[str, list[str]] = {}
        kept: list[RolloutRecord] = []
        for rollout in update.played:
            first = prompts.setdefault(rollout.environment, [])
            prompt = prompt_text(rollout.row) if groups else ""
            if prompt not in first and len(first) < groups:
                first.append(prompt)
            if prompt in first or self._fails_anew(rollout):
                advantage = advantages.get(id(rollout))
                kept.append(
                    rollout_record(
                        rollout,
                        when=f"step {step}",
                        advantage=advantage,
                        shaping=self.run.shaping,
                    )
                )
        self._keep(kept)

    def _fails_anew(self, rollout: Rollout) -> bool:
        failure = failure_of(rollout)
        if failure is None:
            return False
        kind = (rollout.environment, failure.kind, failure.raised_at)
        is_new = kind not in self._failures
        self._failures.add(kind)
        return is_new

    def _keep(self, records: Sequence[RolloutRecord]) -> None:
        """Append the records of a moment; those of it and of later ones are played again."""
        if records:
            append_lines(
                self.folder.path / ROLLOUTS_FILE,
                map(to_record, records),
                is_stale=lambda kept: kept["when"] == records[0].when,
            )
