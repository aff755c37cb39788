"""Dense products with a weight matrix."""

from nemotron3.ops.linear.api import linear, linear_parts

__all__ = ["linear", "linear_parts"]
