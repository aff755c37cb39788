"""The scan in chunks: quadratic within a chunk, a recurrence of states between chunks.

Dao & Gu, *Transformers are SSMs* (arXiv 2405.21060), section 6. Within a chunk of L tokens the scan
is a masked matrix product, which is what processors are good at; between chunks only one state per
segment and head is carried on. Four products, and B and C are never expanded from groups to heads:

    scores = C B^T                                within a chunk, once per group
    y      = (scores * decay * dt) x              each token from its own chunk
    local  = (decay to the chunk's end * dt * x)^T B   what a chunk adds to the state
    y     += decay from the chunk's start * (C state)  each token from all earlier chunks

Every segment starts a chunk of its own, and a segment's last chunk is padded with dt = 0, which is
a step that changes nothing. So no product ever sees two segments, and what one segment holds cannot
change a single bit of another's output: masks over a shared chunk would have left the rounding of
the running sum of dt A in common.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.segments import Segments


class _Chunks(NamedTuple):
    """How a stream is cut: chunks per segment, and how tokens get into them and out."""

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


def ssd_chunked(
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

    # chunk group token ...
    xc = chunks.split(x).unflatten(2, (groups, per_group)).permute(0, 2, 3, 1, 4)  # c g r l p
    dtc = chunks.split(dt).unflatten(2, (groups, per_group)).permute(0, 2, 3, 1)  # c g r l
    Bc = chunks.split(B).transpose(1, 2)  # c g l n
    Cc = chunks.split(C).transpose(1, 2)

    total = torch.cumsum(dtc * A.view(groups, per_group, 1), dim=-1)  # log decay since chunk start
    xdt = xc * dtc.unsqueeze(-1)

    within = total.unsqueeze(-1) - total.unsqueeze(-2)  # c g r l s: log decay from s to l
    future = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=x.device).triu(1)
    decay = within.masked_fill(future, -torch.inf).exp()
    scores = Cc @ Bc.transpose(-1, -2)  # c g l s
    y = (scores.unsqueeze(2) * decay) @ xdt  # c g r l p

    to_end = torch.exp(total[..., -1:] - total)
    added = (xdt * to_end.unsqueeze(-1)).transpose(-1, -2)  # c g r p l
    local = added.flatten(2, 3) @ Bc  # c g (r p) n
    local = local.unflatten(2, (per_group, head_dim)).flatten(1, 2)  # c h p n
    chunk_decay = total[..., -1].exp().flatten(1, 2)  # c h

    states, final = _pass_states(local, chunk_decay, initial_states, chunks.counts)
    states = states.unflatten(1, (groups, per_group))  # c g r p n
    from_before = Cc @ states.flatten(2, 3).transpose(-1, -2)  # c g l (r p)
    from_before = from_before.unflatten(3, (per_group, head_dim)).transpose(2, 3)  # c g r l p
    y = y + from_before * total.exp().unsqueeze(-1)

    y = chunks.join(y.permute(0, 3, 1, 2, 4).flatten(2, 3))
    return y + D.unsqueeze(-1) * x, final


def _pass_states(
    local: Tensor, decay: Tensor, initial: Tensor, counts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The state before each chunk [chunks, head, head_dim, d_state], and after each segment's last.

    Walks over chunk positions and carries all segments that reach so far at once.
    """
    first = torch.tensor([sum(counts[:i]) for i in range(len(counts))])
    # Longest segments first, so that those still running are always a prefix.
    order = sorted(range(len(counts)), key=lambda i: -counts[i])
    first, state = first[order], initial[order] if len(order) > 1 else initial
    before, where, finished = [], [], []
    running = len(order)
    for step in range(counts[order[0]]):
        still = sum(counts[i] > step for i in order)
        if still < running:
            finished.append(state[still:running])
            state, running = state[:still], still
        rows = (first[:running] + step).to(local.device)
        before.append(state)
        where.append(rows)
        state = state * decay[rows, :, None, None] + local[rows]
    finished.append(state)
    restore = torch.argsort(torch.cat(where))
    final = torch.cat(finished[::-1])
    back = torch.argsort(torch.tensor(order)).to(local.device)
    return torch.cat(before)[restore], final[back] if len(order) > 1 else final
