"""The choice of experts for each token."""

from nemotron3.ops.routing.api import Scoring, route

__all__ = ["Scoring", "route"]
