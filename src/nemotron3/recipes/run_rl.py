"""Executes a reinforcement learning run: rollouts, updates, held-out rewards and a report.

Engine and trainer take turns in one process and share one model in memory: after an update the
engine forgets what the old weights computed, and nothing is copied. An update's rollouts follow
from its step, the seed and the weights, so a run that was interrupted goes on to the same losses.

With an adapter, the engine's model shares all tensors with the trained one but for those that the
adapter changes: of them it has merged copies, which are written again after each update.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemotron3.config import from_record, to_record, write_json
from nemotron3.data.chat_tokens import check_chat_tokens
from nemotron3.environments.environment import Environment
from nemotron3.environments.registry import load_environment
from nemotron3.environments.response import to_dict
from nemotron3.environments.rows import Row, prompt_text
from nemotron3.errors import ConfigError, DataError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.models.costs import model_costs
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.lora import merge_into, shared_model
from nemotron3.models.nemotron_h import LanguageModel, ModelOutput
from nemotron3.observe.report import ReportSummary, TextSample, write_report
from nemotron3.ops.backends import recorded_backends
from nemotron3.ops.cross_entropy import token_logprobs
from nemotron3.ops.linear import linear
from nemotron3.recipes.adapters import model_to_train
from nemotron3.recipes.chat_model import chat_template_for, save_chat_adapter, save_chat_model
from nemotron3.recipes.input_files import model_files, record_input_files
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.run_folder import RunCallback, RunFolder
from nemotron3.rl.batches import policy_batches
from nemotron3.rl.groups import UpdateRollouts, collect
from nemotron3.rl.policy_objective import PolicyBatch, PolicyObjective
from nemotron3.rl.rollouts import Rollout, RolloutDriver, failure_of
from nemotron3.rl.sampling_plan import SamplingPlan
from nemotron3.runtime.devices import describe_device, measure_product_rate
from nemotron3.text import AssistantMessage, Tokenizer
from nemotron3.training.trained_parameters import trained_text
from nemotron3.training.trainer import Trainer

ROLLOUTS_FILE, _BEFORE_FILE = "rollouts.jsonl", "before.json"
_HELD_OUT_SEED = 0x5EED


@dataclass(frozen=True, kw_only=True)
class RLSummary:
    """What a finished run has to show."""

    reward_before: dict[str, float]
    """Mean reward on held-out tasks before training, by environment; "all" for the mean of them."""
    reward: dict[str, float]
    """The same of the result, on the same tasks with the same seeds."""
    tokens_before: dict[str, float]
    """Sampled tokens of a rollout, by environment."""
    tokens: dict[str, float]
    """The same of the result."""
    held_out_tasks: int
    """Different held-out prompts of each environment."""
    seconds: float
    """Wall time of this call."""
    samples: tuple[dict[str, str], ...]
    """Held-out tasks and what the result did with them."""
    parameters: int
    """Parameters, with multi-token prediction."""


def rl(run: RLRun, *, runs: Path = Path("runs"), callback: RunCallback | None = None) -> RLSummary:
    """Carry out `run` in the folder runs/NAME, from where it stands there."""
    callback = callback or RunCallback()
    started = time.perf_counter()
    folder = RunFolder(run, runs=runs)
    if (finished := folder.summary(RLSummary)) is not None:
        callback.stage(f"{folder.path} is finished; this is what it showed")
        return finished

    own = [Path(config.name) for config in run.environments if config.name.endswith(".py")]
    training = _Training(folder, run, callback)
    record_input_files(folder.path, [*model_files(run.model), *own])
    folder.record({})
    with recorded_backends() as backends:
        before = training.before()
        training.fit()
        callback.stage("Writing the model")
        training.save()
        callback.stage("Playing held-out tasks")
        after = training.look(run.final_held_out_tasks)
    summary = _summary(training, before, after, started)
    folder.record({"backends": backends})
    write_report(folder.path, summary=_report(run, summary, folder.device))
    folder.finish(summary)
    return summary


@dataclass(frozen=True, kw_only=True)
class PlayedTask:
    """A rollout as it is kept."""

    environment: str
    prompt: str
    text: str
    """What followed the prompt, for a person to read."""
    reward: float | None
    failure: str | None
    """Why there is no reward."""
    tokens: int
    """Sampled ones."""
    is_cut: bool


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
        self.plan = SamplingPlan(
            self.environments,
            weights,
            prompts=run.training.batch_size // run.group_size,
            rounds=run.max_rounds,
            seed=run.seed,
        )
        self._llm = LLM(
            self._played,
            tokenizer=self.tokenizer,
            config=EngineConfig(
                max_num_seqs=run.max_num_seqs,
                max_model_len=run.rollouts.max_context,
                max_draft_tokens=0,
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

    def before(self) -> list[PlayedTask]:
        """Held-out tasks played by the model that training starts from."""
        file = self.folder.path / _BEFORE_FILE
        if file.exists():
            return [from_record(PlayedTask, r) for r in json.loads(file.read_text("utf-8"))]
        self.callback.stage("Playing held-out tasks before training")
        played = self.look(self.run.final_held_out_tasks)
        write_json(file, played)
        return played

    def look(self, num_tasks: int) -> list[PlayedTask]:
        """A rollout of each of so many different held-out tasks of every environment."""
        rows: list[Row] = []
        for environment in self.environments.values():
            rows += environment.distinct_tasks(num_tasks, split="held_out", seed=_HELD_OUT_SEED)
        return [played_task(rollout) for rollout in self._driver.play(rows, seed=_HELD_OUT_SEED)]

    def fit(self) -> None:
        """Train to the last step."""
        config, device = self.run.training, self.folder.device
        trainer = Trainer(
            self.model,
            config,
            objective=PolicyObjective(self.run.loss),
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
        run = self.run

        def play(rows: Sequence[Row], round_: int) -> list[Rollout]:
            seed = run.seed * 2**32 + step * run.max_rounds + round_
            return self._driver.play(rows, group_size=run.group_size, seed=seed)

        self._update = collect(self.plan, play, step, rounds=run.max_rounds, config=run.advantages)
        if step % run.log_rollouts_every_steps == 0:
            self._log_rollouts(step)
        batches = policy_batches(
            self._update.trained,
            self._update.advantages,
            max_tokens=run.training.seq_len * run.training.microbatch_size,
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
        rewards = means_by_environment(self.look(self.run.held_out_tasks), lambda task: task.reward)
        return {f"eval/reward{'' if n == 'all' else '/' + n}": v for n, v in rewards.items()}

    def _log_rollouts(self, step: int) -> None:
        """Keep the first group of each environment for the viewer."""
        kept: dict[str, int] = {}
        with (self.folder.path / ROLLOUTS_FILE).open("a", encoding="utf-8") as file:
            for rollout in self._update.played:
                first = kept.setdefault(rollout.environment, rollout.group)
                if rollout.group == first:
                    messages = [to_dict(message) for message in rollout.messages]
                    record = {"step": step, "messages": messages, "row": rollout.row}
                    record |= to_record(played_task(rollout))
                    file.write(json.dumps(record) + "\n")


def played_task(rollout: Rollout) -> PlayedTask:
    """What a rollout came to."""
    return PlayedTask(
        environment=rollout.environment,
        prompt=prompt_text(rollout.row),
        text=as_text(rollout),
        reward=rollout.reward,
        failure=None if (failure := failure_of(rollout)) is None else failure.message,
        tokens=rollout.num_sampled,
        is_cut=rollout.is_cut,
    )


def means_by_environment(
    played: Sequence[PlayedTask], value: Callable[[PlayedTask], float | None]
) -> dict[str, float]:
    """By environment, and "all" for the mean of those; tasks whose value is None are left out."""
    values: dict[str, list[float]] = {}
    for task in played:
        if (found := value(task)) is not None:
            values.setdefault(task.environment, []).append(found)
    means = {name: sum(found) / len(found) for name, found in values.items()}
    return {"all": sum(means.values()) / max(len(means), 1)} | means


def _summary(
    training: _Training,
    before: Sequence[PlayedTask],
    after: Sequence[PlayedTask],
    started: float,
) -> RLSummary:
    costs = model_costs(training.model.config)
    firsts = {task.environment: task for task in reversed(after)}
    return RLSummary(
        reward_before=means_by_environment(before, lambda task: task.reward),
        reward=means_by_environment(after, lambda task: task.reward),
        tokens_before=means_by_environment(before, lambda task: float(task.tokens)),
        tokens=means_by_environment(after, lambda task: float(task.tokens)),
        held_out_tasks=training.run.final_held_out_tasks,
        seconds=time.perf_counter() - started,
        samples=tuple(
            {"prompt": task.prompt, "text": task.text, "environment": name}
            for name, task in sorted(firsts.items())
        ),
        parameters=costs.total + costs.mtp_parameters,
    )


def as_text(rollout: Rollout) -> str:
    """The messages of a rollout for a person to read."""
    lines: list[str] = []
    for message in rollout.messages:
        if isinstance(message, AssistantMessage):
            if message.reasoning:
                lines.append(f"({message.reasoning.strip()})")
            for call in message.tool_calls:
                lines.append(f"[call] {call.name}({json.dumps(dict(call.arguments))})")
        if message.content:
            role = type(message).__name__.removesuffix("Message").lower()
            lines.append(f"[{role}] {message.content}")
    return "\n".join(lines)


def _report(run: RLRun, summary: RLSummary, device: torch.device) -> ReportSummary:
    return ReportSummary(
        title=f"Reinforcement learning: {run.name}",
        command=" ".join(["nemotron3", *sys.argv[1:]]),
        lead=(
            f"{run.model} trained in {len(run.environments)} environments at once, "
            f"{run.training.steps} updates of {run.training.batch_size} rollouts. "
            f"{describe_device(device)}."
        ),
        facts={
            "parameters": f"{summary.parameters / 1e6:.1f} M",
            "held-out reward before": f"{summary.reward_before['all']:.3f}",
            "held-out reward": f"{summary.reward['all']:.3f}",
            "minutes": f"{summary.seconds / 60:.1f}",
        },
        model_name=run.name,
        samples=[
            TextSample(prompt=f"{s['environment']}: {s['prompt']}\n", text=s["text"])
            for s in summary.samples
        ],
        sources=[
            {
                "environment": name,
                "held-out tasks": summary.held_out_tasks,
                "reward before": round(summary.reward_before[name], 3),
                "reward": round(summary.reward[name], 3),
                "tokens before": round(summary.tokens_before[name], 1),
                "tokens": round(summary.tokens[name], 1),
            }
            for name in summary.reward
            if name != "all"
        ],
        config=to_record(run),
    )
