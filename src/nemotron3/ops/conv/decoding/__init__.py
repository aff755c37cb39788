"""Kernels of the convolution for a few tokens against a carried state."""
