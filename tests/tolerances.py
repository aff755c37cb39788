"""How close is equal. A wider tolerance needs a decision note, so they all stand here."""

FLOAT64 = 1e-11
"""Two float64 computations of the same thing, relative to the scale of the result."""
FLOAT32 = 2e-5
"""Two float32 computations of the same operation, relative to the scale of the result."""
BFLOAT16 = 2**-6
"""An operation of bfloat16 operands against float64 of the same operands, relative to the scale of
the result: sums are float32, so it is the rounding of the result and of what lies between products,
each at most 2^-8; a pass through experts has four (decision 0023)."""
ORACLE = 1e-4
"""Logits of ours against transformers' in float32, relative to the scale of the logits."""
DECODE = 1e-5
"""Cached decoding against the full forward pass in float32, relative to the scale of the logits."""
LOGPROB = 2e-6
"""A token's log-probability of the engine against that of training in float32, relative to the
largest logit, or to `SMALL_LOGITS` if all are smaller (decision 0017). It is 17 roundings."""
SMALL_LOGITS = 5.0
"""Largest logit up to which log-probabilities differ by at most 1e-5."""


def logprob_tolerance(largest_logit: float) -> float:
    """How far log-probabilities may differ where logits are of this size."""
    return LOGPROB * max(SMALL_LOGITS, largest_logit)


INT8_ACTIVATIONS = 5e-2
"""A token's log-probability of the engine against one forward pass where products round their
activations to int8 (decision 0024): a code may differ by one where float32 sums were added in
another order."""
