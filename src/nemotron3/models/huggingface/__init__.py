"""The published checkpoints' dialects: the only place that knows other names than ours."""

from nemotron3.models.huggingface.companions import Companions
from nemotron3.models.huggingface.directory import (
    read_config,
    read_directory,
    read_weights,
    write_model,
)

__all__ = ["Companions", "read_config", "read_directory", "read_weights", "write_model"]
