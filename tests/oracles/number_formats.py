"""Run published quantizers on small tensors and keep what they make, for the tests.

    python -m tests.oracles.number_formats FOLDER_OF_TRANSFORMER_ENGINE

needs nvidia-modelopt 0.47.0, torchao 0.18.0 and PyTorch in an environment of its own, and a clone
of https://github.com/NVIDIA/TransformerEngine. Transformer Engine cannot be installed without CUDA,
but its reference quantizer is one file of plain PyTorch (`reference_nvfp4.py`), which is executed
here beside stand-ins for the modules that it imports and does not use.

`number_formats.safetensors` holds the inputs and the results; its metadata says by what they were
made.
"""

import subprocess
import sys
import types
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from torch import Tensor

FILE = Path(__file__).with_suffix(".safetensors")
REFERENCE = Path("transformer_engine/pytorch/custom_recipes/reference_nvfp4.py")
SHAPE = (32, 64)


def inputs() -> dict[str, Tensor]:
    """The tensors that are quantized."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(SHAPE, generator=generator)

    ordinary = normal()
    student = normal() / (torch.randn(3, *SHAPE, generator=generator).square().mean(0)).sqrt()
    by_row = normal() * torch.exp(2 * torch.randn(SHAPE[0], 1, generator=generator))
    steep = normal() * torch.exp2(-torch.arange(SHAPE[0])).unsqueeze(1)
    sparse = normal() * (torch.rand(SHAPE, generator=generator) < 0.1)
    sparse[:, :16] = 0.0
    halves = torch.randint(-12, 13, SHAPE, generator=generator) * 0.5
    halves[::16, ::16] = 6.0
    return {
        "ordinary": ordinary,
        "bfloat16": normal().bfloat16(),
        "heavy": student,
        "rows": by_row,
        "small blocks": steep,
        "tiny": 1e-30 * normal(),
        "sparse": sparse,
        "ties": halves,
    }


def transformer_engine(folder: Path) -> dict[str, Tensor]:
    """By the reference implementation of Transformer Engine."""
    quantizer = _reference(folder).NVFP4QuantizerRef
    made: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, rows: int, **options: Any) -> None:
        codes, scales = quantizer._quantize_blockwise_reference(
            x, x.abs().max().float(), 16, rows, pow_2_scales=False, eps=0.0, **options
        )
        made[f"{name}/codes"], made[f"{name}/scales"] = codes, scales.contiguous()

    for name, x in inputs().items():
        keep(f"{name}/te/1d", x, 1)
        keep(f"{name}/te/2d", x, 16)
        keep(
            f"{name}/te/four over six", x, 1,
            nvfp4_use_4over6=True, nvfp4_4over6_err_mode="MSE", nvfp4_e4m3_max=256,
        )  # fmt: skip
        h = quantizer._build_hadamard_matrix(16, x.device, x.dtype)
        transformed = (x.view(-1, 16) @ (h * 0.25)).view(x.shape)
        made[f"{name}/te/hadamard"] = transformed
        keep(f"{name}/te/hadamard 1d", transformed, 1)
    return made


def _reference(folder: Path) -> types.ModuleType:
    """The reference's module, with stand-ins for the rest of the package."""
    package = "transformer_engine.pytorch"
    recipes, tensors = MagicMock(), MagicMock(QuantizedTensorStorage=object, Quantizer=object)
    sys.modules[f"{package}.custom_recipes"] = recipes
    sys.modules[f"{package}.quantized_tensor"] = tensors
    module = types.ModuleType("reference_nvfp4")
    sys.modules[module.__name__] = module
    source = (folder / REFERENCE).read_text(encoding="utf-8")
    exec(compile(source, str(REFERENCE), "exec"), module.__dict__)
    return module


def modelopt() -> dict[str, Tensor]:
    """By ModelOpt's tensor types of NVFP4 and FP8."""
    from modelopt.torch.quantization.qtensor import (  # noqa: PLC0415 - absent in the test
        FP8QTensor,
        NVFP4QTensor,
    )

    made: dict[str, Tensor] = {}
    for name, x in inputs().items():
        packed, scales, scale = NVFP4QTensor.quantize(x.clone(), 16)
        values = packed.dequantize(
            torch.float32, scale=scales, double_scale=scale, block_sizes={-1: 16}
        )
        parts = {"codes": packed._quantized_data, "scales": scales, "scale": scale}
        made |= {f"{name}/modelopt/{part}": t for part, t in parts.items()}
        made[f"{name}/modelopt/values"] = values
        packed, scale = FP8QTensor.quantize(x.float())
        made[f"{name}/modelopt fp8/codes"] = packed._quantized_data
        made[f"{name}/modelopt fp8/scale"] = scale
    return made


def torchao() -> dict[str, Tensor]:
    """By torchao's NVFP4 with a tensor scale, and its MXFP8 with scales rounded up."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode  # noqa: PLC0415
    from torchao.prototype.mx_formats.mx_tensor import to_mx  # noqa: PLC0415
    from torchao.prototype.mx_formats.nvfp4_tensor import (  # noqa: PLC0415
        nvfp4_quantize,
        per_tensor_amax_to_scale,
    )

    made: dict[str, Tensor] = {}
    for name, x in inputs().items():
        scale = per_tensor_amax_to_scale(x.abs().max())
        scales, codes = nvfp4_quantize(x, 16, scale)
        parts = {"codes": codes, "scales": scales, "scale": scale}
        made |= {f"{name}/torchao/{part}": t for part, t in parts.items()}
        for element in (torch.float8_e4m3fn, torch.float8_e5m2):
            scales, codes = to_mx(x, element, 32, ScaleCalculationMode.RCEIL)
            where = f"{name}/torchao mx {str(element).removeprefix('torch.float8_')}"
            made[f"{where}/codes"], made[f"{where}/scales"] = codes, scales
    return made


def main(folder: Path) -> None:
    """Run every quantizer and write the file."""
    commit = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    origin: Mapping[str, str] = {
        "te": f"Transformer Engine {commit}, {REFERENCE}",
        "modelopt": f"nvidia-modelopt {version('nvidia-modelopt')}",
        "torchao": f"torchao {version('torchao')}",
        "torch": torch.__version__,
    }
    made = {f"{name}/x": x for name, x in inputs().items()}
    made |= transformer_engine(folder) | modelopt() | torchao()
    save_file({name: t.contiguous() for name, t in made.items()}, FILE, dict(origin))
    print(FILE)  # noqa: T201 - a program


if __name__ == "__main__":
    main(Path(sys.argv[1]))
