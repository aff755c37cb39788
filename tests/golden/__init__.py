"""What must not change unseen: resolved recipes, names and shapes of parameters, plans of memory.

`tests/contracts/test_records.py` compares. After an intended change, write the files anew and read
the difference before it is committed:

    python -m tests.golden
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from nemotron3.cli.memory_options import add_memory_options, with_defaults
from nemotron3.cli.training_memory import training_memory
from nemotron3.config import to_record
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.load import RECIPES
from tests.readable_json import readable_json

FOLDER = Path(__file__).parent
_PROJECTIONS = "in_proj,q_proj,k_proj,v_proj,o_proj"
_PLANS_OF_NANO = (
    ("--training", "pretrain"),
    ("--training", "sft", "--lora-rank", "16", "--recompute"),
    ("--training", "rl", "--lora-rank", "16", "--recompute"),
    ("--training", "rl", "--lora-rank", "16", "--lora-targets", _PROJECTIONS, "--recompute"),
)


def golden_records() -> dict[str, Any]:
    """The content of each file by its name."""
    records = {f"recipe-{name}.json": to_record(recipe()) for name, recipe in RECIPES.items()}
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.preset("tiny"))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    plans = {" ".join(options): _memory_of_nano(options) for options in _PLANS_OF_NANO}
    return records | {"parameters-tiny.json": shapes, "memory-nano.json": plans}


def _memory_of_nano(options: tuple[str, ...]) -> Any:
    parser = argparse.ArgumentParser()
    parser.set_defaults(model="nano")
    add_memory_options(parser)
    known = with_defaults(parser.parse_args(options))
    return training_memory(ModelConfig.preset("nano"), known)


def read(name: str) -> Any:
    """The content of a file as it was committed."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def write() -> None:
    """Write every file anew."""
    for name, record in golden_records().items():
        # Shapes and other lists of numbers on one line: a page of commas shows no difference.
        (FOLDER / name).write_text(readable_json(record), encoding="utf-8")
