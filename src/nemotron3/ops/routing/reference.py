"""Choosing experts, written out (white paper, section 2.2; Qwen uses softmax scores).

s   = sigmoid(logits), or softmax(logits)
T   = the k experts with the largest s + bias, or the given ones
g_i = scale * s_i / sum over T of s             (without `normalise`: scale * s_i)
"""

from typing import Literal

from torch import Tensor

Scoring = Literal["sigmoid", "softmax"]


def route_reference(
    logits: Tensor,
    bias: Tensor,
    indices: Tensor | None,
    *,
    choices: int,
    scoring: Scoring,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `nemotron3.ops.routing.api.route`."""
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    if indices is None:
        indices = (scores.detach() + bias).topk(choices, dim=-1).indices
    weights = scores.gather(-1, indices)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return indices, weights * scale, scores
