"""Model directories in published layouts: the only package with other names than ours."""

from nemotron3.models.huggingface.companions import Companions
from nemotron3.models.huggingface.directory import (
    dialect_of,
    prepared_weights,
    read_config,
    read_directory,
    read_weights,
    stored_weight_format,
    write_model,
)

__all__ = [
    "Companions",
    "dialect_of",
    "prepared_weights",
    "read_config",
    "read_directory",
    "read_weights",
    "stored_weight_format",
    "write_model",
]
