"""A recipe's values from the command line: the one file that knows tyro.

The command line changes values, never types: which optimizer or which kind of schedule a run has is
set by the recipe, and a larger change is a recipe of its own.
"""

import importlib
from collections.abc import Sequence
from typing import Any, TypeVar

from nemotron3.errors import DependencyMissingError

Run = TypeVar("Run")


def override(run: Run, arguments: Sequence[str], *, prog: str) -> Run:
    """`run` with the values that `arguments` give, such as `--training.optimizer.lr 1e-3`."""
    try:
        tyro: Any = importlib.import_module("tyro")
    except ImportError as error:
        raise DependencyMissingError(
            "changing a recipe from the command line needs the package tyro: "
            "pip install 'nemotron3[train]'"
        ) from error
    return tyro.cli(
        type(run),
        default=run,
        args=list(arguments),
        prog=prog,
        description="The values of the recipe. `nemotron3 pretrain --help` tells of --data, --from "
        "and --runs.",
        config=(tyro.conf.AvoidSubcommands,),
    )
