"""How close is equal. A wider tolerance needs a decision note, so they all stand here."""

FLOAT64 = 1e-11
"""Two float64 computations of the same thing, relative to the scale of the result."""
FLOAT32 = 2e-5
"""Two float32 computations of the same operation, relative to the scale of the result."""
ORACLE = 1e-4
"""Logits of ours against transformers' in float32, relative to the scale of the logits."""
DECODE = 1e-5
"""Cached decoding against the full forward pass in float32, relative to the scale of the logits."""
