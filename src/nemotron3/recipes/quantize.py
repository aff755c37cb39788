"""Quantizes a model directory: formats, scales, what it costs, and a directory that is read as any.

Scales of weights are computed from the weights. Text is for the scales of activations, for the
comparison with the original, for a search of formats, and for a distillation.
"""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from nemotron3.config import RUN_FILE, write_json
from nemotron3.data import FilesConfig
from nemotron3.data.documents import find_files
from nemotron3.errors import ConfigError
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.huggingface import (
    StoredQuantization,
    published_weights,
    stored_key_scales,
    stored_weight_format,
)
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.rounded_activations import can_round_activations, round_activations
from nemotron3.observe.metrics import read_metrics
from nemotron3.ops.nvfp4 import Scales
from nemotron3.ops.weights import WeightFormat
from nemotron3.quantization import (
    Comparison,
    Format,
    MatrixReport,
    calibrate,
    can_quantize_by_matrix,
    compare,
    formats_for,
    matrix_reports,
    quantize_by_matrix,
    quantized_model,
    total_bits,
)
from nemotron3.quantization.calibration import Calibration
from nemotron3.quantization.report import Distillation, QuantizationSummary, write_pages
from nemotron3.quantization.search import FrontierPoint, frontier_of_experts, search
from nemotron3.quantization.sensitivity import Sensitivity, fisher_diagonal, sensitivities
from nemotron3.recipes.distill import DistillRun, announce_distillation, distilled
from nemotron3.recipes.input_files import check_model_directory, model_files, record_input_files
from nemotron3.recipes.quantize_text import QuantizeText, open_text
from nemotron3.recipes.run_folder import METRICS_FILE, SUMMARY_FILE, RunCallback, RunFolder
from nemotron3.recipes.run_lock import folder_lock
from nemotron3.runtime.devices import DeviceName, resolve_device
from nemotron3.training.trainer import TrainingConfig

REPORT_FOLDER = "quantization"


@dataclass(frozen=True, kw_only=True)
class QuantizePlan:
    """What is quantized, and how."""

    format: Format
    """nvfp4, fp8 or int8, or the published mix of the first two."""
    scales: Scales | None = None
    """How NVFP4 chooses block scales; None for the smallest squared error."""
    out: Path | None = None
    """The directory to write; None for one beside the model."""
    texts: tuple[FilesConfig, ...] = ()
    """Text for calibration and comparison; none for that of the model's run."""
    num_tokens: int = 32_768
    """Most tokens for calibration, and as many for the comparison."""
    bits: float | None = None
    """Bits per element of all parameters, for which the mix is searched; None for the published
    mix."""
    kv_cache: Literal["fp8", "none"] | None = None
    """Whether scales of keys and values are written, with which engines keep them in FP8; None for
    where text is at hand and the format has a published form."""
    distill: TrainingConfig | None = None
    """How the quantized model is trained to predict what the plain one does; None for not at
    all."""
    device: DeviceName = "auto"


def quantize_directory(
    path: Path, plan: QuantizePlan, callback: RunCallback | None = None
) -> tuple[Path, QuantizationSummary]:
    """Write the quantized model and its report; returns the directory and the report's content.

    A distillation that was interrupted goes on. Raises ConfigError, CheckpointError or DataError
    before anything is computed.
    """
    check_model_directory(path)
    out = plan.out or path.with_name(f"{path.name}-{plan.format}")
    _check_out(out, plan)
    if (held := stored_weight_format(path)) is not None:
        raise ConfigError(f"{path} holds {held} weights already; give the plain model")
    scales: Scales = plan.scales or "mse"
    if plan.scales is not None and plan.format in ("fp8", "int8"):
        raise ConfigError(
            f"is {plan.scales!r}, which is for blocks of NVFP4; {plan.format} has none",
            field="scales",
        )
    if plan.bits is not None and (plan.format != "mixed" or not plan.bits > 0):
        raise ConfigError(
            f"is {plan.bits:g} with format {plan.format!r}; a budget is above 0, and for 'mixed'",
            field="bits",
        )
    if plan.kv_cache == "fp8" and plan.format == "int8":
        raise ConfigError(
            "is 'fp8', and int8 has no published form, which such scales are part of; leave it out",
            field="kv_cache",
        )
    run = _distill_run(path, plan, scales)
    callback = callback or RunCallback()
    folder = out / REPORT_FOLDER
    lock = nullcontext() if plan.distill is None else folder_lock(folder, say=callback.stage)
    with open_text(path, plan.texts, plan.num_tokens) as text, lock:
        return out, _quantize(path, replace(plan, scales=scales), run, out, text, callback)


def _check_out(out: Path, plan: QuantizePlan) -> None:
    """Raise ConfigError for a directory with content, unless it is of such a distillation."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    folder = out / REPORT_FOLDER
    if not (folder / RUN_FILE).exists() or (folder / SUMMARY_FILE).exists():
        raise ConfigError(f"is {out}, which exists and is not empty; name a new one", field="out")
    if plan.distill is None:
        raise ConfigError(
            f"is {out}, where a distillation was begun; go on with the options that began it, name "
            "a new directory, or delete this one",
            field="out",
        )


def _quantize(
    path: Path,
    plan: QuantizePlan,
    run: DistillRun | None,
    out: Path,
    text: QuantizeText,
    callback: RunCallback,
) -> QuantizationSummary:
    assert plan.scales is not None
    scales: Scales = plan.scales
    for name, is_asked, need in (
        ("bits", plan.bits is not None, "weigh matrices with"),
        ("distill", plan.distill is not None, "train on"),
        ("kv_cache", plan.kv_cache == "fp8", "find scales with"),
    ):
        if is_asked and not text.calibration:
            raise ConfigError(f"needs text to {need}; text: {text.origin}", field=name)
    device = resolve_device(plan.device)
    in_memory = text.calibration or device.type != "cpu"
    if not in_memory and can_quantize_by_matrix(path, plan.format):
        made = quantize_by_matrix(path, out, plan.format, scales=scales)
        summary = _summary(path, plan, made.model, made.quantized, made.reports, text, None)
        return _written(out, summary)
    folder = None if run is None else _distill_folder(run, path, out)
    model = LanguageModel.from_pretrained(path, device=device).eval()
    found: list[Sensitivity] = []
    frontier: list[FrontierPoint] = []
    if plan.bits is None:
        formats = formats_for(model, plan.format)
    else:
        fisher = fisher_diagonal(model, text.calibration)
        found = sensitivities(model, fisher, scales=scales)
        formats, frontier = search(model, found, plan.bits)
    quantized = quantized_model(model, formats, scales=scales)
    comparison = compare(model, quantized, text.held_out) if text.held_out else None
    plain, before = model, None
    if folder is not None:
        before = comparison
        plain = _distilled(folder, model, formats, text, callback)
        quantized = quantized_model(plain, formats, scales=scales)
        comparison = compare(model, quantized, text.held_out)
    if text.calibration:
        _attach_scales(plan, quantized, calibrate(plain, text.calibration, formats))
    rounded: Comparison | None = None
    if text.held_out and can_round_activations(quantized):
        rounded = compare(model, round_activations(quantized, "int8"), text.held_out)
    reports = matrix_reports(model, quantized, formats)
    quantized.save_pretrained(out)
    summary = _summary(path, plan, model, quantized, reports, text, comparison)
    summary = replace(summary, rounded_activations=rounded)
    if _has_key_scales(quantized) and text.held_out:
        narrow = StatePrecision(keys="float8")
        narrow = compare(model, quantized, text.held_out, state=narrow)
        summary = replace(summary, fp8_keys=narrow)
    if folder is not None:
        assert before is not None
        summary = replace(summary, distillation=_distillation(folder, before))
        shutil.rmtree(folder.checkpoints().directory)
    if found:
        summary = replace(
            summary,
            sensitivities=tuple(found),
            frontier=tuple(frontier),
            frontier_of_experts=tuple(frontier_of_experts(model, found)),
        )
    return _written(out, summary)


def _distill_run(path: Path, plan: QuantizePlan, scales: Scales) -> DistillRun | None:
    if plan.distill is None:
        return None
    return DistillRun(
        name=REPORT_FOLDER,
        device=plan.device,
        model=str(path),
        format=plan.format,
        scales=scales,
        bits=plan.bits,
        texts=plan.texts,
        num_tokens=plan.num_tokens,
        training=plan.distill,
    )


def _distill_folder(run: DistillRun, path: Path, out: Path) -> RunFolder[DistillRun]:
    """The folder of a distillation, of which the same inputs are to be at hand."""
    folder = RunFolder(run, runs=out)
    texts = [file for text in run.texts for file in find_files(str(text.path))]
    record_input_files(folder.path, [*model_files(path), *texts])
    return folder


def _distilled(
    folder: RunFolder[DistillRun],
    model: LanguageModel,
    formats: dict[str, WeightFormat],
    text: QuantizeText,
    callback: RunCallback,
) -> LanguageModel:
    announce_distillation(folder.run, model, formats, folder.device, callback)
    folder.record({})
    return distilled(folder, model, formats, text, callback)


def _distillation(folder: RunFolder[DistillRun], before: Comparison) -> Distillation:
    training = folder.run.training
    measured = read_metrics(folder.path / METRICS_FILE)
    return Distillation(
        steps=training.steps,
        tokens=training.steps * training.tokens_per_step,
        learning_rate=training.optimizer.lr,
        before=before,
        divergences=tuple((step, m["eval/kl"]) for step, m in measured if "eval/kl" in m),
    )


def _written(out: Path, summary: QuantizationSummary) -> QuantizationSummary:
    folder = out / REPORT_FOLDER
    folder.mkdir(exist_ok=True)
    write_json(folder / SUMMARY_FILE, summary)
    write_pages(folder, summary)
    return summary


def _summary(
    path: Path,
    plan: QuantizePlan,
    model: LanguageModel,
    quantized: LanguageModel,
    reports: list[MatrixReport],
    text: QuantizeText,
    comparison: Comparison | None,
) -> QuantizationSummary:
    narrow = [report for report in reports if report.bits_per_element < 16]
    error = sum(report.squared_error for report in narrow)
    norm = sum(report.squared_norm for report in narrow)
    bits, elements = total_bits(quantized)
    return QuantizationSummary(
        model=str(path),
        format=plan.format,
        scales=str(plan.scales) if plan.format in ("nvfp4", "mixed") else "none",
        bits_per_element=bits,
        original_bits_per_element=total_bits(model)[0],
        elements=elements,
        relative_error=(error / norm) ** 0.5 if norm else 0.0,
        calibration_tokens=sum(len(batch.tokens) for batch in text.calibration),
        comparison=comparison,
        text=text.origin,
        matrices=tuple(reports),
    )


def _attach_scales(plan: QuantizePlan, quantized: LanguageModel, found: Calibration) -> None:
    """Scales of activations go into the files beside the weights, as `input_scale`; those of keys
    and values beside their projections."""
    companions = quantized.companions
    if companions is None or plan.format == "int8":
        return
    names = published_weights(quantized, quantized.config, companions)
    scales: dict[str, Tensor] = {}
    for layer, pair in found.keys.items() if plan.kv_cache != "none" else ():
        for which, scale in zip("kv", pair, strict=True):
            (published,) = names[f"{layer}.{which}_proj.weight"]
            scales[f"{published.removesuffix('weight')}{which}_scale"] = scale.reshape(1).cpu()
    for parameter, scale in found.activations.items():
        published = names[parameter]
        # Matrices that are one of ours (gate and value of SwiGLU) have the same input.
        each = scale.reshape(-1).repeat_interleave(len(published) // scale.numel()).cpu()
        for name, own in zip(published, each, strict=True):
            scales[name.removesuffix("weight") + "input_scale"] = own.clone()
    stored = StoredQuantization(
        formats={}, scales=scales, vectors=frozenset(), config_field=None, hf_quant_config=None
    )
    quantized.companions = replace(companions, quantization=stored)


def _has_key_scales(quantized: LanguageModel) -> bool:
    return bool(stored_key_scales(quantized, quantized.companions))
