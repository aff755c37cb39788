"""`nemotron3 quantize`: a model in fewer bits, and what that costs."""

import argparse
from dataclasses import dataclass

from nemotron3.cli.overrides import override
from nemotron3.cli.progress import watch
from nemotron3.data import FilesConfig
from nemotron3.errors import ConfigError
from nemotron3.quantization.report import lead, summary_rows
from nemotron3.recipes.distill import distill_training
from nemotron3.recipes.input_files import check_model_directory
from nemotron3.recipes.quantize import REPORT_FOLDER, QuantizePlan, quantize_directory
from nemotron3.recipes.quantize_text import window_tokens
from nemotron3.training.trainer import TrainingConfig


@dataclass(frozen=True)
class _Values:
    """What `--training.…` changes."""

    training: TrainingConfig


def quantize_command(known: argparse.Namespace, rest: list[str]) -> int:
    """Quantize, and print what it costs; `rest` are values of the distillation."""
    if known.num_tokens < 1:
        raise ConfigError(f"is {known.num_tokens}; it must be 1 or more", field="num_tokens")
    if known.data is None and known.column != "text":
        raise ConfigError("goes with --data, which is not given", field="column")
    plan = QuantizePlan(
        format=known.format,
        scales=known.scales,
        out=known.out,
        texts=tuple(FilesConfig(path=path, column=known.column) for path in known.data or ()),
        num_tokens=known.num_tokens,
        bits=known.bits,
        kv_cache=known.kv_cache,
        distill=_training(known, rest),
        device=known.device,
    )
    with watch() as callback:
        out, summary = quantize_directory(known.path, plan, callback)
    print(lead(summary))
    for name, value in summary_rows(summary):
        print(f"  {name:<36}{value:>14}")
    print(f"text: {summary.text}")
    print(f"\nwritten to {out}; nemotron3 chat {out}, and {out / REPORT_FOLDER}/report.html")
    return 0


def _training(known: argparse.Namespace, rest: list[str]) -> TrainingConfig | None:
    if known.distill is None:
        return None
    if known.distill < 1:
        raise ConfigError(f"is {known.distill}; it must be 1 or more updates", field="distill")
    check_model_directory(known.path)
    values = _Values(distill_training(known.distill, seq_len=window_tokens(known.path)))
    prog = "nemotron3 quantize PATH --distill"
    return override(values, rest, prog=prog, other_options=["--distill"]).training
