"""The routed experts of a mixture-of-experts layer."""

from nemotron3.ops.experts.api import Activation, activate, routed_experts

__all__ = ["Activation", "activate", "routed_experts"]
