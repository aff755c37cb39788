"""How much the model's distribution moves if a matrix is rounded, before anything is rounded.

For small changes of the weights the KL divergence from the model to the changed one is

    KL = 1/2 sum over weights of F_i dW_i^2

nats per token, with the diagonal of the Fisher information F_i = E[g_i^2], g the gradient of a
token's log-probability (the second-order Taylor expansion of AutoQuantize and LLM-MQ). Here the
expectation is over the tokens of real text, and the square is that of a window's summed gradient,
as if its tokens were independent. Terms between two weights are left out, so this ranks matrices
and formats; how far a whole model moves is measured afterwards.

The sum is taken for each expert, since a few that are seldom chosen can be rounded for nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron3.data import Batch
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel, ModelOutput
from nemotron3.models.parameter import quantizable_names
from nemotron3.ops.cross_entropy import linear_cross_entropy
from nemotron3.ops.nvfp4 import Scales
from nemotron3.ops.segments import Segments
from nemotron3.ops.weights import FORMATS, WeightFormat, quantize_weight
from nemotron3.quantization.weight_errors import stored_bytes

CANDIDATES: tuple[WeightFormat, ...] = ("nvfp4", "fp8")


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """A matrix, or both matrices of a layer's experts, which have one format, in a format."""

    matrices: tuple[str, ...]
    format: WeightFormat
    bits: int
    """In the files, of all its elements together."""
    kl: float
    """Expected KL divergence in nats per token."""
    expert_kl: tuple[float, ...]
    """The same of each expert; empty for a single matrix."""


def fisher_diagonal(model: LanguageModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """F_i of every matrix in the backbone that may be quantized, by parameter name.

    The model's gradients are used and cleared; its weights are unchanged.
    """
    names = [name for name in quantizable_names(model) if name.startswith("backbone.")]
    sums = {name: torch.zeros_like(model.get_parameter(name)).float() for name in names}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    tokens = 0.0
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in sums)
        for batch in batches:
            moved = batch.to(model.device)
            model.zero_grad(set_to_none=True)
            _summed_loss(model, moved).backward()
            tokens += moved.loss_mask.sum().item()
            for name, total in sums.items():
                gradient = model.get_parameter(name).grad
                if gradient is not None:
                    total += gradient.float().square()
    finally:
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    return {name: total / max(tokens, 1.0) for name, total in sums.items()}


@torch.no_grad()
def sensitivities(
    model: LanguageModel, fisher: dict[str, Tensor], *, scales: Scales = "mse"
) -> list[Sensitivity]:
    """Every matrix in every format that it can have."""
    found: list[Sensitivity] = []
    for matrices in _groups(fisher):
        values = [model.get_parameter(name) for name in matrices]
        for kind in CANDIDATES:
            if any(value.shape[-1] % FORMATS[kind].block for value in values):
                continue
            parts, bits = [], 0
            for name, value in zip(matrices, values, strict=True):
                weight = quantize_weight(kind, value, scales=scales)
                bits += 8 * stored_bytes(weight)
                change = (weight.dequantize() - value).square_().mul_(fisher[name])
                parts.append(0.5 * change.flatten(1 if value.dim() > 2 else 0).sum(-1).double())
            total = torch.stack(parts).sum(0)
            found.append(
                Sensitivity(
                    matrices=matrices,
                    format=kind,
                    bits=bits,
                    kl=total.sum().item(),
                    expert_kl=tuple(total.tolist()) if total.dim() else (),
                )
            )
    return found


def _groups(names: Iterable[str]) -> Sequence[tuple[str, ...]]:
    """Matrices that have one format: those of a layer's experts, whose products are one kernel."""
    groups: dict[str, list[str]] = {}
    for name in names:
        is_expert = ".experts." in name
        groups.setdefault(name.rpartition(".")[0] if is_expert else name, []).append(name)
    return [tuple(group) for group in groups.values()]


def _summed_loss(model: LanguageModel, batch: Batch) -> Tensor:
    def head(output: ModelOutput) -> Tensor:
        hidden = output.hidden[0]
        mask = batch.loss_mask
        return linear_cross_entropy(hidden, output.output_weight, batch.targets, mask).total

    return model(batch.tokens, layout=SequenceLayout(Segments(batch.lengths)), head=head)
