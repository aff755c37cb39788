"""The options of `nemotron3 quantize`."""

import argparse
from pathlib import Path


def add_quantize_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    quantize = verbs.add_parser(
        "quantize",
        help="write a model with its weights in four or eight bits, and what that costs",
        description="Round the matrices of a model to NVFP4, FP8 or int8, and write a directory "
        "that chat, serve and eval read like any other; NVFP4 and FP8 in the published form of "
        "NVIDIA ModelOpt. The report says bits, error and loss (DIR/quantization/report.html).",
    )
    quantize.add_argument("path", type=Path, help="a model directory, such as runs/tiny/model")
    quantize.add_argument(
        "--format",
        choices=("nvfp4", "fp8", "int8", "mixed"),
        required=True,
        help="nvfp4 (4.5 bits) and fp8 are for the matrices of the layers, int8 also for the "
        "output layer and the MTP block; mixed is the published mix: routed experts nvfp4, shared "
        "experts and Mamba fp8, the rest as it is",
    )
    quantize.add_argument(
        "--bits",
        type=float,
        metavar="N",
        help="with --format mixed, search the mix with N bits per element of all parameters that "
        "moves the model least (default: the published mix)",
    )
    quantize.add_argument(
        "--out", type=Path, metavar="DIR", help="directory to write (default: PATH-FORMAT)"
    )
    quantize.add_argument(
        "--scales",
        choices=("max", "mse", "four_over_six"),
        help="how nvfp4 chooses the scale of a block: by its largest number, by the squared error, "
        "or by the better of two ranges (default mse)",
    )
    quantize.add_argument(
        "--data",
        action="append",
        metavar="FILES",
        help="text, JSON lines or Parquet to set scales of activations with and to compare on; "
        "may be repeated (default: the text of the run that the model belongs to)",
    )
    quantize.add_argument("--column", default="text", help="of --data (default text)")
    quantize.add_argument(
        "--num-tokens",
        type=int,
        default=32_768,
        metavar="N",
        help="most tokens for the scales, and as many for the comparison (default 32768)",
    )
    quantize.add_argument(
        "--kv-cache",
        choices=("fp8", "none"),
        help="whether to write scales of keys and values, with which engines keep them in FP8 "
        "(default: fp8 where there is text and --format is not int8)",
    )
    quantize.add_argument(
        "--distill",
        nargs="?",
        type=int,
        const=300,
        metavar="STEPS",
        help="then train the rounded model to predict what the plain one does, with so many "
        "updates (default 300) on training text; --training.optimizer.lr and the like change how. "
        "Interrupted, the same command goes on",
    )
    quantize.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
