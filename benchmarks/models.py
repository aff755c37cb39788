"""The models of the speed benchmarks, and the check that two programs compute the same one.

The sizes are chosen so that two CPU cores take seconds: about 30M and 150M parameters, of which a
token uses a third. Every width is a multiple that llama.cpp's converter requires. A ratio of speeds
is meaningful only for the same computation, so `parity` compares logits, loss and gradient first.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nemotron3.models.config import (
    AttentionConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments
from nemotron3.training.batch import TrainBatch
from nemotron3.training.pretrain_objective import PretrainLossConfig, PretrainObjective

TOLERANCE = 1e-4
"""Largest difference between the two programs, relative to the largest compared value."""


def _config(
    pattern: str,
    mamba: MambaConfig,
    attention: AttentionConfig,
    feed_forward: MoEConfig | MLPConfig,
    *,
    width: int,
) -> ModelConfig:
    return ModelConfig(
        hybrid_override_pattern=pattern,
        vocab_size=32 * width,
        hidden_size=width,
        mamba=mamba,
        attention=attention,
        moe=feed_forward if isinstance(feed_forward, MoEConfig) else None,
        mlp=feed_forward if isinstance(feed_forward, MLPConfig) else None,
    )


def _moe(width: int, *, experts: int, active: int, shared: int, latent: int | None) -> MoEConfig:
    return MoEConfig(
        n_routed_experts=experts,
        num_experts_per_tok=active,
        moe_intermediate_size=width,
        moe_shared_expert_intermediate_size=shared,
        moe_latent_size=latent,
        routed_scaling_factor=2.5,
    )


def configs() -> dict[str, ModelConfig]:
    """The measured models by name; the latent ones have twice as many experts of half the width.

    The dense one is for programs that do not support these experts.
    """
    toy = MambaConfig(mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2)
    mamba = MambaConfig(mamba_num_heads=16, mamba_head_dim=32, ssm_state_size=64, n_groups=4)
    wide = MambaConfig(mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=128, n_groups=8)
    heads = [
        AttentionConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=size)
        for size in (8, 32, 64)
    ]
    standard = _moe(256, experts=32, active=6, shared=512, latent=None)
    latent = _moe(256, experts=64, active=12, shared=512, latent=128)
    wide_standard = _moe(448, experts=32, active=6, shared=1024, latent=None)
    wide_latent = _moe(448, experts=64, active=12, shared=1024, latent=256)
    small, large = "MEMEM*EMEME", "MEMEM*EMEMEM*EMEME"
    return {
        "toy": _config(
            "ME*E",
            toy,
            heads[0],
            _moe(32, experts=4, active=2, shared=32, latent=32),
            width=64,
        ),
        "30m-latent": _config(small, mamba, heads[1], latent, width=256),
        "30m-standard": _config(small, mamba, heads[1], standard, width=256),
        "40m-dense": _config(
            "M-M-M*-M-M-", wide, heads[2], MLPConfig(intermediate_size=2048), width=512
        ),
        "150m-latent": _config(large, wide, heads[2], wide_latent, width=512),
        "150m-standard": _config(large, wide, heads[2], wide_standard, width=512),
    }


def tokens_of(config: ModelConfig, *shape: int, seed: int = 1) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same weights in both programs."""

    ours: LanguageModel
    theirs: nn.Module
    folder: Path
    """Folder of the weights in the published layout, for other programs."""


def build_pair(config: ModelConfig, folder: Path) -> Pair:
    """Create a model, save it, and load it in transformers, without its lower bound on dt."""
    ours = LanguageModel.from_config(config, seed=0)
    ours.save_pretrained(folder)
    return Pair(ours=ours, theirs=load_theirs(folder), folder=folder)


def load_theirs(folder: Path) -> nn.Module:
    """transformers' model, which runs in plain PyTorch; its warnings about that are turned off."""
    from tests.oracles import huggingface  # noqa: PLC0415 - takes seconds, and is not everywhere

    logging.getLogger("transformers").setLevel(logging.ERROR)
    return huggingface.load(folder)


def our_loss(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Mean next-token loss of [batch, seq] tokens, with the statistics that training computes."""
    return training_loss(model, targets(tokens), mtp_loss_scaling=0.0)


def training_loss(model: LanguageModel, batch: TrainBatch, **loss: float) -> Tensor:
    """The pre-training loss of a batch of one microbatch."""
    objective = objective_of(model, **loss)
    counts = objective.counts(batch)
    return model(
        batch.tokens,
        layout=SequenceLayout(batch.segments),
        head=lambda output: objective.loss(output, batch, counts),
        mtp_depths=objective.mtp_depths,
    ).total


def objective_of(model: LanguageModel, **loss: float) -> PretrainObjective:
    """The pre-training objective for this model."""
    depths = model.config.pattern.num_mtp_depths
    return PretrainObjective(PretrainLossConfig(**loss), num_mtp_depths=depths)


def their_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The same loss in transformers."""
    return model(tokens, labels=tokens, use_cache=False).loss


def targets(tokens: Tensor) -> TrainBatch:
    """A batch in which each token predicts the next of its row, and the last has no target."""
    mask = torch.ones(tokens.shape, device=tokens.device)
    mask[:, -1] = 0
    return TrainBatch(
        tokens=tokens.flatten(),
        targets=tokens.roll(-1, dims=1).flatten(),
        mask=mask.flatten(),
        segments=Segments.uniform(*tokens.shape),
    )


def parity(pair: Pair, *, length: int = 300, steps: int = 8) -> dict[str, float]:
    """Largest relative differences of logits (full pass and decoding) and of a gradient."""
    tokens = tokens_of(pair.ours.config, 2, length, seed=2).to(pair.ours.device)
    with torch.no_grad():
        ours = pair.ours(tokens, layout=SequenceLayout.of(tokens))
        theirs = pair.theirs(tokens, use_cache=False).logits
        state = pair.ours.new_state(2)
        decoded = [pair.ours(part, state=state) for part in _prompt_and_steps(tokens, steps)]
    differences = {
        "logits": _difference(ours, theirs),
        "decoded logits": _difference(torch.cat(decoded, dim=1), theirs),
    }
    our_loss(pair.ours, tokens).backward()
    their_loss(pair.theirs, tokens).backward()
    theirs_by_name = dict(pair.theirs.named_parameters())
    differences["gradient"] = _difference(
        pair.ours.get_parameter("lm_head.weight").grad, theirs_by_name["lm_head.weight"].grad
    )
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    return differences


def _prompt_and_steps(tokens: Tensor, steps: int) -> list[Tensor]:
    return [tokens[:, :-steps], *tokens[:, -steps:].split(1, dim=1)]


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return ((a - b).abs().max() / b.abs().max()).item()
