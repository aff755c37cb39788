"""The operations of decoding steps: a few tokens of each sequence, with states updated in place.

They have no gradients. Their references process whole sequences, token by token.
"""

from collections.abc import Sequence

import torch
from benchmarks.gpu.cases import Call, Case, Problem, layer_experts, scan_operands, words_of
from benchmarks.gpu.setting import Draw
from torch import Tensor

from nemotron3.models.config import AttentionConfig, MambaConfig, ModelConfig
from nemotron3.ops.attention import attention, attention_steps
from nemotron3.ops.backends import Backend
from nemotron3.ops.conv import causal_conv_steps
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd, ssd_steps


def layer_steps(
    config: ModelConfig, rows: int, length: int, context: int, dtype: torch.dtype
) -> list[Case]:
    """All operations of a model's layers for `length` tokens of each of `rows` sequences.

    More than one token is the verification of drafts, which keeps the states.
    """
    mamba, attention_config = config.mamba, config.attention
    assert mamba is not None
    assert attention_config is not None
    kept = length > 1
    return [
        scan_steps(mamba, rows, length, dtype, kept=kept),
        convolution_steps(mamba.conv_channels, rows, length, dtype, kept=kept),
        attention_steps_after(attention_config, [context] * rows, length, dtype),
        layer_experts(config, rows * length, dtype),
    ]


def scan_steps(
    mamba: MambaConfig, rows: int, length: int, dtype: torch.dtype, *, kept: bool = False
) -> Case:
    """`length` tokens for each of `rows` states, which are updated in place.

    With `kept` the states stay, and the state after each token is written to the intermediate
    states, as in a verification of drafts. Slots are not in the order of the sequences, as usual in
    an engine.
    """
    segments = Segments.uniform(rows, length)

    def draw(d: Draw) -> Problem:
        operands = scan_operands(mamba, segments, dtype, d)
        slots = torch.arange(rows - 1, -1, -1, device=d.device)

        def call(backend: Backend) -> Call:
            if backend == "reference":
                return lambda *t: _steps_reference(t, slots, length, kept=kept)

            def run(*t: Tensor) -> Sequence[Tensor]:
                x, dt, A, B, C, D, states = t
                intermediate_states = (
                    states.new_empty(rows, length, *states.shape[1:]) if kept else None
                )
                y = ssd_steps(
                    x,
                    dt,
                    A,
                    B,
                    C,
                    D,
                    states,
                    slots,
                    intermediate_states=intermediate_states,
                    backend=backend,
                )
                return y, states if intermediate_states is None else intermediate_states

            return run

        return Problem(operands, call)

    size = f"{rows} x {length} tokens, {mamba.mamba_num_heads} heads" + ", trail" * kept
    return Case(operation="scan steps", size=size, flops=0.0, draw=draw, has_gradient=False)


def convolution_steps(
    channels: int, rows: int, length: int, dtype: torch.dtype, *, kept: bool = False, taps: int = 4
) -> Case:
    """The convolution for `length` tokens of each of `rows` states; `kept` as above."""

    def draw(d: Draw) -> Problem:
        operands = [
            d.normal(rows * length, channels, dtype=dtype),
            d.normal(channels, taps, scale=taps**-0.5),
            d.normal(channels),
            d.normal(rows, taps - 1, channels, dtype=dtype),
        ]
        slots = torch.arange(rows - 1, -1, -1, device=d.device)

        def call(backend: Backend) -> Call:
            # This operation has no reference of its own; PyTorch's is compared instead.
            chosen: Backend = "torch" if backend == "reference" else backend

            def run(x: Tensor, w: Tensor, b: Tensor, conv_states: Tensor) -> Sequence[Tensor]:
                intermediate_states = (
                    conv_states.new_empty(rows, length, *conv_states.shape[1:]) if kept else None
                )
                y = causal_conv_steps(
                    x,
                    w,
                    b,
                    conv_states=conv_states,
                    slots=slots,
                    intermediate_states=intermediate_states,
                    backend=chosen,
                )
                return y, conv_states if intermediate_states is None else intermediate_states

            return run

        return Problem(operands, call)

    size = f"{rows} x {length} tokens, {channels} channels" + ", trail" * kept
    return Case(operation="convolution steps", size=size, flops=0.0, draw=draw, has_gradient=False)


def attention_steps_after(
    config: AttentionConfig,
    contexts: Sequence[int],
    length: int,
    dtype: torch.dtype,
    *,
    page_size: int = 64,
) -> Case:
    """`length` new tokens of each sequence, after `contexts` cached ones in their pages."""
    rows, (kv_heads, head_dim) = len(contexts), (config.num_key_value_heads, config.head_dim)
    width = -(-(max(contexts) + length) // page_size)

    def draw(d: Draw) -> Problem:
        pages = rows * width
        new = (rows * length, kv_heads, head_dim)
        held = (pages, page_size, kv_heads, head_dim)
        shapes = [(rows * length, config.num_attention_heads, head_dim), new, new, held, held]
        operands = [d.normal(*shape, dtype=dtype) for shape in shapes]
        context = torch.tensor(list(contexts), device=d.device)
        table = torch.arange(pages - 1, -1, -1, device=d.device).view(rows, width)
        slots = torch.arange(rows, device=d.device)

        def call(backend: Backend) -> Call:
            def run(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
                if backend == "reference":
                    return [_attention_reference(q, k, v, keys, values, table, contexts)]
                y = attention_steps(
                    q, k, v, keys=keys, values=values, table=table, slots=slots,
                    cached_lengths=context,
                    backend=backend,
                )  # fmt: skip
                return [y]

            return run

        return Problem(operands, call)

    words = words_of(contexts) if len(set(contexts)) > 1 else f"{rows} x {contexts[0]}"
    return Case(
        operation="attention steps",
        size=f"{length} after {words} keys, {config.num_attention_heads} heads on {kv_heads}",
        flops=0.0,
        draw=draw,
        has_gradient=False,
    )


def _attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    contexts: Sequence[int],
) -> Tensor:
    rows = len(contexts)
    streams = [
        torch.cat(
            [
                part
                for pages, context, latest in zip(table, contexts, new.chunk(rows), strict=True)
                for part in (held[pages].flatten(0, 1)[:context], latest)
            ]
        )
        for held, new in ((keys, k), (values, v))
    ]
    length = len(q) // rows
    segments = Segments([context + length for context in contexts])
    return attention(
        q, *streams, queries=Segments.uniform(rows, length), keys=segments, backend="reference"
    )


def _steps_reference(
    t: Sequence[Tensor], slots: Tensor, length: int, *, kept: bool
) -> Sequence[Tensor]:
    x, dt, A, B, C, D, states = t
    rows, state = len(slots), states[slots]
    tokens = [part.unflatten(0, (rows, length)) for part in (x, dt, B, C)]
    outputs, every = [], []
    for step in range(length):
        x, dt, B, C = (part[:, step] for part in tokens)
        y, state = ssd(
            x, dt, A, B, C, D,
            segments=Segments.uniform(rows, 1), chunk_size=1, initial_states=state,
            backend="reference",
        )  # fmt: skip
        outputs.append(y)
        every.append(state)
    after = states.clone()
    after[slots] = state
    return torch.stack(outputs, 1).flatten(0, 1), torch.stack(every, 1) if kept else after
