"""Copying rows of tensors into rows of others."""

from nemotron3.ops.gather.api import copy_rows

__all__ = ["copy_rows"]
