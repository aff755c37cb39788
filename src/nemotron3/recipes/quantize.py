"""Quantizes a model directory: formats, scales, what it costs, and a directory that is read as any.

Text for calibration and for the comparison with the original is that of the run that the model
belongs to, its training text and its held-out text; or files, of which every second window is for
calibration and the others for the comparison.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from nemotron3.config import write_json
from nemotron3.data import (
    Batch,
    FilesConfig,
    PreparedCorpus,
    ReadReport,
    TokenFile,
    TokenFileWriter,
    held_out_batches,
    read_documents,
)
from nemotron3.errors import ConfigError, DataError
from nemotron3.models.huggingface import (
    StoredQuantization,
    published_weights,
    read_config,
    stored_weight_format,
)
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.rounded_activations import can_round_activations, round_activations
from nemotron3.ops.nvfp4 import Scales
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
from nemotron3.quantization.report import QuantizationSummary, write_pages
from nemotron3.quantization.search import FrontierPoint, search
from nemotron3.quantization.sensitivity import Sensitivity, fisher_diagonal, sensitivities
from nemotron3.recipes.input_files import INPUTS_FILE, check_model_directory
from nemotron3.runtime.devices import resolve_device
from nemotron3.text import Tokenizer

REPORT_FOLDER = "quantization"
SUMMARY_FILE = "summary.json"
_SEQ_LEN = 512


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
    device: str = "auto"


@dataclass(frozen=True)
class _Text:
    """Windows of tokens, and where they are from."""

    calibration: list[Batch]
    held_out: list[Batch]
    origin: str


def quantize_directory(path: Path, plan: QuantizePlan) -> tuple[Path, QuantizationSummary]:
    """Write the quantized model and its report; returns the directory and the report's content.

    Raises ConfigError, CheckpointError or DataError before anything is computed.
    """
    check_model_directory(path)
    out = plan.out or path.with_name(f"{path.name}-{plan.format}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"is {out}, which exists and is not empty; name a new one", field="out")
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
    text = _text_for(path, plan)
    if plan.bits is not None and not text.calibration:
        raise ConfigError(f"needs text to weigh matrices with; text: {text.origin}", field="bits")
    device = resolve_device(plan.device)
    in_memory = text.calibration or device.type != "cpu"
    if not in_memory and can_quantize_by_matrix(path, plan.format):
        made = quantize_by_matrix(path, out, plan.format, scales=scales)
        summary = _summary(path, plan, made.model, made.quantized, made.reports, text, None)
        return out, _written(out, summary)
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
    activations = calibrate(model, text.calibration, formats) if text.calibration else {}
    comparison = compare(model, quantized, text.held_out) if text.held_out else None
    rounded: Comparison | None = None
    if text.held_out and can_round_activations(quantized):
        rounded = compare(model, round_activations(quantized, "int8"), text.held_out)
    reports = matrix_reports(model, quantized, formats)
    _attach_scales(quantized, activations)
    quantized.save_pretrained(out)
    summary = _summary(path, plan, model, quantized, reports, text, comparison)
    summary = replace(
        summary,
        rounded_activations=rounded,
        sensitivities=tuple(found),
        frontier=tuple(frontier),
    )
    return out, _written(out, summary)


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
    text: _Text,
    comparison: Comparison | None,
) -> QuantizationSummary:
    narrow = [report for report in reports if report.bits_per_element < 16]
    error = sum(report.squared_error for report in narrow)
    norm = sum(report.squared_norm for report in narrow)
    bits, elements = total_bits(quantized)
    return QuantizationSummary(
        model=str(path),
        format=plan.format,
        scales=plan.scales or "mse" if plan.format in ("nvfp4", "mixed") else "none",
        bits_per_element=bits,
        original_bits_per_element=total_bits(model)[0],
        elements=elements,
        relative_error=(error / norm) ** 0.5 if norm else 0.0,
        calibration_tokens=sum(len(batch.tokens) for batch in text.calibration),
        comparison=comparison,
        text=text.origin,
        matrices=tuple(reports),
    )


def _attach_scales(quantized: LanguageModel, activations: dict[str, Tensor]) -> None:
    """Scales of activations go into the files beside the weights, as `input_scale`."""
    companions = quantized.companions
    if not activations or companions is None:
        return
    names = published_weights(quantized, quantized.config, companions)
    scales: dict[str, Tensor] = {}
    for parameter, scale in activations.items():
        published = names[parameter]
        # Matrices that are one of ours (gate and value of SwiGLU) have the same input.
        each = scale.reshape(-1).repeat_interleave(len(published) // scale.numel()).cpu()
        for name, own in zip(published, each, strict=True):
            scales[name.removesuffix("weight") + "input_scale"] = own.clone()
    found = StoredQuantization(
        formats={}, scales=scales, vectors=frozenset(), config_field=None, hf_quant_config=None
    )
    quantized.companions = replace(companions, quantization=found)


def _text_for(path: Path, plan: QuantizePlan) -> _Text:
    seq_len = min(_SEQ_LEN, read_config(path).max_position_embeddings)
    most = max(1, plan.num_tokens // seq_len)
    if plan.texts:
        windows = list(_windows_of_files(path, plan.texts, seq_len, 2 * most))
        if len(windows) < 2:
            raise DataError(
                f"the text has one window of {seq_len} tokens; one half is for calibration and the "
                "other for the comparison, so give more text"
            )
        named = ", ".join(str(text.path) for text in plan.texts)
        return _Text(windows[::2], windows[1::2], f"{named}: alternate windows")
    folder = _corpus_folder(path)
    if folder is None:
        return _Text([], [], "none: the model belongs to no run whose text is at hand; give --data")
    corpus = PreparedCorpus(folder)
    share = max(1, most // len(corpus.names))
    training, held_out = (
        [window for name, file in files.items() for window in _windows(name, file, seq_len, share)]
        for files in (corpus.train, corpus.held_out)
    )
    return _Text(training, held_out, f"the run's own: training text, and held-out text ({folder})")


def _windows(name: str, file: TokenFile, seq_len: int, most: int) -> Iterator[Batch]:
    return held_out_batches(file, name=name, seq_len=seq_len, batch_size=1, max_rows=most)


def _corpus_folder(path: Path) -> Path | None:
    """The prepared text of the run that a model belongs to."""
    record = path.resolve().parent / INPUTS_FILE
    if not record.is_file():
        return None
    named = json.loads(record.read_text("utf-8")).get("corpus_folder")
    return Path(named) if named and Path(named).is_dir() else None


def _windows_of_files(
    path: Path, texts: tuple[FilesConfig, ...], seq_len: int, most: int
) -> Iterator[Batch]:
    tokenizer = Tokenizer.from_directory(path)
    with TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        with TokenFileWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
            for text in texts:
                for document in read_documents(text, ReadReport()):
                    ids = tokenizer.encode(document.text, parse_special=False)
                    writer.add([*ids, tokenizer.eos_id])
        yield from _windows("text", TokenFile(prefix), seq_len, most)
