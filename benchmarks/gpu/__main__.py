"""Check and time everything on a GPU in one call, or run the same code at toy size without one.

    python -m benchmarks.gpu [--only parity kernels] [--seconds 540] [--out FOLDER]
    python -m benchmarks.gpu --inference [--only million] [--toy]
    python -m benchmarks.gpu --toy
    python -m benchmarks.gpu --tune
    python -m benchmarks.gpu --compile

The exit status is 0 if every kernel agrees with its reference, 1 if one does not, and 2 without a
GPU. docs/guides/gpu.md explains the figures.
"""

import argparse
import re
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import compiling
from benchmarks.gpu.ahead import compile_ahead, compile_share
from benchmarks.gpu.record import Record
from benchmarks.gpu.run import run_section, run_sections
from benchmarks.gpu.section import Section, all_sections, inference_sections
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.summary import as_lines, as_text
from benchmarks.gpu.tuning import TUNING

from benchmarks import machine
from nemotron3.models.config import ModelConfig

_MOST_OF_COMPILING = 0.25
"""Largest share of the time for compiling ahead; other kernels are compiled at their first use."""
RESULTS = Path(__file__).parents[1] / "results"
_NO_GPU = """no GPU was found: {reason}.
Run this on a machine with an NVIDIA GPU, its driver and a CUDA build of PyTorch. Without one,
  python -m benchmarks.gpu --toy     walks the same path at toy size in Triton's interpreter"""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.compile:
        for name in ("small", "nano", "super"):
            rows = compiling.table(compiling.compile_layers(ModelConfig.preset(name)))
            print("\n".join([f"\n{name}", *as_lines(rows)]))
        return 0
    if options.ahead:
        index, count = map(int, options.ahead.split("/"))
        compile_share(index, count, capability=options.capability, is_tuning=options.tune)
        return 0
    if not options.toy and not torch.cuda.is_available():
        built = "has no CUDA" if torch.version.cuda is None else "finds no driver or device"
        reason = f"PyTorch {torch.__version__} {built}"
        print(_NO_GPU.format(reason=reason), file=sys.stderr)
        return 2
    if options.section:
        setting = Setting.toy() if options.toy else Setting.gpu()
        known = inference_sections() if options.inference else [*all_sections(), TUNING]
        (section,) = (s for s in known if s.name == options.section)
        record = Record.open(options.record)
        return run_section(section, setting, record, seconds=options.seconds)
    chosen = _chosen(options)
    record = Record(_path(options), _header(options))
    record.path.parent.mkdir(parents=True, exist_ok=True)
    record.write()
    # Decoding has few kernels, which are compiled at their first use.
    took = 0.0 if options.toy or options.inference else _compile_ahead(options, record)
    run_sections(
        chosen, record, seconds=options.seconds - took,
        is_toy=options.toy, is_inference=options.inference,
    )  # fmt: skip
    print(as_text(chosen, record))
    print(f"\n{record.path}")
    return int("parity" in record.content["sections"] and not record.may_compare)


def _compile_ahead(options: argparse.Namespace, record: Record) -> float:
    major, minor = torch.cuda.get_device_capability()
    print("== Compiling on all processor cores", flush=True)
    took = compile_ahead(
        capability=10 * major + minor,
        is_tuning=options.tune,
        seconds=_MOST_OF_COMPILING * options.seconds,
    )
    record.content["compiled_ahead_s"] = round(took, 1)
    record.write()
    return took


def _chosen(options: argparse.Namespace) -> list[Section]:
    known = inference_sections() if options.inference else all_sections()
    if options.tune:
        return [s for s in known if s.name == "limits"] + [TUNING]
    return [s for s in known if s.name in options.only] if options.only else known


def _header(options: argparse.Namespace) -> dict[str, Any]:
    described = machine.description()
    if options.commit:
        described["commit"] = options.commit
    if not options.toy:
        described |= _gpu()
    return {
        "command": machine.command("benchmarks.gpu"),
        "date": date.today().isoformat(),
        "toy": options.toy,
        "machine": described | {"triton": machine.installed("triton")},
        "sections": {},
    }


def _gpu() -> dict[str, Any]:
    seen = torch.cuda.get_device_properties(0)
    return {
        "gpu": seen.name,
        "compute_capability": f"{seen.major}.{seen.minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory_bytes": seen.total_memory,
        "cuda": torch.version.cuda,
    }


def _path(options: argparse.Namespace) -> Path:
    """One file for each GPU model and day; toy results are in another folder."""
    if options.toy:
        return (options.out or Path(tempfile.mkdtemp())).resolve() / "toy.json"
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    kind = "tuning" if options.tune else "inference" if options.inference else "gpu"
    return (options.out or RESULTS).resolve() / f"{kind}-{card}-{date.today().isoformat()}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, nothing timed")
    parser.add_argument("--tune", action="store_true", help="search launch settings instead")
    names = {section.name for section in [*all_sections(), *inference_sections()]}
    parser.add_argument("--inference", action="store_true", help="whole models that answer")
    parser.add_argument(
        "--compile", action="store_true", help="registers and spills, without a GPU"
    )
    parser.add_argument("--only", nargs="+", choices=sorted(names), help="only these sections")
    parser.add_argument("--seconds", type=float, default=540, help="time for all of it")
    parser.add_argument("--out", type=Path, help="folder for the JSON (benchmarks/results)")
    parser.add_argument("--commit", help="the revision, where there is no git to ask")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ahead", help=argparse.SUPPRESS)
    parser.add_argument("--capability", type=int, default=90, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
