"""Root-mean-square norms: plain, and gated in groups as in Mamba-2."""

from nemotron3.ops.norm.api import gated_group_norm, rms_norm

__all__ = ["gated_group_norm", "rms_norm"]
