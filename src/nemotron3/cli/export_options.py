"""The options of `nemotron3 export`."""

import argparse
from pathlib import Path


def add_export_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    export = verbs.add_parser(
        "export",
        help="write a model for other programs: GGUF for llama.cpp",
        description="Write model and tokenizer as one GGUF file, which llama.cpp and the programs "
        "built on it run; without the multi-token-prediction block. For fewer bits than q8_0, give "
        "the file to llama-quantize.",
        epilog="then:\n  llama-server -m FILE",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("path", type=Path, help="a model directory, such as runs/tiny-rl/model")
    export.add_argument("--format", choices=("gguf",), required=True)
    export.add_argument(
        "--dtype",
        choices=("f32", "bf16", "f16", "q8_0"),
        help="of matrices (default: as they are stored)",
    )
    export.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default: PATH.gguf)"
    )
