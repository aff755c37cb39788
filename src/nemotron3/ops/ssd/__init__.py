"""State-space duality (SSD): the scan of Mamba-2."""

from nemotron3.ops.ssd.api import ssd, ssd_rates, ssd_steps

__all__ = ["ssd", "ssd_rates", "ssd_steps"]
