"""The report of a quantization: a record, and pages in Markdown and HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemotron3.observe.page import captioned, section, table, write_page
from nemotron3.observe.plots import Series, bars, lines
from nemotron3.quantization.comparison import Comparison
from nemotron3.quantization.search import FrontierPoint, expected_kl
from nemotron3.quantization.sensitivity import Sensitivity
from nemotron3.quantization.weight_errors import MatrixReport

MARKDOWN_FILE, HTML_FILE = "report.md", "report.html"
_ROUNDING = 1e-6
"""Of bits per element, which are added up in two ways."""
_COLUMNS = ("matrix", "format", "elements", "bits", "error", "worst expert")
_RIGHT = ("error", "bits", "worst expert")
_SENSITIVITY_COLUMNS = ("matrix", "format", "nats per token", "worst expert")
_EXPECTED = (
    "Expected KL divergence to the original if only this matrix is rounded, from the second-order "
    "expansion of the loss; the search adds these up."
)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What the quantized model was trained on, and what it was before."""

    steps: int
    tokens: int
    learning_rate: float
    """The highest."""
    before: Comparison
    """The model of the same formats without training."""
    divergences: tuple[tuple[int, float], ...]
    """KL divergence to the original on held-out text after some numbers of updates."""


@dataclass(frozen=True, kw_only=True)
class QuantizationSummary:
    """What was done and what it costs."""

    model: str
    format: str
    scales: str
    """How block scales of NVFP4 were chosen."""
    bits_per_element: float
    """Of all parameters, those that are not quantized included."""
    original_bits_per_element: float
    elements: int
    relative_error: float
    """|W - Q| / |W| of all quantized matrices together."""
    calibration_tokens: int
    """0 where there was no text: the result has no scales of activations."""
    comparison: Comparison | None
    """None where there was no text."""
    rounded_activations: Comparison | None = None
    """The same with activations in int8 (ops/weights/integer.py), where the model can be run so."""
    text: str
    """Where the text is from, or why there was none."""
    matrices: tuple[MatrixReport, ...]
    sensitivities: tuple[Sensitivity, ...] = ()
    """Expected divergence of each matrix in each format; of a search only."""
    frontier: tuple[FrontierPoint, ...] = ()
    """What the search can reach, plain model first."""
    frontier_of_experts: tuple[FrontierPoint, ...] = ()
    """What it could if each expert had a format of its own (decision 0025)."""
    fp8_keys: Comparison | None = None
    """The quantized model with keys and values in FP8, by the scales in the files; None where there
    are no such scales."""
    distillation: Distillation | None = None
    """None where nothing was trained: then weights are the original's, rounded."""


def write_pages(folder: Path, summary: QuantizationSummary) -> None:
    """Write report.md and report.html."""
    title = f"Quantization to {summary.format}: {summary.model}"
    rows = [_row(report) for report in summary.matrices]
    text = [f"# {title}", "", lead(summary), "", f"Text: {summary.text}.", ""]
    text += _markdown(("", "value"), summary_rows(summary))
    text += ["", "Error is |W - Q| / |W| of a matrix, or of all experts of a layer.", ""]
    text += _markdown(_COLUMNS, rows)
    expected = [_sensitivity_row(each) for each in summary.sensitivities]
    if expected:
        text += ["", "## Expected divergence", "", _EXPECTED, ""]
        text += _markdown(_SENSITIVITY_COLUMNS, expected)
    (folder / MARKDOWN_FILE).write_text("\n".join(text) + "\n", encoding="utf-8")
    narrow = {_short(r.name): 100 * r.relative_error for r in summary.matrices if r.relative_error}
    largest = dict(sorted(narrow.items(), key=lambda item: -item[1])[:20])
    figure = captioned(
        "Largest errors",
        "|W - Q| / |W| in per cent, of a matrix or of all experts of a layer.",
        bars(largest, highlighted=next(iter(largest), "")),
    )
    body = section("Result", [table(("", "value"), summary_rows(summary), right=("value",))])
    if summary.distillation is not None:
        body += section("Distillation", [_divergences(summary.distillation)])
    body += section("Error", [figure])
    body += section("Bits and divergence", [_frontier(summary)])
    body += section("Matrices", [table(_COLUMNS, rows, right=_RIGHT)])
    if expected:
        shown = table(_SENSITIVITY_COLUMNS, expected, right=_SENSITIVITY_COLUMNS[2:])
        body += section("Expected divergence", [shown])
    write_page(
        folder / HTML_FILE,
        title=title,
        lead=f"{lead(summary)} Text: {summary.text}.",
        body=body,
        footer="Written by nemotron3 quantize from summary.json.",
    )


def _short(name: str) -> str:
    """What tells a matrix apart, where there is little room: layers.4.fc2_latent_proj."""
    return name.removeprefix("backbone.").removesuffix(".weight").replace(".mixer.", ".")


def lead(summary: QuantizationSummary) -> str:
    """One sentence with the outcome."""
    bits = f"{summary.bits_per_element:.2f} bits per element"
    before = f"{summary.original_bits_per_element:.2f} before"
    found = summary.comparison
    if found is None:
        return f"{bits}, {before}; no text was at hand to measure the loss with."
    return (
        f"{bits}, {before}; the loss on held-out text is {found.loss:.4f}, "
        f"{found.loss - found.original_loss:+.4f} against the original."
    )


def summary_rows(summary: QuantizationSummary) -> list[tuple[str, str]]:
    """The figures of the whole model."""
    rows = [
        ("bits per element", f"{summary.bits_per_element:.3f}"),
        ("before", f"{summary.original_bits_per_element:.3f}"),
        ("parameters", f"{summary.elements:,}"),
        ("weight error", f"{100 * summary.relative_error:.2f}%"),
        ("scales of NVFP4 blocks", summary.scales),
        ("tokens for activation scales", f"{summary.calibration_tokens:,}"),
    ]
    if summary.frontier:
        bits = summary.bits_per_element + _ROUNDING
        rows += [
            ("expected KL", f"{expected_kl(summary.frontier, bits):.2e}"),
            (
                "expected KL, experts apart",
                f"{expected_kl(summary.frontier_of_experts, bits):.2e}",
            ),
        ]
    found = summary.comparison
    if found is not None:
        rows += [
            ("held-out tokens", f"{found.num_tokens:,}"),
            ("loss, nats per token", f"{found.loss:.4f}"),
            ("loss of the original", f"{found.original_loss:.4f}"),
            ("KL to the original, nats per token", f"{found.kl:.5f}"),
            ("same first choice", f"{100 * found.top1_agreement:.2f}%"),
        ]
    if summary.fp8_keys is not None:
        rows += [
            ("loss with FP8 keys and values", f"{summary.fp8_keys.loss:.4f}"),
            ("KL with FP8 keys and values", f"{summary.fp8_keys.kl:.5f}"),
        ]
    trained = summary.distillation
    if trained is not None:
        before = trained.before
        rows += [
            ("updates of distillation", f"{trained.steps:,}"),
            ("tokens of distillation", f"{trained.tokens:,}"),
            ("highest learning rate", f"{trained.learning_rate:g}"),
            ("loss before distillation", f"{before.loss:.4f}"),
            ("KL before distillation", f"{before.kl:.5f}"),
            ("same first choice before", f"{100 * before.top1_agreement:.2f}%"),
        ]
    rounded = summary.rounded_activations
    if rounded is not None:
        rows += [
            ("loss with int8 activations", f"{rounded.loss:.4f}"),
            ("KL with int8 activations", f"{rounded.kl:.5f}"),
            ("same first choice with them", f"{100 * rounded.top1_agreement:.2f}%"),
        ]
    return rows


def _row(report: MatrixReport) -> tuple[str, ...]:
    worst = ""
    if report.worst_expert is not None and report.worst_expert_error is not None:
        worst = f"{report.worst_expert}: {100 * report.worst_expert_error:.2f}%"
    error = f"{100 * report.relative_error:.2f}%" if report.relative_error else ""
    bits = f"{report.bits_per_element:.2f}"
    return report.name, report.format, f"{report.elements:,}", bits, error, worst


def _sensitivity_row(found: Sensitivity) -> tuple[str, ...]:
    worst = ""
    if found.expert_kl:
        expert = max(range(len(found.expert_kl)), key=found.expert_kl.__getitem__)
        worst = f"{expert}: {found.expert_kl[expert]:.2e}"
    return " and ".join(found.matrices), found.format, f"{found.kl:.2e}", worst


def _divergences(trained: Distillation) -> str:
    steps, values = zip((0, trained.before.kl), *trained.divergences, strict=True)
    path = Series(label="held-out text", steps=np.array(steps), values=np.array(values))
    return captioned(
        "KL divergence to the original",
        "In nats per token on held-out text, before the first update and after others.",
        lines([path], y_label="nats per token", x_label="updates", is_smoothed=False),
    )


def _frontier(summary: QuantizationSummary) -> str:
    if not summary.frontier:
        return ""
    paths = [
        Series(
            label=label,
            steps=np.array([point.bits_per_element for point in points]),
            values=np.array([point.kl for point in points]),
        )
        for label, points in (
            ("a format for each matrix, and for the experts of a layer", summary.frontier),
            ("a format for each expert", summary.frontier_of_experts),
        )
        if points
    ]
    return captioned(
        "Frontier",
        "Expected KL divergence to the original in nats per token, over bits per element of all "
        "parameters: from the plain model to the fewest bits, a matrix at a time. Experts of a "
        "layer have one format; the second line is what single experts would allow.",
        lines(paths, y_label="nats per token", x_label="bits per element", is_smoothed=False),
    )


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    every = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in every]
