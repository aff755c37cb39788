"""`nemotron3 quantize`: a model in fewer bits, and what that costs."""

import argparse

from nemotron3.data import FilesConfig
from nemotron3.errors import ConfigError
from nemotron3.quantization.report import lead, summary_rows
from nemotron3.recipes.quantize import REPORT_FOLDER, QuantizePlan, quantize_directory


def quantize_command(known: argparse.Namespace) -> int:
    """Quantize, and print what it costs."""
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
        device=known.device,
    )
    out, summary = quantize_directory(known.path, plan)
    print(lead(summary))
    for name, value in summary_rows(summary):
        print(f"  {name:<36}{value:>14}")
    print(f"text: {summary.text}")
    print(f"\nwritten to {out}; nemotron3 chat {out}, and {out / REPORT_FOLDER}/report.html")
    return 0
