"""Weights in the memory of the mapped files that hold them, for inference on the CPU.

A matrix is mapped if compiled products read it as it is stored: NVFP4, FP8 and int8, bfloat16 and
float32, one tensor for a matrix or one for each expert. All else is copied: norms, the convolution
and other vectors, which are small, and matrices in another layout or dtype.
"""

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from nemotron3.checkpoint.mapping import mapped_tensors
from nemotron3.checkpoint.safetensors import ShardedReader
from nemotron3.errors import CheckpointError, OperandError
from nemotron3.models.config import ModelConfig
from nemotron3.models.parameter import parameter_specs
from nemotron3.ops.weights import CompiledWeight, ExpertMatrices

READ_AS_STORED = (torch.bfloat16, torch.float32)
"""Dtypes of plain matrices that products of float32 activations read without a copy."""


def map_matrices(
    model: nn.Module,
    config: ModelConfig,
    dialect: ModuleType,
    reader: ShardedReader,
    stored: Mapping[str, str],
) -> set[str]:
    """Put views of the files into a model on the meta device, wherever no copy is needed.

    `stored` are the names in the files by published names; names, shapes and formats have been
    compared with the model. Returns the published names of what is mapped.
    """
    files = dict(mapped_tensors(reader))
    tensors = {name: files[spelling] for name, spelling in stored.items() if spelling in files}
    mapped: set[str] = set()
    for parameter, names in _matrices(model, config, dialect).items():
        prefix, _, last = parameter.rpartition(".")
        module = model.get_submodule(prefix)
        weight = getattr(module, last)
        if isinstance(weight, CompiledWeight):
            ends = list(weight.parts())
            parts = {n: {end: n.removesuffix("weight") + end for end in ends} for n in names}
            used = {spelling for part in parts.values() for spelling in part.values()}
            if not used <= tensors.keys() or not _is_whole(weight, names):
                continue
            made = [_over(weight, name, part, tensors, reader) for name, part in parts.items()]
            setattr(module, last, ExpertMatrices(made) if len(weight.shape) == 3 else made[0])
            mapped |= used
        elif weight.dim() == 2 and len(names) == 1 and names[0] in tensors:
            view = tensors[names[0]]
            if view.dtype in READ_AS_STORED:
                setattr(module, last, nn.Parameter(view, requires_grad=False))
                mapped.add(names[0])
    return mapped


def _matrices(model: nn.Module, config: ModelConfig, dialect: ModuleType) -> dict[str, list[str]]:
    """The published names of each matrix of products and of the embedding, by our names."""
    specs = parameter_specs(model).items()
    ours = {dialect.published_product(n): n for n, s in specs if s.quantizes or s.embeds}
    found: dict[str, list[str]] = {}
    for name, _ in dialect.published_views(model, config):
        if (parameter := ours.get(dialect.product_of(name))) is not None:
            found.setdefault(parameter, []).append(name)
    return found


def _is_whole(weight: CompiledWeight, names: list[str]) -> bool:
    """Whether each matrix is stored whole: gate and value of SwiGLU are one here and two there."""
    return len(names) == (weight.shape[0] if len(weight.shape) == 3 else 1)


def _over(
    weight: CompiledWeight,
    name: str,
    parts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    reader: ShardedReader,
) -> CompiledWeight:
    try:
        return type(weight).over({part: tensors[spelling] for part, spelling in parts.items()})
    except OperandError as error:
        raise CheckpointError(f"{reader.directory}: {name!r}: {error}") from error
