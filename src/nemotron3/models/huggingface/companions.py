"""The contents of a model directory besides its tensors, which saving writes again.

A directory contains more than `ModelConfig`: lists of end tokens, sampling defaults, fields of
other programs, a tokenizer. A loaded model keeps all of it (`LanguageModel.companions`). Saving
changes only the fields of `ModelConfig` that differ from the loaded ones.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nemotron3.checkpoint.files import full_disk_named, write_file
from nemotron3.errors import CheckpointError
from nemotron3.models.config import ModelConfig
from nemotron3.models.huggingface.modelopt import StoredQuantization

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_CODE = "*.py"  # what `auto_map` in config.json names


@dataclass(frozen=True, kw_only=True)
class Companions:
    """The files of a model directory, without the tensors."""

    path: Path
    """The directory, for messages."""
    config: ModelConfig
    """The configuration that was read from `fields`."""
    fields: Mapping[str, Any]
    """The language model's fields of config.json."""
    generation_config: Mapping[str, Any] | None
    """The content of generation_config.json; None if there is no such file."""
    tokenizer_files: Mapping[str, bytes]
    """The tokenizer's files by name, including the chat template."""
    code_files: Mapping[str, bytes]
    """Python files by name."""
    quantization: StoredQuantization | None = None
    """What belongs to quantized weights besides their tensors."""


def read_companions(
    directory: Path, *, config: ModelConfig, fields: Mapping[str, Any]
) -> Companions:
    """Read the files besides config.json and the tensors."""
    generation = directory / GENERATION_FILE
    tokenizer = (directory / name for name in _TOKENIZER_FILES)
    return Companions(
        path=directory,
        config=config,
        fields=fields,
        generation_config=read_json(generation) if generation.is_file() else None,
        tokenizer_files={file.name: file.read_bytes() for file in tokenizer if file.is_file()},
        code_files={file.name: file.read_bytes() for file in sorted(directory.glob(_CODE))},
    )


def write_companions(directory: Path, config: ModelConfig, companions: Companions | None) -> None:
    """Write generation_config.json, and the other files of a model that was loaded.

    If the directory already has a tokenizer, it stays: it was saved for this model.
    """
    tokens = {name: getattr(config, name) for name in SPECIAL_TOKENS}
    if companions is None or companions.generation_config is None:
        generation = {"_from_model_config": True} | tokens
    else:
        changed = {n: v for n, v in tokens.items() if v != getattr(companions.config, n)}
        generation = dict(companions.generation_config) | changed
    write_json(directory / GENERATION_FILE, generation)
    if companions is None:
        return
    files = dict(companions.code_files)
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        files |= companions.tokenizer_files
    for name, content in files.items():
        with full_disk_named(directory, len(content)):
            write_file(directory / name, [content])


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError if there is none."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist; name a directory that holds config.json and *.safetensors"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; fetch or save it again")
    return cast(dict[str, Any], content)


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    """Write an object as JSON."""
    content = json.dumps(fields, indent=2).encode() + b"\n"
    with full_disk_named(file.parent, len(content)):
        write_file(file, [content])
