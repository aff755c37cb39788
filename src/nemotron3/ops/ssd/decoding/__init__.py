"""Kernels of the scan for a few tokens against a carried state."""
