"""The files that a run was begun with, in its `inputs.json`: it goes on with no others.

What the run's folder holds was computed from them (measurements before training, the best model,
checkpoints), so a change is an error from the first moment on, before anything is written.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron3.config import from_record, write_json
from nemotron3.data.fingerprint import FileState, file_changes, file_states, in_words
from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.models.huggingface.companions import CONFIG_FILE
from nemotron3.recipes.load import RECIPES
from nemotron3.recipes.run_folder import MODEL_FOLDER

INPUTS_FILE = "inputs.json"


@dataclass(frozen=True, kw_only=True)
class _InputFiles:
    files: dict[str, FileState]
    """By their paths as the run names them."""


def record_input_files(folder: Path, files: Sequence[Path]) -> None:
    """Note the files of a run that begins; ConfigError where one that has begun finds others."""
    record = folder / INPUTS_FILE
    if not record.exists():
        write_json(record, _InputFiles(files=file_states(files)))
        return
    before = from_record(_InputFiles, json.loads(record.read_text("utf-8")))
    if changes := file_changes(before.files, files):
        raise ConfigError(
            f"{folder} was begun with other inputs ({in_words(changes)}); restore them, give this "
            "run another --name, or delete the folder to begin anew"
        )


def check_model_directory(model: str | Path) -> None:
    """Raise CheckpointError for a directory without a model; it says what to do."""
    path = Path(model)
    if (path / CONFIG_FILE).is_file():
        return
    found = f"holds no {CONFIG_FILE}" if path.is_dir() else "is no directory"
    remedy = "give a model directory, such as runs/tiny/model"
    recipe = RECIPES.get(path.parent.name) if path.name == MODEL_FOLDER else None
    if (path / MODEL_FOLDER / CONFIG_FILE).is_file():
        remedy = f"give {path / MODEL_FOLDER}"
    elif recipe is not None:
        remedy = f"`nemotron3 {recipe().kind} {path.parent.name}` makes it; or give another one"
    raise CheckpointError(f"{model} {found}; {remedy}")


def model_files(model: str | Path) -> list[Path]:
    """What a run reads of a model directory."""
    patterns = ("*.safetensors", "*.json", "*.jinja")
    return sorted(file for pattern in patterns for file in Path(model).glob(pattern))
