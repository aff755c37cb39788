"""Every operation with valid operands of drawn sizes, for tests that vary the operands."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron3.ops import mxfp8
from nemotron3.ops.attention import attention, attention_steps
from nemotron3.ops.conv import causal_conv, causal_conv_steps
from nemotron3.ops.cross_entropy import linear_cross_entropy, linear_kl_divergence, token_logprobs
from nemotron3.ops.experts import activate, routed_experts
from nemotron3.ops.gather import copy_rows
from nemotron3.ops.linear import linear, linear_parts
from nemotron3.ops.norm import gated_group_norm, rms_norm
from nemotron3.ops.nvfp4 import SIGNS, fake_quantize, quantize
from nemotron3.ops.rotary import rotate
from nemotron3.ops.rounding import RandomBits, from_int8, to_float16, to_int8
from nemotron3.ops.routing import route
from nemotron3.ops.sampling import gumbel_argmax, logprobs_and_ranks
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd, ssd_rates, ssd_steps

Operands = dict[str, Any]


class Operation(NamedTuple):
    """`call(backend=..., **operands)`, and operands for a number of tokens."""

    call: Callable[..., Any]
    operands: Callable[[int], Operands]
    written: tuple[str, ...] = ()
    """Operands that are written in place."""
    numbers: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    """Operands that are no tensors, with values that are refused."""
    sizes: tuple[int, ...] = (0, 1, 2, 7)
    """Tokens that it is tried with."""


def lengths(tokens: int) -> list[int]:
    """Segments that make up so many tokens, of unequal lengths."""
    return [1] * tokens if tokens < 3 else [1, tokens - 1]


def rates(tokens: int, heads: int) -> Tensor:
    return torch.rand(tokens, heads) * 0.5


def scan(tokens: int) -> Operands:
    return {
        "x": torch.randn(tokens, 4, 3),
        "dt": rates(tokens, 4),
        "A": -torch.rand(4) - 0.1,
        "B": torch.randn(tokens, 2, 5),
        "C": torch.randn(tokens, 2, 5),
        "D": torch.randn(4),
    }


def scan_steps(sequences: int) -> Operands:
    return scan(2 * sequences) | {
        "ssm_states": torch.randn(9, 4, 3, 5),
        "slots": torch.randperm(9)[:sequences],
        "intermediate_states": torch.zeros(sequences, 2, 4, 3, 5),
    }


def conv_steps(sequences: int) -> Operands:
    return {
        "x": torch.randn(2 * sequences, 6),
        "weight": torch.randn(6, 4),
        "bias": torch.randn(6),
        "conv_states": torch.randn(9, 3, 6),
        "slots": torch.randperm(9)[:sequences],
        "intermediate_states": torch.zeros(sequences, 2, 3, 6),
    }


def paged(sequences: int) -> Operands:
    return {
        "q": torch.randn(2 * sequences, 4, 8),
        "k": torch.randn(2 * sequences, 2, 8),
        "v": torch.randn(2 * sequences, 2, 8),
        "keys": torch.randn(40, 3, 2, 8),
        "values": torch.randn(40, 3, 2, 8),
        "table": torch.randperm(40)[:36].view(9, 4),
        "slots": torch.randperm(9)[:sequences],
        "cached_lengths": torch.randint(0, 11, (sequences,)),
    }


def attended(tokens: int) -> Operands:
    of = lengths(tokens)
    keys = sum(of) + 2 * len(of)
    return {
        "q": torch.randn(tokens, 4, 8),
        "k": torch.randn(keys, 2, 8),
        "v": torch.randn(keys, 2, 8),
        "queries": Segments(of),
        "keys": Segments(n + 2 for n in of),
    }


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that there is only one implementation of."""

    def call(*, backend: str, **operands: Any) -> Any:
        return function(**operands)

    return call


def _in_pairs(targets: Tensor, to: Tensor, sources: Tensor, places: Tensor, backend: str) -> None:
    copy_rows([targets], to, [sources], places, backend=backend)


def _quantized(**operands: Any) -> list[Tensor]:
    found = quantize(**operands)
    return [found.codes, found.block_scales.view(torch.uint8), found.tensor_scale]


OTHER_SEGMENTS = (Segments([1, 1, 1]), Segments([30]))

OPERATIONS = {
    "linear": Operation(linear, lambda n: {"x": torch.randn(n, 5), "weight": torch.randn(6, 5)}),
    "linear_batched": Operation(
        linear, lambda n: {"x": torch.randn(2, n, 5), "weight": torch.randn(6, 5)}
    ),
    "linear_parts": Operation(
        linear_parts,
        lambda n: {"x": torch.randn(n, 5), "weight": torch.randn(6, 5), "sizes": [1, 2, 3]},
        numbers={"sizes": ([1, 2], [7, -1], [])},
    ),
    "experts": Operation(
        routed_experts,
        lambda n: {
            "x": torch.randn(n, 5),
            "indices": torch.rand(n, 4).topk(2).indices,
            "weights": torch.rand(n, 2),
            "up": torch.randn(4, 6, 5),
            "down": torch.randn(4, 5, 3),
            "activation": "swiglu",
        },
        numbers={"activation": ("gelu", "relu2")},
        sizes=(0, 1, 7, 60),
    ),
    "activation": Operation(
        activate,
        lambda n: {"h": torch.randn(n, 6), "activation": "swiglu"},
        numbers={"activation": ("gelu",)},
    ),
    "route": Operation(
        route,
        lambda n: {
            "logits": torch.randn(n, 8),
            "bias": torch.randn(8),
            "choices": 3,
            "scoring": "sigmoid",
            "normalise": True,
            "scale": 2.5,
        },
        numbers={"choices": (0, -1, 9), "scoring": ("tanh",)},
    ),
    "rms_norm": Operation(
        rms_norm, lambda n: {"x": torch.randn(n, 6), "weight": torch.rand(6), "eps": 1e-5}
    ),
    "gated_group_norm": Operation(
        gated_group_norm,
        lambda n: {
            "x": torch.randn(2, n, 6),
            "gate": torch.randn(2, n, 6),
            "weight": torch.rand(6),
            "groups": 2,
            "eps": 1e-5,
        },
        numbers={"groups": (0, -1, 4)},
    ),
    "conv": Operation(
        causal_conv,
        lambda n: {
            "x": torch.randn(n, 6),
            "weight": torch.randn(6, 4),
            "bias": torch.randn(6),
            "segments": Segments(lengths(n)),
            "conv_states": torch.randn(len(lengths(n)), 3, 6),
        },
        numbers={"segments": OTHER_SEGMENTS},
    ),
    "conv_steps": Operation(causal_conv_steps, conv_steps, ("conv_states", "intermediate_states")),
    "ssd": Operation(
        ssd,
        lambda n: (
            scan(n)
            | {
                "segments": Segments(lengths(n)),
                "initial_states": torch.randn(len(lengths(n)), 4, 3, 5),
                "chunk_size": 4,
            }
        ),
        numbers={"segments": OTHER_SEGMENTS, "chunk_size": (0, -3)},
        sizes=(0, 1, 2, 7, 60),
    ),
    "ssd_steps": Operation(ssd_steps, scan_steps, ("ssm_states", "intermediate_states")),
    "ssd_rates": Operation(
        ssd_rates,
        lambda n: {"dt": torch.randn(n, 4), "dt_bias": torch.randn(4), "A_log": torch.randn(4)},
    ),
    "attention": Operation(
        attention,
        attended,
        numbers={"queries": OTHER_SEGMENTS, "keys": (*OTHER_SEGMENTS, Segments([]))},
    ),
    "attention_steps": Operation(attention_steps, paged, ("keys", "values")),
    "cross_entropy": Operation(
        linear_cross_entropy,
        lambda n: {
            "hidden": torch.randn(n, 5),
            "weight": torch.randn(9, 5),
            "targets": torch.randint(9, (n,)),
            "token_weights": torch.rand(n),
            "max_logits": 20,
        },
        numbers={"max_logits": (0, -1)},
    ),
    "kl_divergence": Operation(
        linear_kl_divergence,
        lambda n: {
            "hidden": torch.randn(n, 5),
            "weight": torch.randn(9, 5),
            "teacher_hidden": torch.randn(n, 6),
            "teacher_weight": torch.randn(9, 6),
            "token_weights": torch.rand(n),
            "max_logits": 20,
        },
        numbers={"max_logits": (0, -1)},
    ),
    "token_logprobs": Operation(
        token_logprobs,
        lambda n: {
            "hidden": torch.randn(n, 5),
            "weight": torch.randn(9, 5),
            "targets": torch.randint(9, (n,)),
            "temperature": 0.7,
            "max_logits": 20,
        },
        numbers={"max_logits": (0, -1), "temperature": (0.0, -1.0, float("nan"), float("inf"))},
    ),
    "drawing": Operation(
        gumbel_argmax,
        lambda n: {"logits": torch.randn(n, 9), "keys": torch.randint(-(2**62), 2**62, (n,))},
    ),
    "scores": Operation(
        logprobs_and_ranks,
        lambda n: {"logits": torch.randn(n, 9), "tokens": torch.randint(9, (n,))},
    ),
    "to_float16": Operation(
        to_float16,
        lambda n: {
            "x": torch.randn(n, 3, 8),
            "positions": torch.randint(2**31, (n,)),
            "bits": RandomBits(3),
        },
    ),
    "to_int8": Operation(
        to_int8,
        lambda n: {
            "x": torch.randn(n, 3, 8),
            "positions": torch.randint(2**31, (n,)),
            "bits": RandomBits(3),
        },
    ),
    "from_int8": Operation(
        _alone(from_int8),
        lambda n: {
            "codes": torch.randint(-127, 127, (n, 3, 8)).to(torch.int8),
            "steps": torch.rand(n, 3, 1),
        },
    ),
    "nvfp4": Operation(
        _quantized,
        lambda n: {
            "x": torch.randn(n, 32),
            "block": "1d",
            "rounding": "nearest",
            "amax": torch.rand(()),
        },
        numbers={"block": ("1D",), "rounding": ("up",)},
    ),
    "nvfp4_fake": Operation(
        fake_quantize,
        lambda n: {
            "x": torch.randn(16 * n, 32),
            "amax": torch.rand(()),
            "kind": "columns",
            "signs": torch.tensor(SIGNS, dtype=torch.float32),
        },
        numbers={"kind": ("1d",)},
    ),
    "mxfp8_fake": Operation(
        mxfp8.fake_quantize,
        lambda n: {"x": torch.randn(n, 64), "kind": "rows", "element": "e4m3"},
        numbers={"kind": ("tiles",), "element": ("e3m4",)},
    ),
    "copy_rows": Operation(
        _in_pairs,
        lambda n: {
            "targets": torch.randn(9, 2, 3),
            "to": torch.randperm(9)[:n],
            "sources": torch.randn(11, 2, 3),
            "places": torch.randint(11, (n,)),
        },
        ("targets",),
    ),
    "rotate": Operation(
        _alone(rotate),
        lambda n: {
            "x": torch.randn(n, 2, 6),
            "positions": torch.randint(99, (n,)),
            "theta": 1e4,
        },
    ),
}
