"""Bytes on disk: sharded safetensors, atomic checkpoints, retention and merging."""
