"""One optimizer update from the microbatches of one global batch.

    step = TrainingStep(model, optimizer, objective, clip_grad_norm=1.0)
    metrics = step(microbatches, learning_rate=1e-3)

The forward pass calls the model itself, so that hooks run: with `fully_shard` on the blocks and on
the model, the step trains a sharded model. Each microbatch's share of the loss is divided by global
counts, so the gradient is the sum over microbatches and ranks. FSDP must therefore sum, too: set
`model.set_gradient_divide_factor(1.0)`, and pass `sum_over_ranks`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from nemotron3.errors import ConfigError, DivergenceError
from nemotron3.models.nemotron_h import LanguageModel, ModelOutput
from nemotron3.ops.low_precision import FlushedValues
from nemotron3.training.balancing import expert_load, max_violation, update_selection_bias
from nemotron3.training.objective import BatchT, LossTerms, Objective
from nemotron3.training.optimizers import clip_gradients, set_learning_rate
from nemotron3.training.rounding_metrics import rounding_metrics

SumOverRanks = Callable[[Tensor], Tensor]
"""Sums a float64 vector over all ranks of a global batch; every rank gets the same result."""


class _Part(NamedTuple):
    """Results of one microbatch's forward pass."""

    terms: LossTerms
    loads: list[Tensor]
    """Load of the experts of each router that ran, the backbone's first."""
    residual_rms: list[Tensor]


class TrainingStep(Generic[BatchT]):
    """Updates one model by one objective."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        objective: Objective[BatchT],
        *,
        clip_grad_norm: float | None,
        bias_update_rate: float = 1e-3,
        recompute: bool = False,
        sum_over_ranks: SumOverRanks | None = None,
    ) -> None:
        """`bias_update_rate` is the change of a selection bias per update; 0 keeps the biases."""
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self._clip_grad_norm = clip_grad_norm
        self._bias_update_rate = bias_update_rate
        self._recompute = recompute
        self._sum_over_ranks = sum_over_ranks
        self.updates = 0
        """Updates made. Noise of stochastic rounding is a function of it; resuming sets it."""

    def __call__(
        self, microbatches: Sequence[BatchT], *, learning_rate: float, measure: bool = False
    ) -> dict[str, float]:
        """Accumulate gradients over the microbatches, update once, and return metrics.

        Selection biases are updated before the weights, as in Megatron. With `measure` the metrics
        include the residual stream's, and those of rounding to few bits. Raises DivergenceError,
        with the weights unchanged, if the gradient is not finite.
        """
        if not microbatches:
            raise ConfigError("a step needs a microbatch or more; it was given none")
        model, counts = self.model, self._counts(microbatches)
        self.optimizer.zero_grad(set_to_none=True)
        parts: list[_Part] = []
        position = model.rounding_position
        position.step, position.first_token = self.updates, 0
        position.flushed = FlushedValues() if measure else None
        for batch in microbatches:
            part = self._forward(batch, counts, measure=measure)
            part.terms.total.backward()
            parts.append(part)
            position.first_token += batch.segments.total
        metrics, loads, squares = self._collect(parts)
        norm = float(clip_gradients(model.parameters(), self._clip_grad_norm))
        metrics |= _balance_metrics(loads, model)
        metrics |= {"optim/lr": learning_rate, "optim/grad_norm": norm}
        if position.flushed is not None:
            metrics |= rounding_metrics(model, position.flushed)
            position.flushed = None
        metrics |= {
            f"model/residual_norm_layer_{index:02d}": math.sqrt(square)
            for index, square in enumerate(squares)
        }
        if not math.isfinite(norm):
            raise DivergenceError(
                f"the gradient norm is {norm} and the loss {metrics.get('train/loss')}; the "
                "weights were not updated. Train with a lower --training.optimizer.lr or a longer "
                "warm-up, under another --name"
            )
        for router, load in zip(model.routers, loads, strict=False):
            update_selection_bias(router, load, self._bias_update_rate)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.updates += 1
        return metrics

    def _counts(self, microbatches: Sequence[BatchT]) -> dict[str, float]:
        """The normalisers of the global batch."""
        found = [self.objective.counts(batch) for batch in microbatches]
        sums = {name: sum(counts[name] for counts in found) for name in found[0]}
        if self._sum_over_ranks is None or not sums:
            return sums
        totals = self._sum_over_ranks(torch.tensor([*sums.values()], dtype=torch.float64))
        return dict(zip(sums, totals.tolist(), strict=True))

    def _forward(self, batch: BatchT, counts: Mapping[str, float], *, measure: bool) -> _Part:
        def head(output: ModelOutput) -> _Part:
            terms = self.objective.loss(output, batch, counts)
            return _Part(terms, _loads(output), output.residual_rms)

        return self.model(
            batch.tokens,
            layout=batch.layout,
            routes=batch.routes,
            head=head,
            mtp_depths=self.objective.mtp_depths,
            detach_mtp=self.objective.detach_mtp,
            recompute=self._recompute,
            measure=measure,
        )

    def _collect(
        self, parts: Sequence[_Part]
    ) -> tuple[dict[str, float], list[Tensor], list[float]]:
        """Metrics, loads, and the mean square of the residual stream after each block."""
        names = list(parts[0].terms.metrics)
        shares = _table([[part.terms.metrics[name] for name in names] for part in parts])
        squares = _table([[rms.square() for rms in part.residual_rms] for part in parts])
        loads = [torch.stack(same).sum(0) for same in zip(*(p.loads for p in parts), strict=True)]
        sums, squares, passes = shares.sum(0), squares.sum(0), float(len(parts))
        if self._sum_over_ranks is not None:
            lengths = [len(sums), len(squares), 1, *(len(load) for load in loads)]
            vector = torch.cat(
                [sums, squares, torch.tensor([passes]), *(load.cpu() for load in loads)]
            )
            sums, squares, count, *total = self._sum_over_ranks(vector).split(lengths)
            passes = float(count)
            loads = [new.to(load) for new, load in zip(total, loads, strict=True)]
        metrics = dict(zip(names, sums.tolist(), strict=True))
        return metrics, loads, (squares / passes).tolist()


def _table(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Copy scalars from their device in one transfer, as float64 [rows, columns]."""
    if not rows[0]:
        return torch.zeros(len(rows), 0, dtype=torch.float64)
    return torch.stack([torch.stack([x.double() for x in row]) for row in rows]).cpu()


def _loads(output: ModelOutput) -> list[Tensor]:
    loads = [expert_load(routing) for routing in output.routings]
    return loads + [
        torch.stack([expert_load(routing) for routing in depths]).sum(0)
        for depths in zip(*output.mtp_routings, strict=True)
    ]


def _balance_metrics(loads: Sequence[Tensor], model: LanguageModel) -> dict[str, float]:
    if not loads:
        return {}
    violations = {
        f"moe/max_vio_{name}": max_violation(load)
        for name, load in zip(router_names(model), loads, strict=False)
    }
    return violations | {"moe/max_vio": max(violations.values())}


def router_names(model: LanguageModel) -> list[str]:
    """A name for each router, `layer_07` in the backbone and `mtp_layer_01` in the MTP block."""
    config = model.config
    return [
        f"{prefix}layer_{index:02d}"
        for prefix, mixers in (("", config.layers), ("mtp_", config.mtp_layers))
        for index, mixer in enumerate(mixers)
        if mixer.has_router
    ]
