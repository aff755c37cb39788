"""Dense products with a weight matrix."""

from nemotron3.ops.linear.api import linear

__all__ = ["linear"]
