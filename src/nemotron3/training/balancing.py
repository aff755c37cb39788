"""Balancing the load of experts: a selection bias, and a weak loss per sequence.

Two mechanisms work together, as in all three Nemotron 3 runs (reports, pre-training sections):

* Loss-free balancing (Wang et al., arXiv 2408.15664). After each global batch the selection bias of
  an expert moves by a fixed step towards the mean load: b_i += rate * sign(mean load - load_i). It
  never enters a routing weight, so it has no effect on gradients.
* A sequence-level loss, so small that it only prevents extreme imbalance within one sequence:
  L = E sum_i f_i P_i, with P_i the mean over tokens of the score normalised over all experts, and
  f_i the share of choices that expert i would get without the bias. It is Megatron's
  `seq_aux_loss`.

A packed stream has sequences of many lengths. Their losses are averaged with their lengths as
weights, which is the plain mean if all lengths are equal (docs/decisions/0003).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.models.experts import Router, Routing
from nemotron3.ops.segments import Segments


def sequence_balance_loss(routing: Routing, segments: Segments) -> Float[Tensor, ""]:
    """Sum over tokens of the balance loss of their sequence.

    The caller divides it by the number of tokens of the global batch. The result is a sum because
    the batch consists of microbatches, and only their total has the right mean.
    """
    scores = routing.scores
    tokens, experts = scores.shape
    choices = routing.indices.shape[1]
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    # A product with the membership matrix sums each sequence in a fixed order on any device.
    member = scores.new_zeros(len(segments), tokens)
    member[segments.ids(scores.device), torch.arange(tokens, device=scores.device)] = 1.0
    lengths = member.sum(-1, keepdim=True)
    unbiased = scores.detach().topk(choices, dim=-1).indices
    chosen = torch.zeros_like(scores).scatter_(-1, unbiased, 1.0)
    frequency = member @ chosen / (lengths * choices)
    probability = member @ shares / lengths
    per_sequence = experts * (frequency * probability).sum(-1, keepdim=True)
    return (per_sequence * lengths).sum()


def expert_load(routing: Routing) -> Float[Tensor, " expert"]:
    """How many tokens chose each expert."""
    return torch.bincount(
        routing.indices.detach().flatten(), minlength=routing.scores.shape[1]
    ).float()


@torch.no_grad()
def update_selection_bias(router: Router, load: Float[Tensor, " expert"], rate: float) -> None:
    """Move each expert's bias by `rate` towards the mean load; call it once per global batch."""
    router.e_score_correction_bias += rate * torch.sign(load.mean() - load)


def max_violation(load: Float[Tensor, " expert"]) -> float:
    """MaxVio: the relative excess of the busiest expert over the mean load; 0 if all are equal."""
    return (load.max() / load.mean() - 1).item()
