"""llama.cpp's Q4_0 file of a model of random weights, at any size.

    python -m benchmarks.random_gguf --size 150m-latent nano.gguf
    python -m benchmarks.random_gguf --size 30m-latent --quantize build/bin/llama-quantize nano.gguf

Types are those that `llama-quantize FILE Q4_0` gives a plain file: Q4_0 for all matrices, but Q6_K
for the output layer (Q8_0 where its rows are no multiple of 256), and float32 for routers and
vectors; where rows are no multiple of a type's block, the types that it falls back to. With
`--quantize` that program makes a file of the same model, and the types are compared. Blocks are
drawn in their own format, a tensor at a time, as benchmarks/random_checkpoint.py does. Names,
shapes and fields are those of `nemotron3 export`. There is no vocabulary, which llama-bench does
not need.
"""

import argparse
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from benchmarks.random_checkpoint import plain_values, random_bytes, sizes
from torch import Generator, Tensor

from nemotron3.export.gguf import architecture, check_expressible, model_fields
from nemotron3.export.gguf_file import gguf_library, num_tensor_bytes, write_gguf
from nemotron3.export.gguf_tensors import GGUFTensor, gguf_tensors
from nemotron3.models.config import ModelConfig

_BLOCKS = {"q4_0": 32, "q8_0": 32, "q6_k": 256}
_RMS = {"q4_0": 21.5**0.5, "q8_0": 73.9, "q6_k": 18.5 * 66.6}
"""Root mean square of random elements before the half-precision scale of their block."""


def q4_0_type(tensor: GGUFTensor, config: ModelConfig) -> str:
    """The type that llama-quantize gives a tensor of a plain file."""
    if not tensor.is_matrix:
        return "f32"
    output = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    if tensor.name != output:
        wanted = ["q4_0"]
    elif tensor.shape[-1] % 32:
        wanted = ["q8_0"]
    else:
        wanted = ["q6_k", "q8_0"]
    fitting = [type_ for type_ in wanted if tensor.shape[-1] % _BLOCKS[type_] == 0]
    return fitting[0] if fitting else "f16"


def num_bytes(config: ModelConfig) -> int:
    """Bytes of the tensors of the file."""
    return sum(num_tensor_bytes(t.shape, q4_0_type(t, config)) for t in gguf_tensors(config))


def write_random_gguf(config: ModelConfig, out: Path, *, seed: int = 0) -> None:
    """Write the file; StorageError at once if the disk is too small."""
    _write(config, out, {t.name: q4_0_type(t, config) for t in gguf_tensors(config)}, seed)


def _write(config: ModelConfig, out: Path, types: dict[str, str], seed: int) -> None:
    check_expressible(config)
    tensors = list(gguf_tensors(config))
    # Of the vocabulary llama.cpp asks for the number of tokens alone, which is among the fields.
    fields: dict[str, Any] = {
        "general.name": "random",
        "general.quantization_version": 2,
        **model_fields(config),
        "tokenizer.ggml.model": "no_vocab",
    }
    write_gguf(
        out,
        fields,
        {tensor.name: (tensor.shape, types[tensor.name]) for tensor in tensors},
        _values(tensors, types, config.init_std, seed),
        architecture=architecture(config),
        file_type="MOSTLY_Q4_0",
    )


def _values(
    tensors: Sequence[GGUFTensor], types: dict[str, str], std: float, seed: int
) -> Iterator[np.ndarray[Any, Any]]:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        type_ = types[tensor.name]
        if type_ in _BLOCKS:
            size = num_tensor_bytes(tensor.shape, type_)
            yield _blocks(type_, size, std, generator).numpy()
            continue
        values = plain_values(tensor.sources[0], torch.Size(tensor.shape), std, generator)
        values = tensor.change(values).reshape(tensor.shape)
        yield values.to(torch.float16 if type_ == "f16" else torch.float32).numpy()


def _blocks(type_: str, size: int, std: float, generator: Generator) -> Tensor:
    """Blocks of random elements whose scale gives them the standard deviation."""
    block, num_block_bytes = _BLOCKS[type_], size_of_block(type_)
    blocks = random_bytes(torch.Size([size // num_block_bytes, num_block_bytes]), generator)
    scale = torch.tensor([std / _RMS[type_]], dtype=torch.float16).view(torch.uint8)
    if type_ == "q6_k":  # the scale is last, after one of eight bits for each 16 elements
        blocks[:, -2:] = scale
        blocks[:, -2 - block // 16 : -2] &= 0x7F
    else:
        blocks[:, :2] = scale
    return blocks


def size_of_block(type_: str) -> int:
    return num_tensor_bytes((_BLOCKS[type_],), type_)


def types_of(file: Path) -> dict[str, str]:
    """The types of a file's tensors by their names."""
    tensors = gguf_library().GGUFReader(file).tensors
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in tensors}


def differing_types(config: ModelConfig, program: Path) -> dict[str, tuple[str, str]]:
    """Tensors to which llama-quantize gives another type than we: ours and its own."""
    with TemporaryDirectory() as folder:
        plain, made = Path(folder) / "plain.gguf", Path(folder) / "made.gguf"
        tensors = list(gguf_tensors(config))
        _write(config, plain, {t.name: "f16" if t.is_matrix else "f32" for t in tensors}, 0)
        subprocess.run([program, plain, made, "Q4_0"], check=True, capture_output=True)
        theirs = types_of(made)
    ours = {tensor.name: q4_0_type(tensor, config) for tensor in tensors}
    assert ours.keys() == theirs.keys()
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(sizes()), default="150m-latent")
    parser.add_argument("--quantize", type=Path, help="a built llama-quantize, to compare types")
    parser.add_argument("out", type=Path)
    known = parser.parse_args(arguments)
    config = sizes()[known.size]
    if known.quantize is not None:
        if different := differing_types(config, known.quantize):
            raise SystemExit(f"{known.quantize} chooses other types: {different}")
        print(f"{known.quantize} chooses the same types")
    print(f"writing {num_bytes(config) / 1e9:.3f} GB to {known.out}")
    write_random_gguf(config, known.out)


if __name__ == "__main__":
    main()
