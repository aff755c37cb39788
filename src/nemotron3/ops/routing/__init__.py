"""The choice of experts for each token."""

from nemotron3.ops.routing.api import Scoring, check_indices, route

__all__ = ["Scoring", "check_indices", "route"]
