"""The published checkpoints' dialects: the only place that knows other names than ours."""

from nemotron3.models.huggingface.directory import read_config, read_weights, write_model

__all__ = ["read_config", "read_weights", "write_model"]
