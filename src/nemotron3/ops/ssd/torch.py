"""The scan in chunks: quadratic within a chunk, a recurrence of states between chunks.

Dao & Gu, *Transformers are SSMs* (arXiv 2405.21060), section 6. Within a chunk of L tokens the scan
is a masked matrix product, which processors compute fast; between chunks only one state per segment
and head is carried. With a_l the log decay from the chunk's start to token l:

    scores = C B^T                              within a chunk, once per group
    y_l    = sum_s scores_ls e^(a_l - a_s) dt_s x_s    each token from its own chunk
    local  = sum_s e^(a_L - a_s) dt_s x_s B_s^T        what a chunk adds to the state
    y_l   += e^(a_l) C_l state                         each token from all earlier chunks

In this form the decay is a matrix per head and costs more than the products. But e^(a_l - a_s) is
e^(a_l - m) e^(m - a_s) for any m. These factors scale the rows of x before the product and the rows
of y after it, so one product serves all heads of a group, and B and C are never expanded to heads.
With m in the middle of the chunk's range of a, the factors are at most e^40 as long as the range is
below 80. Where a head decays faster, or where x, B and C are so large that a scaled product could
overflow, the decay matrix is used. The choice is made for each chunk and head separately. The
inputs of such a pair are zero in the shared product, because an infinity that is replaced
afterwards would still make its gradients NaN.

Log decays are clamped where the exponential is zero, so that no sum of them is infinite, and a very
large one does not absorb the digits of the steps beside it.

Every segment starts a chunk of its own, and a segment's last chunk is padded with dt = 0, which
leaves the state unchanged. So no product contains two segments, and one segment cannot change a
single bit of another's output. If segments shared a chunk with a mask, the rounding of the running
sum of dt A would depend on the other segment.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.segments import Segments

_EXPONENT = 40.0
"""Largest exponent of a scaling factor."""
_LARGEST = 1e28
"""Largest term of a scaled product: its sums and gradients over a chunk stay finite in float32."""


class _Chunks(NamedTuple):
    """How a stream is cut: the chunks per segment, and the functions that split and join it."""

    size: int
    counts: tuple[int, ...]
    split: Callable[[Tensor], Tensor]  # [tokens, ...] -> [chunks, size, ...], zero where padded
    join: Callable[[Tensor], Tensor]  # and back


def _cut(segments: Segments, chunk_size: int, device: torch.device) -> _Chunks:
    size = min(chunk_size, segments.max_length)
    counts = tuple(-(-length // size) for length in segments.lengths)
    length = segments.uniform_length
    if length is not None:
        rows, padding = len(segments), counts[0] * size - length

        def split(t: Tensor) -> Tensor:
            t = t.reshape(rows, length, *t.shape[1:])
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) if padding else t
            return t.reshape(rows * counts[0], size, *t.shape[2:])

        def join(t: Tensor) -> Tensor:
            t = t.reshape(rows, counts[0] * size, *t.shape[2:])[:, :length]
            return t.reshape(rows * length, *t.shape[2:])

    else:
        first_slot = torch.tensor(
            [sum(counts[:i]) * size for i in range(len(segments))], device=device
        )
        slot = first_slot[segments.ids(device)] + segments.positions(device)
        slots = sum(counts) * size

        def split(t: Tensor) -> Tensor:
            padded = t.new_zeros(slots, *t.shape[1:]).index_copy(0, slot, t)
            return padded.reshape(-1, size, *t.shape[1:])

        def join(t: Tensor) -> Tensor:
            return t.flatten(0, 1).index_select(0, slot)

    return _Chunks(size, counts, split, join)


def ssd_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    segments: Segments,
    initial_states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Scan each segment in chunks; shapes as in `nemotron3.ops.ssd.api.ssd`."""
    _, heads, head_dim = x.shape
    groups, per_group = B.shape[1], heads // B.shape[1]
    chunks = _cut(segments, chunk_size, x.device)

    xc = chunks.split(x).unflatten(2, (groups, per_group)).transpose(1, 2)  # c g l r p
    dtc = chunks.split(dt).unflatten(2, (groups, per_group)).transpose(1, 2)  # c g l r
    Bc = chunks.split(B).transpose(1, 2)  # c g l n
    Cc = chunks.split(C).transpose(1, 2)

    steps = (dtc * A.view(groups, 1, per_group)).clamp(min=_least_log_decay(dt.dtype))  # log decays
    total = torch.cumsum(steps, dim=2)  # since the chunk's start
    scores = (Cc @ Bc.transpose(-1, -2)).tril()  # c g l s

    steep = _steep_pairs(chunks.split(x), dtc, total, Bc, Cc)  # c g 1 r
    half = total[:, :, -1:].masked_fill(steep, 0) / 2
    centred = total.masked_fill(steep, 0) - half
    factors = dtc.masked_fill(steep, 0) * torch.exp(-centred)
    scaled = (xc * factors.unsqueeze(-1)).flatten(3)  # c g l (r p)
    y = (scores @ scaled).unflatten(3, (per_group, head_dim))
    y = y * torch.exp(centred).unsqueeze(-1)  # c g l r p
    local = (scaled.transpose(-1, -2) @ Bc).unflatten(2, (per_group, head_dim))  # c g r p n
    local = local * torch.exp(half).transpose(2, 3).unsqueeze(-1)

    if steep.any():
        c, g, _, r = steep.nonzero(as_tuple=True)
        y_steep, local_steep = _steep(
            xc[c, g, :, r], dtc[c, g, :, r], steps[c, g, :, r], Bc[c, g], scores[c, g]
        )
        y = y.transpose(2, 3).index_put((c, g, r), y_steep).transpose(2, 3)
        local = local.index_put((c, g, r), local_steep)

    chunk_decay = total[:, :, -1].exp().flatten(1, 2)  # c h
    states, final = _pass_states(local.flatten(1, 2), chunk_decay, initial_states, chunks.counts)
    states = states.unflatten(1, (groups, per_group)).flatten(2, 3)  # c g (r p) n
    from_before = (Cc @ states.transpose(-1, -2)).unflatten(3, (per_group, head_dim))
    y = torch.addcmul(y, from_before, total.exp().unsqueeze(-1))

    y = chunks.join(y.transpose(1, 2).flatten(2, 3))
    return torch.addcmul(y, x, D.unsqueeze(-1)), final


def _least_log_decay(dtype: torch.dtype) -> float:
    """A log decay whose exponential is zero in this dtype."""
    info = torch.finfo(dtype)
    return math.log(info.tiny) + math.log(info.eps) - 1


@torch.no_grad()
def _steep_pairs(x: Tensor, dt: Tensor, total: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The (chunk, head) pairs that need the decay matrix, [c, g, 1, r]; x is [c, l, h, p].

    Norms of whole chunks bound their elements, cost one pass over memory, and do not depend on
    other segments. A pair with an infinite or NaN norm counts as steep.
    """
    range_ = -total[:, :, -1:]
    size = torch.linalg.vector_norm(x, dim=(1, 2, 3))[:, None, None, None]
    for t in (B, C):
        size = size * torch.linalg.vector_norm(t, dim=(2, 3), keepdim=True)
    size = size * dt.amax(2, keepdim=True) * torch.exp(range_ / 2)
    return ~((range_ <= 2 * _EXPONENT) & (size <= _LARGEST))


def _steep(
    x: Tensor, dt: Tensor, steps: Tensor, B: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Output within the chunk and addition to the state, for (chunk, head) pairs of steep decay.

    x [pair, l, p], dt and steps [pair, l], B [pair, l, n], scores [pair, l, s]. The log decay from
    s to l is the sum of the steps between them. A difference of two running sums would lose a small
    step beside a large one.
    """
    length = x.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    between = steps.unsqueeze(2).masked_fill(~past.tril(-1), 0).cumsum(1)  # pair l s
    decay = between.masked_fill(~past, -torch.inf).exp()
    xdt = x * dt.unsqueeze(-1)
    y = (scores * decay) @ xdt
    return y, (xdt * decay[:, -1].unsqueeze(-1)).transpose(1, 2) @ B


def _pass_states(
    local: Tensor, decay: Tensor, initial: Tensor, counts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The state before each chunk [chunks, head, head_dim, d_state], and after each segment's last.

    Goes over the chunk positions and advances all segments that have a chunk there at once.
    """
    decay = decay[..., None, None]
    if len(set(counts)) == 1:
        shape = (len(counts), counts[0])
        steps = zip(
            local.unflatten(0, shape).unbind(1), decay.unflatten(0, shape).unbind(1), strict=True
        )
        state, before = initial, []
        for added, kept in steps:
            before.append(state)
            state = torch.addcmul(added, state, kept)
        return torch.stack(before, dim=1).flatten(0, 1), state

    # Longest segments first, so that those with chunks left are always a prefix; and chunks sorted
    # by position, so that the chunks of one step are contiguous.
    order = sorted(range(len(counts)), key=lambda i: -counts[i])
    first = [sum(counts[:i]) for i in range(len(counts))]
    running = [sum(count > step for count in counts) for step in range(max(counts))]
    place = torch.tensor(
        [first[i] + step for step, still in enumerate(running) for i in order[:still]],
        device=local.device,
    )
    state, before, finished = initial[order], [], []
    pairs = zip(local[place].split(running), decay[place].split(running), strict=True)
    for still, (added, kept) in zip(running, pairs, strict=True):
        finished.append(state[still:])
        state = state[:still]
        before.append(state)
        state = torch.addcmul(added, state, kept)
    finished.append(state)
    final = torch.cat(finished[::-1])  # in the order of `order`
    back = torch.tensor(order, device=local.device).argsort()
    return torch.cat(before)[place.argsort()], final[back]
