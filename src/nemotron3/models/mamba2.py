"""The Mamba-2 mixer: projection, short convolution, selective scan, gated norm, projection.

Dao & Gu, *Transformers are SSMs* (arXiv 2405.21060), figure 6 (the form with parallel projections),
with the norm applied after the gate and within groups. The inner width is heads times head size,
not a multiple of the model's width. Only these layers depend on the order of tokens.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.errors import ConfigError
from nemotron3.models.cache.mamba_state import MambaState
from nemotron3.models.cache.state import StateMemory, StateSize
from nemotron3.models.checks import require_divides, require_positive
from nemotron3.models.initial_values import Constant, Elements, InitialScale, Uniform
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.linear import Linear
from nemotron3.models.mixer import KeptActivations, Mixer, MixerConfig, ParameterCount
from nemotron3.models.norm import GatedGroupNorm
from nemotron3.models.parameter import DeclaredModule
from nemotron3.ops.conv import causal_conv, causal_conv_steps
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd, ssd_rates


@dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """A Mamba-2 mixer (Nemotron 3 Nano report, table 1)."""

    symbol: ClassVar[str] = "M"
    label: ClassVar[str] = "mamba"
    continues_prefixes: ClassVar[bool] = True

    mamba_num_heads: int
    """State-space heads."""
    mamba_head_dim: int
    """Channels per head; the inner width is heads times channels, independent of `hidden_size`."""
    ssm_state_size: int
    """Size N of the state of each channel."""
    n_groups: int
    """Groups of heads that share B and C, and groups of the gated norm."""
    conv_kernel: int = 4
    """Taps of the causal convolution."""
    chunk_size: int = 128
    """Tokens per chunk of the scan; it affects speed and rounding only."""
    time_step_min: float = 0.001
    """Smallest step at initialisation."""
    time_step_max: float = 0.1
    """Largest step at initialisation."""
    time_step_floor: float = 1e-4
    """Lower bound of steps at initialisation."""

    def __post_init__(self) -> None:
        require_positive(
            self, "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "chunk_size"
        )
        require_divides(self, "mamba_num_heads", "n_groups")
        if self.conv_kernel < 2:
            raise ConfigError(
                f"conv_kernel is {self.conv_kernel}; a convolution needs at least 2 taps"
            )
        require_positive(self, "time_step_min", "time_step_floor")
        if self.time_step_min > self.time_step_max:
            raise ConfigError(
                f"time_step_min is {self.time_step_min} and time_step_max {self.time_step_max}; "
                "initial steps are drawn between the two, so the first must not be larger"
            )

    @property
    def inner_size(self) -> int:
        """Width of x and of the gate z."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C together."""
        return self.inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def state_size(self) -> StateSize:
        """The SSM state and the convolution state."""
        ssm_states = self.inner_size * self.ssm_state_size
        return StateSize(accumulated=ssm_states, activations=math.prod(self._conv_shape))

    @property
    def _conv_shape(self) -> tuple[int, int]:
        return self.conv_kernel - 1, self.conv_channels

    def build(self, hidden_size: int, eps: float) -> "Mamba2Mixer":
        """The module."""
        return Mamba2Mixer(self, hidden_size, eps)

    def new_state(self, memory: StateMemory) -> MambaState:
        """Convolution and SSM states of zeros."""
        ssm_shape = self.mamba_num_heads, self.mamba_head_dim, self.ssm_state_size
        return MambaState(memory, conv_shape=self._conv_shape, ssm_shape=ssm_shape)

    def mixing_flops(self, context: int) -> float:
        """FLOPs per token of the chunked scan: products within a chunk, and those with states."""
        chunk = min(self.chunk_size, context)
        scores = 2 * self.n_groups * self.ssm_state_size * chunk
        within = 2 * self.inner_size * chunk
        ssm_states = 2 * 2 * self.inner_size * self.ssm_state_size
        return scores + within + ssm_states

    def kept_activations(self, hidden_size: int, dtype: torch.dtype) -> KeptActivations:
        """Operands of projections, convolution, scan and norm; the states that scans begin with."""
        projected = self.inner_size + self.conv_channels + self.mamba_num_heads
        narrow = hidden_size + projected + self.conv_channels + 2 * self.inner_size
        wide = 2 * self.mamba_num_heads + self.n_groups  # steps before and after softplus; scales
        initial_states = 4 * self.inner_size * self.ssm_state_size
        return KeptActivations(
            per_token=narrow * dtype.itemsize + 4 * wide,
            per_sequence=initial_states + math.prod(self._conv_shape) * dtype.itemsize,
        )


@dataclass(frozen=True)
class InitialRates:
    """Initial A_log: -A is uniform in [1, 16], as in Dao & Gu's code.

    Hugging Face's code uses 1..heads instead; docs/decisions/0002 gives the reason for the choice.
    """

    def __call__(self, elements: Elements, scale: InitialScale) -> Tensor:  # noqa: ARG002
        return elements.uniform(1.0, 16.0).log_()


@dataclass(frozen=True)
class InitialSteps:
    """Initial dt_bias: steps after softplus are log-uniform, and at least the floor."""

    config: MambaConfig

    def __call__(self, elements: Elements, scale: InitialScale) -> Tensor:  # noqa: ARG002
        c = self.config
        steps = elements.uniform(math.log(c.time_step_min), math.log(c.time_step_max)).exp_()
        steps.clamp_(min=c.time_step_floor)
        return steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus


class CausalConv1d(DeclaredModule):
    """Weights of the depthwise convolution over x, B and C."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        # The published layout has a middle axis: input channels per group, which is one.
        init = Uniform(-(taps**-0.5), taps**-0.5)
        self.declare("weight", (channels, 1, taps), init=init, decays=True)
        self.declare("bias", (channels,), init=init, decays=False)

    def forward(
        self, x: Tensor, segments: Segments, conv_states: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolution and SiLU; returns outputs [tokens, channel] and new states."""
        return causal_conv(
            x, self.weight.squeeze(1), self.bias, segments=segments, conv_states=conv_states
        )

    def steps(
        self, x: Tensor, conv_states: Tensor, slots: Tensor, intermediate_states: Tensor | None
    ) -> Float[Tensor, "tokens channel"]:
        """The same for a few tokens that continue the states of `slots`, which change in place."""
        return causal_conv_steps(
            x,
            self.weight.squeeze(1),
            self.bias,
            conv_states=conv_states,
            slots=slots,
            intermediate_states=intermediate_states,
        )


class Mamba2Mixer(Mixer):
    """The Mamba-2 mixer, which mixes a sequence along time through a state of fixed size."""

    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(self, config: MambaConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.config = config
        heads, inner = config.mamba_num_heads, config.inner_size
        # Rows of in_proj: gate z, then the inputs of the convolution (x, B, C), then the steps dt.
        self.in_proj = Linear(hidden_size, inner + config.conv_channels + heads)
        self.conv1d = CausalConv1d(config.conv_channels, config.conv_kernel)
        # These stay in float32, because the state accumulates their rounding errors, and have no
        # weight decay, which would change the dynamics instead of regularising.
        for name, init in (
            ("dt_bias", InitialSteps(config)),
            ("A_log", InitialRates()),
            ("D", Constant(1.0)),
        ):
            self.declare(name, (heads,), init=init, decays=False, keep_float32=True)
        self.norm = GatedGroupNorm(inner, config.n_groups, eps)
        self.out_proj = Linear(inner, hidden_size, writes_residual=True)

    def parameter_counts(self) -> dict[str, ParameterCount]:
        """All parameters, as one part."""
        return {"mamba": ParameterCount.of(self)}

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout,
        state: MambaState | None = None,
    ) -> Float[Tensor, "tokens d_model"]:
        """Mix each sequence along time; with a `state`, continue it."""
        c = self.config
        z, xBC, dt = self.in_proj(x, [c.inner_size, c.conv_channels, c.mamba_num_heads])
        dt, A = ssd_rates(dt, self.dt_bias, self.A_log)
        D = self.D.to(dt.dtype)
        if state is not None and state.takes_steps(layout) and not torch.is_grad_enabled():
            slots = layout.slot_index(x.device)
            xBC = self.conv1d.steps(
                xBC, state.conv_states, slots, state.conv_intermediate_states(layout)
            )
            y = state.scan(layout, self._operands(xBC, dt, A, D))
        else:
            assert not layout.is_verification, (
                "a verification call has at most MAX_STEPS tokens and no gradients"
            )
            if layout.prefixes:
                y = self._scan_with_prefixes(xBC, dt, A, D, layout)
            else:
                states = (None, None) if state is None else state.read(layout)
                y, *states = self._scan(xBC, dt, A, D, layout.segments, *states)
                if state is not None:
                    state.write(layout, *states)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _scan(
        self,
        xBC: Tensor,
        dt: Tensor,
        A: Tensor,
        D: Tensor,
        segments: Segments,
        conv_states: Tensor | None = None,
        ssm_states: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the scan, and the states of convolution and scan after each segment."""
        xBC, new_conv_states = self.conv1d(xBC, segments, conv_states)
        y, new_ssm_states = ssd(
            *self._operands(xBC, dt, A, D),
            segments=segments,
            chunk_size=self.config.chunk_size,
            initial_states=ssm_states,
        )
        return y, new_conv_states, new_ssm_states

    def _scan_with_prefixes(
        self, xBC: Tensor, dt: Tensor, A: Tensor, D: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """Scan the prefixes, and then what continues them from the states that they leave."""
        first, rest = layout.stages
        xBC_first, xBC_rest = xBC.split([first.total, rest.total])
        dt_first, dt_rest = dt.split([first.total, rest.total])
        y_first, *states = self._scan(xBC_first, dt_first, A, D, first)
        index = layout.prefix_index(xBC.device)
        states = [state.index_select(0, index) for state in states]
        y_rest, *_ = self._scan(xBC_rest, dt_rest, A, D, rest, *states)
        return torch.cat([y_first, y_rest])

    def _operands(
        self, xBC: Tensor, dt: Tensor, A: Tensor, D: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The operands of the scan: x, dt, A, B, C, D."""
        c = self.config
        state_width = c.n_groups * c.ssm_state_size
        x, B, C = xBC.split([c.inner_size, state_width, state_width], dim=-1)
        return (
            x.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim)),
            dt,
            A,
            B.unflatten(-1, (c.n_groups, c.ssm_state_size)),
            C.unflatten(-1, (c.n_groups, c.ssm_state_size)),
            D,
        )
