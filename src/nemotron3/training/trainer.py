"""The training loop: batches in, weights out, and nothing lost in between.

Everything random is a function of counters (the data of a step, the initial weights), so a
checkpoint is the weights, the moments and the step, and a run that was killed goes on bit for bit
as if it had not been. The loop draws nothing and evaluates nothing by itself: it calls back.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nemotron3.checkpoint.store import Checkpoint, CheckpointStore
from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.models.accounting import forward_flops_per_token
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig, apply_precision
from nemotron3.observe.metrics import MetricLog
from nemotron3.parallel.devices import synchronize
from nemotron3.training.losses import LossConfig, Targets
from nemotron3.training.optimizers import (
    AdamWConfig,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from nemotron3.training.schedules import Schedule
from nemotron3.training.step import training_step

_log = logging.getLogger(__name__)

_MODEL, _OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained."""

    steps: int
    """Optimizer updates in all."""
    batch_size: int
    """Sequences per update."""
    microbatch_size: int
    """Sequences per forward pass; gradients accumulate over batch_size / microbatch_size passes."""
    seq_len: int
    """Tokens per sequence."""
    optimizer: AdamWConfig
    """The optimizer and its peak learning rate."""
    schedule: Schedule
    """The course of the learning rate."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss terms and expert balancing."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """What products run in."""
    recompute: bool = False
    """Keep only the inputs of blocks and compute the rest again in the backward pass."""
    evaluate_every_steps: int = 100
    """Updates between looks at held-out text; there is one at the end in any case."""
    checkpoint_every_steps: int = 100
    """Updates between checkpoints; there is one at the end in any case."""
    measure_every_steps: int = 10
    """Updates between measurements of the residual stream."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "microbatch_size", "seq_len", "evaluate_every_steps")
        for name in (*positive, "checkpoint_every_steps", "measure_every_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.batch_size % self.microbatch_size:
            raise ConfigError(
                f"training.batch_size is {self.batch_size} and microbatch_size "
                f"{self.microbatch_size}; a batch must be a whole number of microbatches"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one update has to say, for those who watch."""

    step: int
    """Updates made, this one included."""
    metrics: dict[str, float]
    """The update's metrics."""


BatchSource = Callable[[int], Sequence[Targets]]
"""The microbatches of the update that follows so many updates."""
Evaluation = Callable[[LanguageModel], dict[str, float]]


class Trainer:
    """Trains a model, from its newest checkpoint where there is one."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainingConfig,
        *,
        batches: BatchSource,
        evaluation: Evaluation,
        store: CheckpointStore,
        peak_flops: float,
    ) -> None:
        """`peak_flops` is the machine's product rate, which achieved FLOP/s are held against."""
        self.model = model
        self.config = config
        self.step = 0
        self._batches = batches
        self._evaluation = evaluation
        self._store = store
        self._peak_flops = peak_flops
        apply_precision(model, config.precision)
        self._optimizer = build_optimizer(model, config.optimizer)
        flops = forward_flops_per_token(model.config, context=config.seq_len, with_mtp=True)
        self._flops_per_step = 3 * flops * config.tokens_per_step

    def resume(self) -> int:
        """Take up the newest sound checkpoint, if any; returns the updates already made."""
        if self._store.latest() is None:
            return 0
        checkpoint = self._store.load()
        self._load_weights(model_weights(checkpoint))
        load_optimizer_tensors(self._optimizer, self.model, _part(checkpoint, _OPTIMIZER))
        self.step = checkpoint.step
        _log.info("resumed at step %d", self.step)
        return self.step

    def fit(self, log: MetricLog, *, on_step: Callable[[StepReport], None]) -> None:
        """Train to the last step, logging, evaluating and saving on the way."""
        config = self.config
        while self.step < config.steps:
            metrics = self._timed_step()
            self.step += 1
            is_last = self.step == config.steps
            if is_last or self.step % config.evaluate_every_steps == 0:
                metrics |= self._evaluation(self.model)
            log.log(self.step, metrics)
            if is_last or self.step % config.checkpoint_every_steps == 0:
                self.save()
            on_step(StepReport(step=self.step, metrics=metrics))

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        tensors = {_MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
        moments = optimizer_tensors(self._optimizer, self.model)
        tensors |= {_OPTIMIZER + name: tensor for name, tensor in moments.items()}
        self._store.save(self.step, tensors=tensors, state={})

    def _load_weights(self, saved: dict[str, Tensor]) -> None:
        ours = self.model.state_dict()
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
        self.model.load_state_dict(saved)

    def _timed_step(self) -> dict[str, float]:
        config = self.config
        start = time.perf_counter()
        metrics = training_step(
            self.model,
            self._optimizer,
            self._batches(self.step),
            loss=config.loss,
            learning_rate=config.schedule.learning_rate(self.step, peak=config.optimizer.lr),
            clip_grad_norm=config.optimizer.clip_grad_norm,
            recompute=config.recompute,
            measure=(self.step + 1) % config.measure_every_steps == 0,
        )
        synchronize(self.model.device)
        seconds = time.perf_counter() - start
        rate = self._flops_per_step / seconds
        return metrics | {
            "perf/tokens_per_s": config.tokens_per_step / seconds,
            "perf/flops_per_s": rate,
            "perf/peak_fraction": rate / self._peak_flops,
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
