"""One optimizer update from the microbatches of one global batch."""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron3.errors import DivergenceError
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.training.balancing import max_violation, update_selection_bias
from nemotron3.training.losses import LossConfig, LossTerms, Targets, loss_terms
from nemotron3.training.optimizers import clip_gradients, set_learning_rate


def training_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Targets],
    *,
    loss: LossConfig,
    learning_rate: float,
    clip_grad_norm: float | None,
    recompute: bool = False,
    measure: bool = False,
) -> dict[str, float]:
    """Accumulate gradients over the microbatches, update once, and say what happened.

    Selection biases move before the weights do, as in Megatron. Raises DivergenceError, with the
    weights untouched, where the gradient is not finite.
    """
    depths = model.config.pattern.num_mtp_depths
    counts = [sum(c) for c in zip(*(batch.counts(depths) for batch in microbatches), strict=True)]
    total_tokens = sum(batch.segments.total for batch in microbatches)
    optimizer.zero_grad(set_to_none=True)
    parts: list[LossTerms] = []
    for batch in microbatches:
        terms = loss_terms(
            model,
            batch,
            counts,
            loss,
            total_tokens=total_tokens,
            recompute=recompute,
            measure=measure,
        )
        terms.total.backward()
        parts.append(terms)
    loads = [torch.stack(same).sum(0) for same in zip(*(p.loads for p in parts), strict=True)]
    norm = float(clip_gradients(model.parameters(), clip_grad_norm))
    metrics = _loss_metrics(parts) | _balance_metrics(loads, model)
    metrics |= {"optim/lr": learning_rate, "optim/grad_norm": norm}
    if measure:
        metrics |= _residual_metrics(parts)
    if not math.isfinite(norm):
        raise DivergenceError(
            f"the gradient norm is {norm} and the loss {metrics['train/loss']}; the weights were "
            "not updated. Train with a lower --training.optimizer.lr or a longer warm-up, under "
            "another --name"
        )
    for router, load in zip(model.routers, loads, strict=True):
        update_selection_bias(router, load, loss.balance.bias_update_rate)
    set_learning_rate(optimizer, learning_rate)
    optimizer.step()
    return metrics


def _loss_metrics(parts: Sequence[LossTerms]) -> dict[str, float]:
    metrics: dict[str, float] = defaultdict(float)
    for part in parts:
        for depth, (loss, accuracy) in enumerate(zip(part.losses, part.accuracies, strict=True)):
            suffix = "" if depth == 0 else f"_mtp_{depth}"
            metrics[f"train/loss{suffix}"] += loss
            metrics[f"train/{'accuracy' if depth == 0 else f'mtp_accuracy_{depth}'}"] += accuracy
        metrics["train/aux_loss"] += part.balance
    return dict(metrics)


def _balance_metrics(loads: Sequence[Tensor], model: LanguageModel) -> dict[str, float]:
    if not loads:
        return {}
    names = router_names(model)
    violations = {
        f"moe/max_vio_{name}": max_violation(load) for name, load in zip(names, loads, strict=True)
    }
    return violations | {"moe/max_vio": max(violations.values())}


def _residual_metrics(parts: Sequence[LossTerms]) -> dict[str, float]:
    squares = [
        torch.stack(layer).square().mean()
        for layer in zip(*(p.residual_rms for p in parts), strict=True)
    ]
    return {
        f"model/residual_norm_layer_{index:02d}": float(mean.sqrt())
        for index, mean in enumerate(squares)
    }


def router_names(model: LanguageModel) -> list[str]:
    """A name for each router, `layer_07` in the backbone and `mtp_layer_01` in the MTP block."""
    config = model.config
    return [
        f"{prefix}layer_{index:02d}"
        for prefix, mixers in (("", config.layers), ("mtp_", config.mtp_layers))
        for index, mixer in enumerate(mixers)
        if mixer.has_router
    ]
