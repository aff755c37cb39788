"""Checkpoints on disk: sharded safetensors, atomic saves, retention and merging."""

from nemotron3.checkpoint.merging import merge_checkpoints, merge_weights
from nemotron3.checkpoint.planned import PlannedWriter
from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.checkpoint.safetensors import ShardedReader, ShardedWriter, TensorInfo
from nemotron3.checkpoint.store import Checkpoint, CheckpointStore

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "PlannedWriter",
    "RetentionConfig",
    "ShardedReader",
    "ShardedWriter",
    "TensorInfo",
    "merge_checkpoints",
    "merge_weights",
]
