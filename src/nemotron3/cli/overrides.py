"""A recipe's values from the command line: the one file that knows tyro.

The command line changes values, never types: which optimizer or which kind of schedule a run has is
set by the recipe, and a larger change is a recipe of its own.
"""

import importlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from nemotron3.errors import DependencyMissingError

Run = TypeVar("Run")


def override(run: Run, arguments: Sequence[str], *, prog: str, other_options: Iterable[str]) -> Run:
    """`run` with the values that `arguments` give, such as `--training.optimizer.lr 1e-3`.

    `other_options` of the verb are told of in the help.
    """
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
        description=f"The values of the run. `{' '.join(prog.split()[:2])} --help` tells of "
        f"{', '.join(other_options)}, --from and --runs.",
        config=(tyro.conf.AvoidSubcommands,),
    )
