"""The tensors of a GGUF file: their names, and how they follow from those of a checkpoint.

llama.cpp knows the family as the architectures `nemotron_h` (no mixtures) and `nemotron_h_moe`; the
names are those of its tables (gguf-py, `MODEL_TENSORS`). It stores -exp(A_log) instead of `A_log`,
the experts of a layer as one tensor, and norms of Mamba layers by group.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from nemotron3.errors import CheckpointError
from nemotron3.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor of the file, and where its values come from."""

    name: str
    sources: tuple[str, ...]
    """Names in the checkpoint; several matrices become one tensor."""
    shape: tuple[int, ...]
    """PyTorch's order, which is that of GGUF reversed."""
    is_matrix: bool
    """Whether it may be stored in the file's type; the others are float32."""
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """What becomes of the values, before they get their shape."""


def gguf_tensors(config: ModelConfig) -> Iterator[GGUFTensor]:
    """Every tensor of a model's file but those of the multi-token-prediction block."""
    rows = (config.vocab_size, config.hidden_size)
    yield _matrix("token_embd.weight", "backbone.embeddings.weight", rows)
    makers = {"M": _mamba, "*": _attention, "E": _experts, "-": _mlp}
    for layer, kind in enumerate(config.pattern.main):
        ours, theirs = f"backbone.layers.{layer}", f"blk.{layer}"
        yield _vector(f"{theirs}.attn_norm.weight", f"{ours}.norm.weight", config.hidden_size)
        yield from makers[kind](config, f"{ours}.mixer", theirs)
    yield _vector("output_norm.weight", "backbone.norm_f.weight", config.hidden_size)
    if not config.tie_word_embeddings:
        yield _matrix("output.weight", "lm_head.weight", rows)


def check_stored(tensors: Mapping[str, tuple[int, ...]], wanted: GGUFTensor, where: str) -> None:
    """Raise CheckpointError where a source is missing, or has another number of elements."""
    numel, found = 1, 0
    for size in wanted.shape:
        numel *= size
    for source in wanted.sources:
        if source not in tensors:
            raise CheckpointError(f"{where} lacks {source}, of which {wanted.name} is made")
        elements = 1
        for size in tensors[source]:
            elements *= size
        found += elements
    if found != numel:
        raise CheckpointError(
            f"{where}: {wanted.sources[0]} has shape {tensors[wanted.sources[0]]}, which does not "
            f"give {wanted.name} of {wanted.shape}; do config.json and the weights belong together?"
        )


def _mamba(config: ModelConfig, ours: str, theirs: str) -> Iterator[GGUFTensor]:
    mamba = config.mamba
    assert mamba is not None
    heads, inner = mamba.mamba_num_heads, mamba.mamba_num_heads * mamba.mamba_head_dim
    channels = inner + 2 * mamba.n_groups * mamba.ssm_state_size
    width = config.hidden_size
    yield _matrix(
        f"{theirs}.ssm_in.weight", f"{ours}.in_proj.weight", (inner + channels + heads, width)
    )
    yield _vector(
        f"{theirs}.ssm_conv1d.weight", f"{ours}.conv1d.weight", channels, mamba.conv_kernel
    )
    yield _vector(f"{theirs}.ssm_conv1d.bias", f"{ours}.conv1d.bias", channels)
    yield _vector(f"{theirs}.ssm_dt.bias", f"{ours}.dt_bias", heads)
    yield GGUFTensor(
        name=f"{theirs}.ssm_a",
        sources=(f"{ours}.A_log",),
        shape=(heads, 1),
        is_matrix=False,
        change=lambda tensor: -tensor.double().exp(),
    )
    yield _vector(f"{theirs}.ssm_d", f"{ours}.D", heads, 1)
    groups = (mamba.n_groups, inner // mamba.n_groups)
    yield _vector(f"{theirs}.ssm_norm.weight", f"{ours}.norm.weight", *groups)
    yield _matrix(f"{theirs}.ssm_out.weight", f"{ours}.out_proj.weight", (width, inner))


def _attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[GGUFTensor]:
    attention, width = config.attention, config.hidden_size
    assert attention is not None
    queries = attention.num_attention_heads * attention.head_dim
    keys = attention.num_key_value_heads * attention.head_dim
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield _matrix(f"{theirs}.attn_{name}.weight", f"{ours}.{name}_proj.weight", (rows, width))
    yield _matrix(f"{theirs}.attn_output.weight", f"{ours}.o_proj.weight", (width, queries))


def _experts(config: ModelConfig, ours: str, theirs: str) -> Iterator[GGUFTensor]:
    moe, width = config.moe, config.hidden_size
    assert moe is not None
    experts, inner = moe.n_routed_experts, moe.moe_intermediate_size
    latent = moe.moe_latent_size or width
    # llama.cpp multiplies by the router in float32, whatever the file's type.
    yield _vector(f"{theirs}.ffn_gate_inp.weight", f"{ours}.gate.weight", experts, width)
    bias = f"{ours}.gate.e_score_correction_bias"
    yield _vector(f"{theirs}.exp_probs_b.bias", bias, experts)
    if moe.moe_latent_size is not None:
        down, up = f"{ours}.fc1_latent_proj.weight", f"{ours}.fc2_latent_proj.weight"
        yield _matrix(f"{theirs}.ffn_latent_down.weight", down, (latent, width))
        yield _matrix(f"{theirs}.ffn_latent_up.weight", up, (width, latent))
    for name, shape in (("up", (inner, latent)), ("down", (latent, inner))):
        sources = tuple(f"{ours}.experts.{e}.{name}_proj.weight" for e in range(experts))
        yield GGUFTensor(
            name=f"{theirs}.ffn_{name}_exps.weight",
            sources=sources,
            shape=(experts, *shape),
            is_matrix=True,
        )
    shared = moe.moe_shared_expert_intermediate_size
    for name, shape in (("up", (shared, width)), ("down", (width, shared))):
        source = f"{ours}.shared_experts.{name}_proj.weight"
        yield _matrix(f"{theirs}.ffn_{name}_shexp.weight", source, shape)


def _mlp(config: ModelConfig, ours: str, theirs: str) -> Iterator[GGUFTensor]:
    mlp, width = config.mlp, config.hidden_size
    assert mlp is not None
    for name, shape in (
        ("up", (mlp.intermediate_size, width)),
        ("down", (width, mlp.intermediate_size)),
    ):
        yield _matrix(f"{theirs}.ffn_{name}.weight", f"{ours}.{name}_proj.weight", shape)


def _matrix(name: str, source: str, shape: tuple[int, ...]) -> GGUFTensor:
    return GGUFTensor(name=name, sources=(source,), shape=shape, is_matrix=True)


def _vector(name: str, source: str, *shape: int) -> GGUFTensor:
    return GGUFTensor(name=name, sources=(source,), shape=shape, is_matrix=False)
