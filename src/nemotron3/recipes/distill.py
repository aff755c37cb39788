"""Quantization-aware distillation: a quantized model is trained to predict what the plain one does.

The student computes with rounded weights (quantization/student.py) and learns the distributions of
the plain model on text, which needs no labels and no other data than any text of its kind (Super
report, appendix on QAD). All is that of any training: the loop, checkpoints, metrics.

Its folder is that of the report in the new model's directory. An interrupted distillation goes on
from the newest checkpoint there; checkpoints, three times as large as the model, are deleted when
the result stands.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from nemotron3.data import Batch, FilesConfig, Loader, PhaseConfig, PhaseSchedule
from nemotron3.errors import ConfigError
from nemotron3.models.costs import forward_flops_per_token
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.linear import linear
from nemotron3.ops.nvfp4 import Scales
from nemotron3.ops.segments import Segments
from nemotron3.ops.weights import WeightFormat
from nemotron3.quantization import Format, compare, quantized_model
from nemotron3.quantization.student import student_of, unrounded_model
from nemotron3.recipes.memory import announce_plan, needed_bytes
from nemotron3.recipes.memory_remedies import Settings, find_remedy
from nemotron3.recipes.quantize_text import QuantizeText
from nemotron3.recipes.run_config import RunConfig
from nemotron3.recipes.run_folder import RunCallback, RunFolder
from nemotron3.runtime.devices import (
    describe_device,
    has_memory_of_its_own,
    measure_product_rate,
)
from nemotron3.runtime.memory import MemoryPart, MemoryPlan, plan_of, usable_memory_bytes
from nemotron3.training.distill_objective import DistillBatch, DistillObjective
from nemotron3.training.memory_plan import training_parts
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.schedules import Cosine
from nemotron3.training.trainer import Trainer, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class DistillRun(RunConfig):
    """Everything that decides what a distillation does."""

    kind: Literal["distill"] = "distill"
    model: str
    """Directory of the plain model, the teacher."""
    format: Format
    scales: Scales
    bits: float | None
    """Bits per element for which a mix of formats is searched; null for that of `format`."""
    texts: tuple[FilesConfig, ...]
    """Text to train on; empty for that of the model's run."""
    num_tokens: int
    """Most tokens for scales, and as many for the comparison."""
    training: TrainingConfig
    """Steps, batch, optimizer, schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training.precision.recipe != "plain":
            raise ConfigError(
                f"is {self.training.precision.recipe!r}, which rounds the operands of training, "
                "and the weights are rounded to the result's formats already; leave it at 'plain'",
                field="training.precision.recipe",
            )
        if self.training.bias_update_rate:
            raise ConfigError(
                f"is {self.training.bias_update_rate}; experts are balanced as the teacher's, so "
                "it must be 0",
                field="training.bias_update_rate",
            )


def distill_training(steps: int, *, seq_len: int) -> TrainingConfig:
    """How a student is trained if nothing else is said."""
    return TrainingConfig(
        steps=steps,
        batch_size=4,
        microbatch_size=4,
        seq_len=seq_len,
        optimizer=AdamWConfig(lr=4e-5, weight_decay=0.0),
        schedule=Cosine(total_steps=steps, warmup_steps=min(10, steps - 1), final_fraction=0.05),
        bias_update_rate=0.0,
    )


def announce_distillation(
    run: DistillRun,
    model: LanguageModel,
    formats: Mapping[str, WeightFormat],
    device: torch.device,
    callback: RunCallback,
) -> None:
    """Say what it costs; ConfigError where the device cannot hold it."""
    dtype = run.training.precision.dtype
    held = sum(tensor.nbytes for tensor in model.parameters())
    if model.compute_dtype != dtype:
        held += sum(dtype.itemsize * tensor.numel() for tensor in model.parameters())

    gpu_bytes = usable_memory_bytes(device) if has_memory_of_its_own(device) else None

    def plan(training: TrainingConfig) -> MemoryPlan:
        parts = training_parts(
            model.config, training, mtp_depths=0, rounded=formats.keys(), gpu_bytes=gpu_bytes
        )
        return plan_of([*parts, MemoryPart(name="plain model", num_bytes=held)])

    announce_plan(
        plan(run.training),
        device,
        callback,
        remedy=lambda usable: find_remedy(
            Settings(run.training, None),
            lambda changed: plan(changed.training),
            model.config,
            usable=usable,
            needed=lambda found: needed_bytes(found, device),
            may_adapt=False,
        ),
    )
    config = run.training
    tokens = config.steps * config.tokens_per_step
    # Three passes for the student, one for the teacher.
    flops = 4.0 * tokens * forward_flops_per_token(model.config, context=config.seq_len)
    rate = measure_product_rate(device, dtype, product=linear)
    callback.stage(
        f"Distilling takes {config.steps:,} updates on {tokens:,} tokens, {flops / 1e12:,.1f} "
        f"TFLOP: {flops / rate / 60:,.1f} minutes if all of it ran as fast as a product does here"
    )


def distilled(
    folder: RunFolder[DistillRun],
    model: LanguageModel,
    formats: Mapping[str, WeightFormat],
    text: QuantizeText,
    callback: RunCallback,
) -> LanguageModel:
    """The trained model before it is rounded, from where the folder stands.

    `model` is the teacher, which stays as it is.
    """
    run = folder.run
    config, dtype = run.training, run.training.precision.dtype
    teacher = model if model.compute_dtype == dtype else copy.deepcopy(model).to(dtype)
    teacher.requires_grad_(False)
    loader = _loader(run, text)
    passes = config.batch_size // config.microbatch_size

    def batches(step: int) -> list[DistillBatch]:
        parts = (
            loader.batch(step, microbatch=part, num_microbatches=passes) for part in range(passes)
        )
        return [_distill_batch(teacher, part) for part in parts]

    def evaluation(student: LanguageModel) -> dict[str, float]:
        plain = unrounded_model(student, model)
        found = compare(model, quantized_model(plain, formats, scales=run.scales), text.held_out)
        return {
            "eval/loss": found.loss,
            "eval/kl": found.kl,
            "eval/agreement": found.top1_agreement,
        }

    student = student_of(model, formats, scales=run.scales)
    trainer = Trainer(
        student,
        config,
        objective=DistillObjective(teacher.output_weight),
        batches=batches,
        evaluation=evaluation,
        store=folder.checkpoints(),
        peak_flops=measure_product_rate(folder.device, dtype, product=linear),
    )
    callback.stage(f"Distilling on {describe_device(folder.device)}")
    folder.fit(trainer, callback)
    return unrounded_model(student, model)


def _loader(run: DistillRun, text: QuantizeText) -> Loader:
    config, files = run.training, dict(text.training)
    schedule = PhaseSchedule.build(
        (PhaseConfig(),),
        total_samples=config.steps * config.batch_size,
        num_tokens={name: file.num_tokens for name, file in files.items()},
    )
    return Loader(
        files, schedule, seq_len=config.seq_len, batch_size=config.batch_size, seed=run.seed
    )


@torch.no_grad()
def _distill_batch(teacher: LanguageModel, batch: Batch) -> DistillBatch:
    moved = batch.to(teacher.device)
    segments = Segments(moved.lengths)
    return DistillBatch(
        tokens=moved.tokens,
        targets=moved.targets,
        mask=moved.loss_mask,
        segments=segments,
        teacher_hidden=teacher.hidden_states(moved.tokens, layout=SequenceLayout(segments)),
    )
