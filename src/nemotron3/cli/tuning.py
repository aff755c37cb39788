"""What `nemotron3 sft` and `nemotron3 rl` have in common: the run that a line names.

Both take a model directory with some options of their own, a recipe, or a recorded run. An option
that does nothing for what was named is an error.
"""

import argparse
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nemotron3.cli.overrides import override
from nemotron3.cli.progress import watch
from nemotron3.config import read_run
from nemotron3.errors import ConfigError
from nemotron3.models.lora import LoRAConfig
from nemotron3.models.lora.peft import CONFIG_FILE
from nemotron3.recipes.input_files import check_model_directory
from nemotron3.recipes.load import load_recipe
from nemotron3.recipes.run_config import RunConfig
from nemotron3.recipes.run_folder import ADAPTER_FOLDER, MODEL_FOLDER, RunCallback

RunT = TypeVar("RunT", bound=RunConfig)
SummaryT = TypeVar("SummaryT")


def chosen_run(
    known: argparse.Namespace,
    rest: list[str],
    kind: type[RunT],
    *,
    of_model: Callable[[str], RunT],
    of_model_only: Mapping[str, Any],
    of_file: Callable[[str], RunT | None] = lambda _: None,
) -> RunT | None:
    """The run that a line names, its first word taken out of `rest`, with changed values.

    None where it names none, and help is wanted. `of_file` gives the run of a Python file that is
    no recipe, and None for others. `of_model_only` are options, by their names, that
    say something of a model alone; None where one was not given.
    """
    replay: Path | None = known.replay
    what = rest.pop(0) if rest and not rest[0].startswith("-") else None
    given = [name for name, value in of_model_only.items() if value is not None]
    if what is None and replay is None:
        if rest or given:
            raise ConfigError(
                f"no model; name it first, as in: nemotron3 {known.verb} runs/tiny/model ..."
            )
        return None
    if what is not None and replay is not None:
        raise ConfigError(f"give a recipe or model ({what!r}) or --from, not both")
    if what is not None and _is_directory(what):
        check_model_directory(what)
        run = of_model(what)
    elif what is not None and (found := of_file(what)) is not None:
        run = found
    elif given:
        named = what or f"--from {replay}"
        raise ConfigError(
            f"{given[0]} goes with a model directory, and {named} is a whole run; change its own "
            "values instead, which --help lists"
        )
    elif replay is not None:
        run = read_run(replay, kind)
    else:
        run = load_recipe(str(what), kind)
    options = [*rest, "--help"] if known.help else rest
    if getattr(run, "lora", None) is None and lora_of(rest) is not None:
        raise ConfigError(
            f"--lora goes with a model directory, and {what or replay} is a run that trains all "
            "parameters; set `lora` in its recipe"
        )
    return override(
        run,
        options,
        prog=f"nemotron3 {known.verb} {what or '--from RUN.JSON'}",
        other_options=of_model_only,
    )


def value_of(rest: Sequence[str], option: str) -> str | None:
    """The last value that a line gives an option, before it is applied."""
    found: str | None = None
    for place, word in enumerate(rest):
        if word.startswith(f"{option}="):
            found = word.partition("=")[2]
        elif word == option and place + 1 < len(rest):
            found = rest[place + 1]
    return found


def lora_of(rest: Sequence[str]) -> LoRAConfig | None:
    """The adapter whose values a line gives, such as `--lora.rank 16`, before they are applied."""
    is_given = any(option.startswith("--lora.") for option in rest)
    return LoRAConfig() if is_given else None


def watched(execute: Callable[[RunCallback], SummaryT]) -> SummaryT:
    """Execute a run with its progress on the terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with watch() as callback:
        return execute(callback)


def weighted(text: str) -> tuple[str, float]:
    """NAME or NAME=WEIGHT."""
    name, weight = with_number(text)
    return name, 1.0 if weight is None else weight


def with_number(text: str) -> tuple[str, float | None]:
    """NAME or NAME=NUMBER; what follows an equals sign and is no number belongs to the name."""
    name, equals, number = text.rpartition("=")
    if "?" in name and "=" not in re.split("[?&]", name)[-1]:
        return text, None  # the value of an option of a server's address
    try:
        return (name, float(number)) if equals else (text, None)
    except ValueError:
        return text, None


def ending(folder: Path) -> list[str]:
    """Where a finished run has its parts."""
    adapter, model = folder / ADAPTER_FOLDER, folder / MODEL_FOLDER
    chat = str(model)
    if adapter.exists() and not model.exists():  # its base is quantized, and stays so
        base = json.loads((adapter / CONFIG_FILE).read_text("utf-8"))["base_model_name_or_path"]
        chat = f"{base} --lora {adapter}"
    return [
        *([f"  model    {model}"] if model.exists() else []),
        *([f"  adapter  {adapter}"] if adapter.exists() else []),
        f"  report   {folder / 'report.html'}",
        "",
        f"try: nemotron3 chat {chat}",
    ]


def _is_directory(named: str) -> bool:
    """Whether this is, or was to be, a directory and not a recipe's name or file."""
    path = Path(named)
    return path.is_dir() or (len(path.parts) > 1 and path.suffix != ".py")
