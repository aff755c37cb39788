"""Quantized checkpoints of random weights, in the published form and at any size.

The mix is the published one (`nemotron3 quantize --format mixed`): routed experts NVFP4, shared
experts and both projections of Mamba FP8, the rest as published, mostly bfloat16. Weights are drawn
in their own format, one matrix after another, so a model that is larger than the memory can be
written. It answers nonsense at the speed of a trained model: the work of a step depends on shapes
alone, and random routers choose all experts about equally often.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.models import configs
from torch import Generator, Tensor

from nemotron3.models import huggingface
from nemotron3.models.allocation import allocate
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import use_weight_format
from nemotron3.ops.weights import FP8Weight, NVFP4Weight, Weight
from nemotron3.quantization import formats_for

META = torch.device("meta")
_RMS = 2.926 * 1.159
"""Root mean square of random E2M1 elements times that of block scales from 0.5 to 1.875."""


def sizes() -> dict[str, ModelConfig]:
    """Models by name.

    `nano-mtp` has the block for drafts that later releases of Nano have; `nano-5` has five layers
    of Nano, which show at a sixth of its size what each costs.
    """
    nano = ModelConfig.preset("nano")
    pattern = f"{nano.hybrid_override_pattern}/*E"
    return {
        "nano": nano,
        "nano-mtp": replace(nano, hybrid_override_pattern=pattern),
        "nano-5": replace(nano, hybrid_override_pattern="MEM*E"),
        "tiny": ModelConfig.preset("tiny"),
        **configs(),
    }


def planned_model(config: ModelConfig) -> LanguageModel:
    """The model without memory, in the published mix."""
    with META:
        model = LanguageModel(config)
        use_weight_format(model, formats_for(model, "mixed"))
    allocate(model, META, torch.bfloat16)
    return model


def num_bytes(model: LanguageModel) -> int:
    """Bytes of the tensors of a planned model's directory."""
    views = (view for _, view in huggingface.published_views(model, model.config))
    return sum(
        view.nbytes if isinstance(view, Tensor) else sum(t.nbytes for t in view.parts().values())
        for view in views
    )


def write_checkpoint(
    config: ModelConfig, path: Path, *, seed: int = 0, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a model directory without a tokenizer; StorageError at once if the disk is too small.

    No more than one matrix is in memory, the largest being the embedding.
    """
    model = planned_model(config)
    weights = random_weights(model, seed)
    huggingface.write_weights(model, config, path, weights, max_shard_bytes=max_shard_bytes)


def random_weights(model: LanguageModel, seed: int) -> Iterator[tuple[str, Weight]]:
    """A value for each published weight of a planned model."""
    generator = torch.Generator().manual_seed(seed)
    std = model.config.init_std
    for name, view in huggingface.published_views(model, model.config):
        if isinstance(view, NVFP4Weight):
            yield name, _nvfp4(view, std, generator)
        elif isinstance(view, FP8Weight):
            values = std * torch.randn(view.shape, generator=generator)
            yield name, FP8Weight.empty(view.shape).copy_(values)
        else:
            assert isinstance(view, Tensor)
            yield name, plain_values(name, view.shape, std, generator).to(view.dtype)


def _nvfp4(like: NVFP4Weight, std: float, generator: Generator) -> NVFP4Weight:
    scales = random_bytes(like.block_scales.shape, generator) & 0x0F | 0x30
    return NVFP4Weight(
        random_bytes(like.codes.shape, generator),
        scales.view(torch.float8_e4m3fn),
        torch.full(like.shape[:1], std / _RMS),
    )


def random_bytes(shape: torch.Size, generator: Generator) -> Tensor:
    """Codes of any format of eight bits or fewer."""
    words = -(-shape.numel() // 8)
    drawn = torch.randint(-(2**63), 2**63 - 1, (words,), generator=generator)
    return drawn.view(torch.uint8)[: shape.numel()].view(shape)


def plain_values(name: str, shape: torch.Size, std: float, generator: Generator) -> Tensor:
    """Norms that change nothing, rates and steps as in a new model, and normal numbers."""
    last = name.rpartition(".")[2]
    value = torch.empty(shape)
    if last == "A_log":
        value.uniform_(1.0, 16.0, generator=generator).log_()
    elif last == "dt_bias":
        steps = value.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
        value = steps + torch.log(-torch.expm1(-steps))
    elif last == "D" or "norm" in name:
        value.fill_(1.0)
    elif last.endswith("bias"):
        value.zero_()
    else:
        value.normal_(0.0, 0.5 if "conv1d" in name else std, generator=generator)
    return value
