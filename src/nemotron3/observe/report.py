"""One HTML file that shows a run, without network access and scripts.

It is generated from `metrics.jsonl` and a summary, after the run or during it. Figures without data
are omitted. Every string from the run is escaped: samples of a language model are untrusted text.

    write_report(run_dir, summary=ReportSummary(title="tiny", command="make run"))
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemotron3.observe.metrics import read_metrics
from nemotron3.observe.page import captioned, section, table, write_page
from nemotron3.observe.plots import Series, bars, depth_lines, heat_map, lines

METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
Metrics = dict[str, Series]


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """A prompt and the model's continuation."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """The contents of a report that are not in the metrics."""

    title: str
    """Headline, such as "Pre-training: tiny"."""
    command: str
    """The command that repeats the run."""
    lead: str = ""
    """A sentence under the headline: what was trained, on what, where."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Tiles in addition to those from the metrics, by label ("parameters": "4.2 M")."""
    model_name: str = "this model"
    """The model's label among the baselines."""
    bits_per_byte: float | None = None
    """Bits per byte on all held-out text; None for the last evaluation during training, which may
    have used a part of it."""
    baselines: Mapping[str, float] = field(default_factory=dict[str, float])
    """Held-out bits per byte of the baselines, by name."""
    samples: Sequence[TextSample] = ()
    """Text written by the model."""
    sources: Sequence[Mapping[str, str | int | float]] = ()
    """The corpus, a row per source; the keys of the first are the columns (source, licence, …)."""
    tables: Mapping[str, Sequence[Mapping[str, str | int | float]]] = field(
        default_factory=dict[str, Sequence[Mapping[str, str | int | float]]]
    )
    """Further tables by heading, in the form of `sources`; one without rows is omitted."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The resolved configuration as a record."""


def write_report(run_dir: Path, *, summary: ReportSummary) -> Path:
    """Write `report.html` beside `metrics.jsonl`, and return its path."""
    metrics = load_series(run_dir / METRICS_FILE)
    return write_page(
        run_dir / REPORT_FILE,
        title=summary.title,
        lead=summary.lead,
        body=_body(metrics, summary),
        footer=f"Written by nemotron3 from {METRICS_FILE}.",
    )


def load_series(path: Path) -> Metrics:
    """Every metric as a curve, by name; empty if no step was logged."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    if path.exists():
        for step, metrics in read_metrics(path):
            for name, value in metrics.items():
                steps, values = points.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return {
        name: Series(
            label=name, steps=np.array(steps, dtype=float), values=np.array(values, dtype=float)
        )
        for name, (steps, values) in points.items()
    }


def _body(metrics: Metrics, summary: ReportSummary) -> str:
    return "".join(
        [
            _tiles(metrics, summary),
            section("Quality", _quality(metrics, summary)),
            section("Rewards", _rewards(metrics)),
            section("Optimisation", _optimisation(metrics)),
            section("Inside the model", _inside(metrics)),
            section("Speed", _speed(metrics)),
            *(_rows(heading, rows) for heading, rows in summary.tables.items()),
            _samples(summary.samples),
            _rows("Corpus", summary.sources),
            _run(summary),
        ]
    )


def _quality(metrics: Metrics, summary: ReportSummary) -> list[str]:
    is_rl = "reward/mean" in metrics
    main = [] if is_rl else _named(metrics, {"train/loss": "next token"})
    mtp = _numbered(metrics, r"train/loss_mtp_(\d+)", "{} further ahead")
    held_out = _named(metrics, {"eval/bits_per_byte": "held-out"})
    compared = dict(summary.baselines)
    if (final := _final_bits(metrics, summary)) is not None:
        compared[summary.model_name] = final
    best = min(summary.baselines.items(), key=lambda item: item[1], default=None)
    losses = _below(metrics, "eval/loss/")
    accuracy = _numbered(metrics, r"train/mtp_accuracy_(\d+)", "{} further ahead")
    return [
        captioned(
            "Training loss",
            "Cross-entropy in nats per token: of the next token, and of the tokens after it that "
            "the multi-token prediction heads guess.",
            lines([*main, *mtp], y_label="nats per token", scale="log"),
        ),
        captioned(
            "Held-out text, bits per byte",
            "How many bits the model needs for a byte of text it was not trained on; less is "
            "better, and the tokenizer does not matter.",
            bars(compared, highlighted=summary.model_name),
        ),
        captioned(
            "Held-out bits per byte while training",
            "The dashed line is the best baseline.",
            lines(held_out, y_label="bits per byte", reference=best, is_smoothed=False),
        ),
        captioned(
            "Held-out loss while training, by source",
            "Cross-entropy in nats per trained token of conversations that are only looked at.",
            lines(losses, y_label="nats per token", is_smoothed=False),
        ),
        captioned(
            "Multi-token prediction accuracy",
            "How often the first choice of each depth is the token that came; this is what a "
            "draft for speculative decoding lives on.",
            lines(accuracy, y_label="first choice is right", is_percent=True),
        ),
    ]


def _rewards(metrics: Metrics) -> list[str]:
    return [
        captioned(
            "Reward of rollouts, by environment",
            "Mean reward of all rollouts of an update, those of refilled groups included.",
            lines(_below(metrics, "reward/mean/"), y_label="reward"),
        ),
        captioned(
            "Reward on held-out tasks, by environment",
            "One sampled rollout of each of the same tasks, at temperature 1.",
            lines(_below(metrics, "eval/reward/"), y_label="reward", is_smoothed=False),
        ),
        captioned(
            "Tokens of a rollout, by environment",
            "Sampled tokens; growth without reward is verbosity.",
            lines(_below(metrics, "rollouts/tokens/"), y_label="tokens"),
        ),
        captioned(
            "Rollouts that are trained on",
            "Those of groups whose rewards differ; the rest teaches nothing.",
            lines(_below(metrics, "rollouts/trained/"), y_label="rollouts"),
        ),
        captioned(
            "Engine and training apart",
            "Mean difference of log-probabilities between the engine that sampled and the forward "
            "pass that trains.",
            lines(
                _named(metrics, {"policy/logprob_error": "mean |difference|"}),
                y_label="nats",
                scale="log",
            ),
        ),
        captioned(
            "Entropy",
            "Estimated from the log-probabilities of sampled tokens.",
            lines(_named(metrics, {"policy/entropy": "entropy"}), y_label="nats per token"),
        ),
    ]


def _below(metrics: Metrics, prefix: str) -> list[Series]:
    """The metrics with a prefix, labelled by the rest of their names."""
    return [
        Series(label=name.removeprefix(prefix), steps=one.steps, values=one.values)
        for name, one in sorted(metrics.items())
        if name.startswith(prefix)
    ]


def _optimisation(metrics: Metrics) -> list[str]:
    return [
        captioned(
            "Learning rate",
            "Warm-up, plateau and decay as they were applied.",
            lines(
                _named(metrics, {"optim/lr": "learning rate"}),
                y_label="learning rate",
                is_smoothed=False,
            ),
        ),
        captioned(
            "Gradient norm",
            "Before clipping; spikes here come before spikes of the loss.",
            lines(
                _named(metrics, {"optim/grad_norm": "gradient norm"}),
                y_label="norm",
                scale="log",
            ),
        ),
    ]


def _final_bits(metrics: Metrics, summary: ReportSummary) -> float | None:
    if summary.bits_per_byte is not None:
        return summary.bits_per_byte
    return _last(metrics, "eval/bits_per_byte")


def _inside(metrics: Metrics) -> list[str]:
    violation = _numbered(metrics, r"moe/max_vio_layer_(\d+)", "layer {}")
    residual = _numbered(metrics, r"model/residual_norm_layer_(\d+)", "layer {}")
    return [
        captioned(
            "Expert imbalance by layer (MaxVio)",
            "By how much the busiest expert exceeds an even share of tokens: 0 is balanced, 1 is "
            "twice its share. A stronger shade is more; the router's bias should fade it out.",
            heat_map(violation, value_label="MaxVio"),
        ),
        captioned(
            "Expert imbalance, worst layer",
            "The same number of the layer where it is largest, the MTP block's included.",
            lines(_named(metrics, {"moe/max_vio": "MaxVio"}), y_label="MaxVio"),
        ),
        captioned(
            "Residual stream by layer",
            "Norm of what each layer leaves in the residual stream; later layers are drawn "
            "stronger. Growth without end foretells divergence.",
            depth_lines(residual, y_label="norm"),
        ),
        captioned(
            "Auxiliary balance loss",
            "The sequence-level term that keeps every expert in use.",
            lines(_named(metrics, {"train/aux_loss": "auxiliary loss"}), y_label="loss"),
        ),
    ]


def _speed(metrics: Metrics) -> list[str]:
    flops, fraction = (_values(metrics, f"perf/{n}") for n in ("flops_per_s", "peak_fraction"))
    share = ""
    if len(flops) and len(fraction) and np.median(fraction) > 0:
        peak = np.median(flops) / np.median(fraction)
        share = (
            f" The median is {100 * np.median(fraction):.3g}% of this machine's peak, "
            f"{peak / 1e9:,.0f} GFLOP/s."
        )
    return [
        captioned(
            "Tokens per second",
            "Training tokens through forward, backward and update.",
            lines(_named(metrics, {"perf/tokens_per_s": "tokens/s"}), y_label="tokens per second"),
        ),
        captioned(
            "Achieved arithmetic",
            f"Floating-point operations per second that the model needs.{share}",
            lines(_named(metrics, {"perf/flops_per_s": "FLOP/s"}), y_label="FLOP per second"),
        ),
    ]


def _tiles(metrics: Metrics, summary: ReportSummary) -> str:
    tiles: dict[str, str] = {}
    if len(loss := _values(metrics, "train/loss")) and "reward/mean" not in metrics:
        tiles["training loss, last 20 steps"] = f"{loss[-20:].mean():.3f}"
    if (bits := _final_bits(metrics, summary)) is not None:
        tiles["held-out bits per byte"] = f"{bits:.3f}"
    if len(speed := _values(metrics, "perf/tokens_per_s")):
        tiles["tokens per second, median"] = f"{np.median(speed):,.0f}"
    if len(fraction := _values(metrics, "perf/peak_fraction")):
        tiles["of the machine's peak, median"] = f"{100 * np.median(fraction):.3g}%"
    tiles.update(summary.facts)
    cells = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for label, value in tiles.items()
    )
    return f'<div class="tiles">{cells}</div>\n' if cells else ""


def _samples(samples: Sequence[TextSample]) -> str:
    if not samples:
        return ""
    body = "".join(
        f'<div class="sample"><mark>{html.escape(sample.prompt)}</mark>'
        f"{html.escape(sample.text)}</div>\n"
        for sample in samples
    )
    return f"<section><h2>What it writes</h2>{body}</section>\n"


def _rows(heading: str, records: Sequence[Mapping[str, str | int | float]]) -> str:
    """A section with a table; the keys of the first record are the columns."""
    if not records:
        return ""
    rows = [[record.get(column, "") for column in records[0]] for record in records]
    shown = table(list(records[0]), rows)
    return f"<section><h2>{html.escape(heading)}</h2>{shown}</section>\n"


def _run(summary: ReportSummary) -> str:
    command = f"<pre>{html.escape(summary.command)}</pre>"
    config = ""
    if summary.config:
        rows = [[path, json.dumps(value)] for path, value in _leaves(summary.config)]
        listed = table(["setting", "value"], rows)
        config = (
            f"<details><summary>Configuration, {len(rows)} settings</summary>{listed}</details>"
        )
    return f"<section><h2>Run it again</h2>{command}{config}</section>\n"


def _leaves(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of a nested record, by dotted path."""
    found: list[tuple[str, Any]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _named(metrics: Metrics, labels: Mapping[str, str]) -> list[Series]:
    """The existing metrics among these names, with their labels."""
    found = [(metrics[name], label) for name, label in labels.items() if name in metrics]
    return [Series(label=label, steps=one.steps, values=one.values) for one, label in found]


def _numbered(metrics: Metrics, pattern: str, label: str) -> list[Series]:
    """The metrics whose names contain a number, in its order."""
    matches = [(re.fullmatch(pattern, name), one) for name, one in metrics.items()]
    numbered = sorted(((int(m[1]), one) for m, one in matches if m), key=lambda pair: pair[0])
    return [Series(label=label.format(n), steps=o.steps, values=o.values) for n, o in numbered]


def _values(metrics: Metrics, name: str) -> Any:
    """The finite values of a metric; empty if it is missing."""
    values = metrics[name].values if name in metrics else np.array([])
    return values[np.isfinite(values)]


def _last(metrics: Metrics, name: str) -> float | None:
    values = _values(metrics, name)
    return float(values[-1]) if len(values) else None
