"""Recorded routes: experts that another forward pass chose, for routing replay.

Rollouts and training differ by rounding, so where two scores are nearly equal a router may choose
another expert in training, and the trained policy is not the one that was sampled. Routing replay
(R3, Ma et al., arXiv 2510.11370) gives the choices of the rollout to the training pass. Only the
choices are replayed: the weights of the experts are computed from the scores of the training pass,
so gradients reach the router as usual.

    output = model(tokens, layout=layout, head=lambda output: output)
    again = model(tokens, layout=layout, routes=output.routes)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.config import ModelConfig
from nemotron3.models.mixer import MixerConfig
from nemotron3.ops.routing import check_indices


@dataclass(frozen=True, kw_only=True)
class RecordedRoutes:
    """The experts of every token of a call: int64 [tokens, choices] for each MoE layer."""

    backbone: Sequence[Tensor]
    """The MoE layers of the backbone, first to last."""
    mtp: Sequence[Sequence[Tensor]] | None = None
    """The MoE layers of each MTP depth; with None their routers choose. The experts that an engine
    chose for drafts cannot be replayed: they were chosen from other hidden states."""

    def check(self, config: ModelConfig, *, tokens: int, mtp_depths: int) -> None:
        """Raise ConfigError if the routes do not fit a call of `tokens` tokens."""
        self._check_layers(config, "routes.backbone", self.backbone, config.layers, tokens)
        if self.mtp is None:
            return
        if len(self.mtp) != mtp_depths:
            raise ConfigError(
                f"routes.mtp has {len(self.mtp)} depths and mtp_depths is {mtp_depths}; give the "
                "routes of every depth, or None to have them chosen"
            )
        for depth, layers in enumerate(self.mtp):
            self._check_layers(config, f"routes.mtp[{depth}]", layers, config.mtp_layers, tokens)

    @staticmethod
    def _check_layers(
        config: ModelConfig,
        name: str,
        layers: Sequence[Tensor],
        mixers: Sequence[MixerConfig],
        tokens: int,
    ) -> None:
        expected = sum(mixer.has_router for mixer in mixers)
        if len(layers) != expected:
            raise ConfigError(
                f"{name} has {len(layers)} entries; the model has {expected} mixtures of experts "
                "there, and each needs its own"
            )
        moe = config.moe
        for index, indices in enumerate(layers):
            assert moe is not None
            check_indices(
                indices,
                tokens=tokens,
                choices=moe.num_experts_per_tok,
                experts=moe.n_routed_experts,
                name=f"{name}[{index}]",
            )
