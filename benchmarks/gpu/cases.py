"""The operations that have kernels: operands, calls and arithmetic, at any size.

A case draws its operands and calls the operation on each backend. The bytes that it must move
follow from its tensors: a forward pass reads the operands and writes the results; training also
reads the operands again and the gradients of the results, and writes the gradients of the operands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from benchmarks.gpu.setting import Draw
from torch import Tensor

from nemotron3.models.config import MambaConfig, ModelConfig
from nemotron3.ops.backends import Backend
from nemotron3.ops.conv import causal_conv
from nemotron3.ops.cross_entropy import linear_cross_entropy
from nemotron3.ops.experts import Activation, routed_experts
from nemotron3.ops.norm import gated_group_norm, rms_norm
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd

_EPS = 1e-5


Call = Callable[..., Sequence[Tensor]]
"""The operation on its operands; returns its results."""


class Problem(NamedTuple):
    """Operands on a device, and the operation by backend."""

    operands: list[Tensor]
    call: Callable[[Backend], Call]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size."""

    operation: str
    size: str
    """The size as text."""
    flops: float
    """FLOPs of the products in a forward pass; training has three times as many."""
    draw: Callable[[Draw], Problem]
    has_gradient: bool = True
    read_share: float = 1.0
    """Share of the operands that a pass reads: with few tokens, only the chosen experts."""


def forward_bytes(case: Case, problem: Problem, outputs: Sequence[Tensor]) -> float:
    """Bytes of reading the operands once and writing the results once."""
    return case.read_share * _bytes(problem.operands) + _bytes(outputs)


def training_bytes(problem: Problem, outputs: Sequence[Tensor]) -> int:
    """Bytes of a forward pass, and of a backward pass that reads all of it and writes gradients."""
    return 3 * _bytes(problem.operands) + 2 * _bytes(outputs)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t.is_floating_point())


def layer_cases(config: ModelConfig, tokens: int, dtype: torch.dtype) -> list[Case]:
    """All operations of a model's layers on one sequence of `tokens`."""
    mamba = config.mamba
    assert mamba is not None
    return [
        scan(mamba, (tokens,), dtype, flops=tokens * _scan_flops(config, tokens)),
        convolution(mamba.conv_channels, (tokens,), dtype),
        gated_norm(tokens, mamba.inner_size, mamba.n_groups, dtype),
        norm(tokens, config.hidden_size, dtype),
        layer_experts(config, tokens, dtype),
        cross_entropy(tokens, config.hidden_size, config.vocab_size, dtype),
    ]


def _scan_flops(config: ModelConfig, context: int) -> float:
    assert config.mamba is not None
    return config.mamba.mixing_flops(context)


def scan(
    mamba: MambaConfig, lengths: Sequence[int], dtype: torch.dtype, *, flops: float = 0.0
) -> Case:
    """The selective scan of packed sequences, each with an initial state."""
    segments = Segments(lengths)

    def draw(d: Draw) -> Problem:
        return Problem(
            scan_operands(mamba, segments, dtype, d),
            lambda backend: (
                lambda *t: ssd(
                    *t[:6],
                    segments=segments,
                    chunk_size=mamba.chunk_size,
                    initial_states=t[6],
                    backend=backend,
                )
            ),
        )

    return Case(operation="scan", size=_scan_size(mamba, lengths), flops=flops, draw=draw)


def scan_operands(
    mamba: MambaConfig, segments: Segments, dtype: torch.dtype, d: Draw
) -> list[Tensor]:
    heads, size = mamba.mamba_num_heads, mamba.ssm_state_size
    return [
        d.normal(segments.total, heads, mamba.mamba_head_dim, dtype=dtype),
        d.uniform(segments.total, heads, high=0.2),
        d.uniform(heads, low=-8.0, high=-1.0),
        d.normal(segments.total, mamba.n_groups, size, dtype=dtype, scale=size**-0.5),
        d.normal(segments.total, mamba.n_groups, size, dtype=dtype, scale=size**-0.5),
        d.normal(heads),
        d.normal(len(segments), heads, mamba.mamba_head_dim, size),
    ]


def _scan_size(mamba: MambaConfig, lengths: Sequence[int]) -> str:
    return (
        f"{words_of(lengths)} tokens, {mamba.mamba_num_heads} heads of {mamba.mamba_head_dim}, "
        f"{mamba.n_groups} groups, state {mamba.ssm_state_size}"
    )


def convolution(
    channels: int, lengths: Sequence[int], dtype: torch.dtype, *, taps: int = 4
) -> Case:
    """The causal convolution with its SiLU, over packed sequences with initial states."""
    segments = Segments(lengths)

    def draw(d: Draw) -> Problem:
        return Problem(
            [
                d.normal(segments.total, channels, dtype=dtype),
                d.normal(channels, taps, scale=taps**-0.5),
                d.normal(channels),
                d.normal(len(segments), taps - 1, channels, dtype=dtype),
            ],
            lambda backend: (
                lambda x, w, b, tails: causal_conv(
                    x, w, b, segments=segments, conv_states=tails, backend=backend
                )
            ),
        )

    size = f"{words_of(lengths)} tokens, {channels} channels"
    flops = 2.0 * taps * segments.total * channels
    return Case(operation="convolution", size=size, flops=flops, draw=draw)


def gated_norm(tokens: int, width: int, groups: int, dtype: torch.dtype) -> Case:
    """The norm after the scan."""

    def draw(d: Draw) -> Problem:
        operands = [
            d.normal(tokens, width, dtype=dtype),
            d.normal(tokens, width, dtype=dtype),
            d.normal(width),
        ]
        return Problem(
            operands,
            lambda backend: (
                lambda x, z, w: [
                    gated_group_norm(x, z, w, groups=groups, eps=_EPS, backend=backend)
                ]
            ),
        )

    size = f"{tokens} tokens, {groups} groups of {width // groups}"
    return Case(operation="gated norm", size=size, flops=0.0, draw=draw)


def norm(tokens: int, width: int, dtype: torch.dtype) -> Case:
    """The norm before each mixer."""

    def draw(d: Draw) -> Problem:
        return Problem(
            [d.normal(tokens, width, dtype=dtype), d.normal(width)],
            lambda backend: lambda x, w: [rms_norm(x, w, _EPS, backend=backend)],
        )

    return Case(operation="norm", size=f"{tokens} tokens of {width}", flops=0.0, draw=draw)


def experts(
    tokens: int,
    count: int,
    k: int,
    *,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    activation: Activation = "relu2",
    used: int | None = None,
) -> Case:
    """Routed experts; tokens choose only among the first `used`."""
    rows = hidden * (2 if activation == "swiglu" else 1)

    def draw(d: Draw) -> Problem:
        indices = d.choices(tokens, used or count, k)
        operands = [
            d.normal(tokens, width, dtype=dtype),
            d.uniform(tokens, k).to(dtype),
            d.normal(count, rows, width, dtype=dtype, scale=width**-0.5),
            d.normal(count, width, hidden, dtype=dtype, scale=hidden**-0.5),
        ]
        return Problem(
            operands,
            lambda backend: (
                lambda x, w, up, down: [
                    routed_experts(x, indices, w, up, down, activation=activation, backend=backend)
                ]
            ),
        )

    used_words = f", {used} used" if used else ""
    return Case(
        operation="experts",
        size=f"{tokens} tokens, {k} of {count} experts {width} x {hidden}{used_words}",
        flops=2.0 * tokens * k * (rows + hidden) * width,
        draw=draw,
        read_share=1 - (1 - k / (used or count)) ** tokens,
    )


def layer_experts(config: ModelConfig, tokens: int, dtype: torch.dtype) -> Case:
    """The routed experts of a model's layer."""
    moe = config.moe
    assert moe is not None
    return experts(
        tokens,
        moe.n_routed_experts,
        moe.num_experts_per_tok,
        width=moe.moe_latent_size or config.hidden_size,
        hidden=moe.moe_intermediate_size,
        dtype=dtype,
        activation=moe.activation,
    )


def cross_entropy(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> Case:
    """The output layer with its loss; the master weights are float32, as in training."""

    def draw(d: Draw) -> Problem:
        targets, weights = d.integers(vocab, tokens), d.uniform(tokens, low=0.5, high=1.5)
        operands = [
            d.normal(tokens, width, dtype=dtype),
            d.normal(vocab, width, scale=width**-0.5),
        ]

        def call(backend: Backend) -> Call:
            return lambda h, w: linear_cross_entropy(
                h, w, targets, weights.to(torch.promote_types(h.dtype, weights.dtype)),
                backend=backend,
            )  # fmt: skip

        return Problem(operands, call)

    return Case(
        operation="cross-entropy",
        size=f"{tokens} tokens of {width}, {vocab} entries",
        flops=2.0 * tokens * width * vocab,
        draw=draw,
    )


def odd_mamba(mamba: MambaConfig) -> MambaConfig:
    """The configuration with sizes that are not multiples of a tile."""
    return replace(mamba, mamba_num_heads=6, mamba_head_dim=20, ssm_state_size=40, n_groups=3)


def few_heads(mamba: MambaConfig) -> MambaConfig:
    """The configuration with fewer heads, because the reference recurrence is slow."""
    groups = min(2, mamba.n_groups)
    return replace(mamba, mamba_num_heads=4 * groups, n_groups=groups)


def words_of(lengths: Sequence[int]) -> str:
    return " + ".join(map(str, lengths))
