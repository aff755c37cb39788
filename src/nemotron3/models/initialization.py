"""Initial weights, as the sources give them.

Megatron-LM's rules with Nemotron's numbers: every matrix is N(0, std) with std = sqrt(0.8 / width),
which the published 0.0173, 0.014 and 0.0099 all follow; matrices that write to the residual stream
are N(0, std / sqrt(layers)), the hybrid form of the usual sqrt(2 layers). Mamba's own parameters
follow Dao & Gu's code: A uniform in [1, 16], steps log-uniform, D = 1. Hugging Face's file draws A
as 1..heads instead; docs/decisions/0002 says why that is not taken and what was decided where
nothing is said.
"""

import math

import torch
from torch import Tensor, nn

from nemotron3.models.attention import Attention
from nemotron3.models.config import MambaConfig, ModelConfig
from nemotron3.models.experts import MixtureOfExperts, RoutedExperts, Router
from nemotron3.models.linear import Embedding, Linear
from nemotron3.models.mamba2 import CausalConv1d, Mamba2Mixer
from nemotron3.models.mlp import MLP
from nemotron3.models.norm import GatedGroupNorm, RMSNorm


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """Draw every parameter of `model` anew, in the order of its modules."""
    std = config.init_std
    residual_std = std / math.sqrt(config.num_layers)
    writes_residual = _residual_writers(model)
    for module in model.modules():
        match module:
            case Linear():
                scale = residual_std if module in writes_residual else std
                module.weight.normal_(0.0, scale, generator=generator)
            case RoutedExperts():
                scale = residual_std if module in writes_residual else std
                module.up_proj.normal_(0.0, std, generator=generator)
                module.down_proj.normal_(0.0, scale, generator=generator)
            case Router():
                module.weight.normal_(0.0, std, generator=generator)
                module.e_score_correction_bias.zero_()
            case Embedding():
                module.weight.normal_(0.0, std, generator=generator)
            case RMSNorm() | GatedGroupNorm():
                module.weight.fill_(1.0)
            case CausalConv1d():
                bound = module.weight.shape[-1] ** -0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
            case Mamba2Mixer():
                _initialize_mamba(module, module.config, generator)


def _residual_writers(model: nn.Module) -> set[nn.Module]:
    writers: set[nn.Module] = set()
    for module in model.modules():
        match module:
            case Mamba2Mixer():
                writers.add(module.out_proj)
            case Attention():
                writers.add(module.o_proj)
            case MLP():
                writers.add(module.down_proj)
            case MixtureOfExperts():
                # Megatron scales both second matrices of a latent mixture.
                writers.add(module.experts)
                if module.fc2_latent_proj is not None:
                    writers.add(module.fc2_latent_proj)
    return writers


def _initialize_mamba(mixer: Mamba2Mixer, config: MambaConfig, generator: torch.Generator) -> None:
    mixer.A_log.uniform_(1.0, 16.0, generator=generator).log_()
    mixer.D.fill_(1.0)
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = torch.empty_like(mixer.dt_bias).uniform_(low, high, generator=generator).exp_()
    mixer.dt_bias.copy_(_inverse_softplus(dt.clamp_(min=config.time_step_floor)))


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
