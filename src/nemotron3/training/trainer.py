"""The training loop, with checkpoints and exact resuming.

Everything random (the data of a step, the initial weights) is a function of seed and counters, so a
checkpoint consists of the weights, the optimizer's moments and the step. A run that was killed and
resumed is bit for bit the same as an uninterrupted one. Data and evaluation come from callbacks.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

from torch import Tensor

from nemotron3.checkpoint.store import Checkpoint, CheckpointStore
from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.models.costs import forward_flops_per_token
from nemotron3.models.lora import is_adapted, trained_tensors
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig, apply_precision
from nemotron3.observe.metrics import MetricLog
from nemotron3.runtime.devices import synchronize
from nemotron3.training.objective import BatchT, Objective, Stateful
from nemotron3.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from nemotron3.training.parameter_groups import (
    ParameterGroupConfig,
    freeze_parameters,
    freeze_unread_parameters,
)
from nemotron3.training.schedules import Schedule
from nemotron3.training.step import TrainingStep

_log = logging.getLogger(__name__)

_MODEL, _OPTIMIZER, _OBJECTIVE = "model.", "optimizer.", "objective."


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained."""

    steps: int
    """Total number of optimizer updates."""
    batch_size: int
    """Sequences per update."""
    microbatch_size: int
    """Sequences per forward pass; gradients accumulate over batch_size / microbatch_size passes."""
    seq_len: int
    """Tokens per sequence."""
    optimizer: OptimizerConfig
    """The optimizer and its peak learning rate."""
    schedule: Schedule
    """The learning-rate schedule."""
    parameter_groups: tuple[ParameterGroupConfig, ...] = ()
    """Parameters with their own learning rate or weight decay, and frozen parameters."""
    bias_update_rate: float = 1e-3
    """Change of each expert's selection bias per update (the default is the reports'); 0 keeps the
    biases."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """The dtype of activations, and the number formats of products."""
    recompute: bool = False
    """Activation checkpointing: keep only the inputs of blocks and recompute the rest in the
    backward pass."""
    evaluate_every_steps: int = 100
    """Updates between evaluations on held-out text; there is always one at the end."""
    checkpoint_every_steps: int = 100
    """Updates between checkpoints; there is always one at the end."""
    measure_every_steps: int = 10
    """Updates between measurements of the residual stream."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "microbatch_size", "seq_len", "evaluate_every_steps")
        for name in (*positive, "checkpoint_every_steps", "measure_every_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"is {getattr(self, name)}; it must be 1 or more", field=name)
        if self.batch_size % self.microbatch_size:
            raise ConfigError(
                f"is {self.microbatch_size} and {{other}} is {self.batch_size}; a batch must be a "
                f"whole number of microbatches",
                field="microbatch_size",
                other="batch_size",
            )
        switch = self.precision.nvfp4.fprop_steps
        if switch is not None and switch >= self.steps:
            raise ConfigError(
                f"is {switch} and {{other}} is {self.steps}, so the forward pass would be rounded "
                "to the end; make it less, or null",
                field="precision.nvfp4.fprop_steps",
                other="steps",
            )
        if not self.bias_update_rate >= 0:
            raise ConfigError(
                f"is {self.bias_update_rate}; it must be 0 or more", field="bias_update_rate"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The progress and metrics of one update, for callbacks."""

    step: int
    """Updates made, this one included."""
    steps: int
    """Total number of updates."""
    metrics: dict[str, float]
    """The update's metrics."""


Evaluation = Callable[[LanguageModel], dict[str, float]]


class Trainer(Generic[BatchT]):
    """Trains a model by an objective, starting from the newest checkpoint if there is one."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainingConfig,
        *,
        objective: Objective[BatchT],
        batches: Callable[[int], Sequence[BatchT]],
        evaluation: Evaluation,
        store: CheckpointStore,
        peak_flops: float,
        data_metrics: Callable[[Mapping[str, float]], dict[str, float]] = dict,
    ) -> None:
        """`batches(n)` returns the microbatches of the update that follows n updates.

        `data_metrics` returns metrics of the last of them, such as the rewards of rollouts; its
        argument are the metrics of the update.

        `peak_flops` is the machine's peak FLOP/s, the denominator of `perf/peak_fraction`.
        """
        self.model = model
        self.config = config
        self.step = 0
        self._batches = batches
        self._evaluation = evaluation
        self._data_metrics = data_metrics
        self._store = store
        self._peak_flops = peak_flops
        self._objective = objective
        if config.bias_update_rate and is_adapted(model):
            raise ConfigError(
                f"is {config.bias_update_rate}, and the model has an adapter, which holds no "
                "selection biases; set it to 0",
                field="bias_update_rate",
            )
        apply_precision(model, config.precision)
        freeze_parameters(model, config.parameter_groups)
        freeze_unread_parameters(model, mtp_depths=objective.mtp_depths)
        self._optimizer = build_optimizer(model, config.optimizer, config.parameter_groups)
        self._update = TrainingStep(
            model,
            self._optimizer,
            objective,
            clip_grad_norm=config.optimizer.clip_grad_norm,
            bias_update_rate=config.bias_update_rate,
            recompute=config.recompute,
        )
        self._flops_per_token = 3 * forward_flops_per_token(
            model.config, context=config.seq_len, with_mtp=objective.mtp_depths > 0
        )

    def resume(self) -> int:
        """Load the newest intact checkpoint, if any; returns the number of updates already made."""
        if self._store.latest() is None:
            return 0
        checkpoint = self._store.load()
        self._load_weights(model_weights(checkpoint))
        self._load_objective(_part(checkpoint, _OBJECTIVE))  # it decides what has moments
        load_optimizer_tensors(self._optimizer, self.model, _part(checkpoint, _OPTIMIZER))
        self.step = self._update.updates = checkpoint.step
        _log.info("resumed at step %d", self.step)
        return self.step

    def fit(self, log: MetricLog, *, on_step: Callable[[StepReport], None]) -> None:
        """Train to the last step, with logging, evaluations and checkpoints."""
        config = self.config
        while self.step < config.steps:
            metrics = self._timed_step()
            metrics |= self._data_metrics(metrics)
            self.step += 1
            is_last = self.step == config.steps
            if is_last or self.step % config.evaluate_every_steps == 0:
                metrics |= self._evaluation(self.model)
            log.log(self.step, metrics)
            if is_last or self.step % config.checkpoint_every_steps == 0:
                self.save()
            on_step(StepReport(step=self.step, steps=config.steps, metrics=metrics))

    def save(self) -> None:
        """Write a checkpoint of the current step: weights, optimizer, and the objective's state.

        Of a model with an adapter, the weights are those of the adapter: no others change.
        """
        tensors = {_MODEL + name: t for name, t in trained_tensors(self.model).items()}
        moments = optimizer_tensors(self._optimizer, self.model)
        tensors |= {_OPTIMIZER + name: tensor for name, tensor in moments.items()}
        if isinstance(self._objective, Stateful):
            own = self._objective.state_dict()
            tensors |= {_OBJECTIVE + name: tensor for name, tensor in own.items()}
        self._store.save(self.step, tensors=tensors, state={})

    def _load_objective(self, saved: dict[str, Tensor]) -> None:
        ours = self._objective.state_dict().keys() if isinstance(self._objective, Stateful) else ()
        if difference := sorted(saved.keys() ^ set(ours)):
            raise CheckpointError(
                f"the checkpoint in {self._store.directory} is of another objective "
                f"({len(difference)} names of its state differ, first {difference[0]!r}); name "
                "another run, or train with the configuration that made it"
            )
        if isinstance(self._objective, Stateful):
            self._objective.load_state_dict(saved)

    def _load_weights(self, saved: dict[str, Tensor]) -> None:
        ours = trained_tensors(self.model)
        differing = sorted(
            name
            for name in saved.keys() | ours.keys()
            if name not in saved or name not in ours or saved[name].shape != ours[name].shape
        )
        if differing:
            raise CheckpointError(
                f"the checkpoint in {self._store.directory} is of another model ({len(differing)} "
                f"tensors differ, first {differing[0]!r}); name another run, or train with the "
                "configuration that made it"
            )
        self.model.load_state_dict(saved, strict=False)  # the names were compared

    def _timed_step(self) -> dict[str, float]:
        config = self.config
        start = time.perf_counter()
        batches = self._batches(self.step)
        metrics = self._update(
            batches,
            learning_rate=config.schedule.learning_rate(self.step, peak=config.optimizer.lr),
            measure=(self.step + 1) % config.measure_every_steps == 0,
        )
        synchronize(self.model.device)
        seconds = time.perf_counter() - start
        rate = sum(batch.segments.total for batch in batches) / seconds
        return metrics | {
            "perf/tokens_per_s": rate,
            "perf/flops_per_s": rate * self._flops_per_token,
            "perf/peak_fraction": rate * self._flops_per_token / self._peak_flops,
        }


def model_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's tensors in a training checkpoint, by their names in the model."""
    return _part(checkpoint, _MODEL)


def _part(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }
