"""Sampling from logits: temperature, min-p, top-k, top-p, then Gumbel noise.

The order is vLLM's. Equally probable tokens are kept or removed together, so the result does not
depend on how a sort orders ties: top-k keeps every token that is at least as probable as the k-th,
top-p every token with less than p of probability strictly above it.

Top-p sorts few tokens. Those below (1 - p) / vocabulary have less than 1 - p of probability
together, so top-p removes them all; tens or hundreds of 131,072 are left to be sorted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from nemotron3.ops.sampling import gumbel_argmax

_BLOCK = 2**17
"""Elements processed at a time on a CPU, so that they stay in its cache."""


class Draw(NamedTuple):
    """How one row is sampled; `key` is the key of its noise, from seed, answer and position."""

    key: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


_UNCHANGED = Draw(key=0, temperature=1.0)[1:]
"""The fields of a draw from the softmax of the logits as they are."""


def draw(logits: Float[Tensor, "rows vocab"], draws: Sequence[Draw]) -> Int64[Tensor, " rows"]:
    """One token per row; -1 where the logits are NaN or all minus infinity."""
    size = max(1, _BLOCK // logits.shape[1]) if logits.is_cpu else len(draws)
    keys = torch.tensor([row.key for row in draws], dtype=torch.int64, device=logits.device)
    parts = [slice(i, i + size) for i in range(0, len(draws), size)]
    drawn = [gumbel_argmax(truncate(logits[part], draws[part]), keys[part]) for part in parts]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def truncate(
    logits: Float[Tensor, "rows vocab"], draws: Sequence[Draw]
) -> Float[Tensor, "rows vocab"]:
    """Logits divided by temperature, and minus infinity for the tokens that are removed.

    The result may be `logits` itself.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    if all(row[1:] == _UNCHANGED for row in draws):
        return logits
    kept = logits / column([row.temperature for row in draws])
    if any(row.min_p for row in draws):
        floor = kept.amax(-1, keepdim=True) + column([row.min_p for row in draws]).log()
        kept = kept.masked_fill(kept < floor, -torch.inf)
    vocab = logits.shape[-1]
    if any(0 < row.top_k < vocab for row in draws):
        widths = [min(row.top_k or vocab, vocab) for row in draws]
        limited = torch.tensor([i for i, width in enumerate(widths) if width < vocab])
        limited = limited.to(logits.device)
        last = torch.tensor([width - 1 for width in widths if width < vocab]).to(logits.device)
        rows = kept[limited]
        floor = rows.topk(int(last.max()) + 1).values.gather(-1, last[:, None])
        kept[limited] = rows.masked_fill(rows < floor, -torch.inf)
    nuclear = [i for i, row in enumerate(draws) if row.top_p < 1]
    if nuclear:
        limited = torch.tensor(nuclear, device=logits.device)
        kept[limited] = _nucleus(kept[limited], column([draws[i].top_p for i in nuclear]).double())
    return kept


def _nucleus(kept: Tensor, top_p: Tensor) -> Tensor:
    probabilities = kept.softmax(-1)
    least = 0.99 * (1 - top_p) / kept.shape[-1]  # 0.99 allows for rounding
    width = int((probabilities >= least).sum(-1).max().clamp(min=1))
    ordered = probabilities.topk(width).values
    mass = ordered.double().cumsum(-1)
    last = (mass[:, :-1] < top_p).sum(-1, keepdim=True)
    return kept.masked_fill(probabilities < ordered.gather(-1, last), -torch.inf)
