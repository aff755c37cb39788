"""Causal grouped-query attention over packed sequences."""

from nemotron3.ops.attention.api import attention, attention_steps

__all__ = ["attention", "attention_steps"]
