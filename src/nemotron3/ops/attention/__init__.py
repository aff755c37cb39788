"""Causal grouped-query attention over packed sequences."""

from nemotron3.ops.attention.api import attention

__all__ = ["attention"]
