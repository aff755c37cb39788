"""Dense products with a weight matrix."""

from nemotron3.ops.linear.api import linear, linear_parts
from nemotron3.ops.linear.low_rank import linear_low_rank

__all__ = ["linear", "linear_low_rank", "linear_parts"]
