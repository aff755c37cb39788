"""The options of `nemotron3 info` that ask for the memory of training.

They are apart from what answers them, which needs PyTorch.
"""

import argparse
import re

from nemotron3.errors import ConfigError

_DEFAULTS = {
    "lora_rank": None,
    "lora_targets": None,
    "batch": 1,
    "seq_len": 4096,
    "activations": "bfloat16",
    "recompute": False,
    "device_memory": 80 * 10**9,
}


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Add `--training` and what goes with it."""
    training = parser.add_argument_group(
        "memory of training", "by part, computed without a GPU, and whether a GPU can hold it"
    )
    training.add_argument(
        "--training",
        choices=("pretrain", "sft", "rl"),
        help="print the memory of this kind of training instead",
    )
    training.add_argument(
        "--lora-rank", type=positive, metavar="R", help="of an adapter (default: all parameters)"
    )
    training.add_argument(
        "--lora-targets",
        metavar="NAMES",
        help="products with an adapter, such as in_proj,q_proj (default: those of all layers)",
    )
    training.add_argument("--batch", type=positive, help="sequences of a forward pass (default 1)")
    training.add_argument("--seq-len", type=positive, help="tokens of a sequence (default 4096)")
    training.add_argument(
        "--activations",
        choices=("float32", "bfloat16"),
        help="dtype of activations and products (default bfloat16)",
    )
    training.add_argument(
        "--recompute", action="store_true", default=None, help="keep only the inputs of blocks"
    )
    training.add_argument("--device-memory", type=size, help="of the GPU (default 80GB)")


def with_defaults(known: argparse.Namespace) -> argparse.Namespace:
    """The options with their defaults; ConfigError for one that does nothing."""
    given = [name for name in _DEFAULTS if getattr(known, name) is not None]
    if given and known.training is None:
        raise ConfigError(f"{_option(given[0])} goes with --training, which is not given")
    if known.lora_targets is not None and known.lora_rank is None:
        raise ConfigError("--lora-targets goes with --lora-rank, which is not given")
    if known.lora_rank is not None and known.training == "pretrain":
        raise ConfigError("--lora-rank goes with --training sft or rl, not with pretrain")
    defaults = {name: value for name, value in _DEFAULTS.items() if name not in given}
    return argparse.Namespace(**(vars(known) | defaults))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def positive(text: str) -> int:
    """A number of 1 or more, as an option has it."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; give 1 or more")
    return value


def size(text: str) -> int:
    """A number of bytes as an option has it: `80GB`, `79.6GiB`, `512M`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 80GB or 79.6GiB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
