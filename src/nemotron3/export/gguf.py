"""GGUF: a model and its tokenizer in one file, for llama.cpp and the programs built on it.

    export_gguf("runs/tiny-rl/model", "tiny.gguf", dtype="f32")
    # llama-server -m tiny.gguf

The file is written tensor by tensor, so a model of any size needs the memory of its largest tensor.
It has no multi-token-prediction block: llama.cpp's differs from the published one (its last norm
subtracts the mean), and drafts change no answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nemotron3.checkpoint.safetensors import ShardedReader
from nemotron3.errors import ConfigError
from nemotron3.export.gguf_file import gguf_library, write_gguf
from nemotron3.export.gguf_tensors import GGUFTensor, check_stored, gguf_tensors
from nemotron3.export.gguf_vocabulary import vocabulary_fields
from nemotron3.models.config import ModelConfig
from nemotron3.models.huggingface import read_config, stored_weight_format
from nemotron3.models.huggingface.nemotron_h import our_spelling, unsupported
from nemotron3.text import Tokenizer

DType = Literal["f32", "bf16", "f16", "q8_0"]
DTYPES: tuple[DType, ...] = get_args(DType)

_STORED: dict[torch.dtype, DType] = {torch.float32: "f32", torch.float16: "f16"}
"""The type of a file that keeps the values of a checkpoint; of the others bf16 does."""


@dataclass(frozen=True, kw_only=True)
class GGUFSummary:
    """What was written."""

    file: Path
    dtype: DType
    num_tensors: int
    num_bytes: int
    left_out: tuple[str, ...]
    """Parts of the model that are not in the file."""


def export_gguf(
    path: Path | str, out: Path | str, *, dtype: DType | None = None, overwrite: bool = False
) -> GGUFSummary:
    """Write the model directory `path` as the file `out`.

    `dtype` is that of matrices; the default keeps the values as they are stored. With q8_0, those
    whose rows are no multiple of 32 numbers are f16. Vectors and routers are always f32. Raises
    ConfigError, DataError or CheckpointError, before anything is written, for a model that
    llama.cpp cannot express or whose files do not belong together.
    """
    path, out = Path(path), Path(out)
    gguf_library()
    if out.exists() and not overwrite:
        raise ConfigError(f"is {out}, which exists; name another file, or delete it", field="out")
    if (held := stored_weight_format(path)) is not None:
        raise ConfigError(
            f"{path} holds {held} weights, which GGUF spells otherwise; export the model that they "
            "were made from, with --dtype q8_0 or llama-quantize afterwards"
        )
    config = read_config(path)
    check_expressible(config)
    tokenizer = Tokenizer.from_directory(path)
    reader = ShardedReader(path)
    names = {our_spelling(name): name for name in reader.names}
    shapes = {ours: reader.info(name).shape for ours, name in names.items()}
    tensors = list(gguf_tensors(config))
    for tensor in tensors:
        check_stored(shapes, tensor, str(path))
    kept = reader.info(names["backbone.embeddings.weight"]).dtype
    chosen: DType = dtype or _STORED.get(kept, "bf16")
    name = path.parent.name if path.name == "model" else path.name
    fields = {
        "general.name": name,
        **model_fields(config),
        **vocabulary_fields(tokenizer, rows=config.vocab_size),
    }
    types: list[DType] = [_type_of(tensor, chosen) for tensor in tensors]
    values = (
        _encoded(_values(tensor, [reader.load(names[source]) for source in tensor.sources]), type_)
        for tensor, type_ in zip(tensors, types, strict=True)
    )
    write_gguf(
        out,
        fields,
        {tensor.name: (tensor.shape, type_) for tensor, type_ in zip(tensors, types, strict=True)},
        values,
        architecture=architecture(config),
        file_type=_FILE_TYPES[chosen],
    )
    return GGUFSummary(
        file=out,
        dtype=chosen,
        num_tensors=len(tensors),
        num_bytes=out.stat().st_size,
        left_out=("the multi-token-prediction block",) if config.pattern.mtp else (),
    )


def check_expressible(config: ModelConfig) -> None:
    """Raise ConfigError for a model that llama.cpp has no arithmetic for."""
    kinds = set(config.pattern.main)
    tied = config.tie_word_embeddings  # which llama.cpp can
    why = None if tied else unsupported(torch.nn.Module(), config)
    if why is None and not {"M", "*"} <= kinds:
        why = "its layers are not both Mamba and attention"
    if why is None and {"E", "-"} <= kinds:
        why = "it has both mixtures of experts and dense layers"
    if why is not None:
        raise ConfigError(
            f"llama.cpp's Nemotron-H cannot express {config.hybrid_override_pattern}: {why}"
        )


def model_fields(config: ModelConfig) -> dict[str, Any]:
    """The model's hyperparameters by llama.cpp's keys, without the prefix of the architecture."""
    mamba, attention, moe, mlp = config.mamba, config.attention, config.moe, config.mlp
    assert mamba is not None
    assert attention is not None
    main = config.pattern.main
    width = moe.moe_intermediate_size if moe is not None else mlp.intermediate_size if mlp else 0
    fields: dict[str, Any] = {
        "block_count": len(main),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        # By these two llama.cpp tells kinds of layers apart.
        "feed_forward_length": [width if kind in "E-" else 0 for kind in main],
        "attention.head_count_kv": [
            attention.num_key_value_heads if kind == "*" else 0 for kind in main
        ],
        "attention.head_count": attention.num_attention_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "attention.layer_norm_rms_epsilon": float(config.layer_norm_epsilon),
        "ssm.conv_kernel": mamba.conv_kernel,
        "ssm.state_size": mamba.ssm_state_size,
        "ssm.group_count": mamba.n_groups,
        "ssm.inner_size": mamba.mamba_num_heads * mamba.mamba_head_dim,
        "ssm.time_step_rank": mamba.mamba_num_heads,
    }
    if moe is not None:
        fields |= {
            "expert_count": moe.n_routed_experts,
            "expert_used_count": moe.num_experts_per_tok,
            "expert_feed_forward_length": moe.moe_intermediate_size,
            "expert_shared_feed_forward_length": moe.moe_shared_expert_intermediate_size,
            "expert_shared_count": 1,
            "expert_group_count": 1,
            "expert_weights_norm": moe.norm_topk_prob,
            "expert_weights_scale": float(moe.routed_scaling_factor),
        }
        if moe.moe_latent_size is not None:
            fields["moe_latent_size"] = moe.moe_latent_size
    prefix = architecture(config)
    return {f"{prefix}.{name}": value for name, value in fields.items()}


_FILE_TYPES: dict[DType, str] = {
    "f32": "ALL_F32",
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
}


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the family."""
    return "nemotron_h" if config.moe is None else "nemotron_h_moe"


def _type_of(tensor: GGUFTensor, dtype: DType) -> DType:
    if not tensor.is_matrix:
        return "f32"
    return "f16" if dtype == "q8_0" and tensor.shape[-1] % 32 else dtype


def _values(tensor: GGUFTensor, loaded: Sequence[Tensor]) -> Tensor:
    values = loaded[0] if len(loaded) == 1 else torch.stack(list(loaded))
    return tensor.change(values).reshape(tensor.shape)


def _encoded(values: Tensor, dtype: DType) -> np.ndarray[Any, Any]:
    if dtype == "bf16":
        return values.bfloat16().view(torch.int16).numpy()
    if dtype == "q8_0":
        gguf = gguf_library()
        return gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    return values.to(torch.float16 if dtype == "f16" else torch.float32).numpy()
