"""State-space duality: the scan at the heart of Mamba-2."""

from nemotron3.ops.ssd.api import ssd, ssd_rates, ssd_steps

__all__ = ["ssd", "ssd_rates", "ssd_steps"]
