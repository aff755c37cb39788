"""A model with some of its matrices in number formats of their own.

Everything else is shared with the model that it is made of, so that both are at hand to be
compared, and the memory is that of the codes beside it.
"""

from collections.abc import Mapping

import torch
from torch import nn

from nemotron3.errors import CheckpointError, OperandError
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import use_weight_format
from nemotron3.ops.nvfp4 import Scales
from nemotron3.ops.weights import WeightFormat, quantize_weight


@torch.no_grad()
def quantized_model(
    model: LanguageModel, formats: Mapping[str, WeightFormat], *, scales: Scales = "max"
) -> LanguageModel:
    """The model with the parameters named in `formats` rounded to their formats.

    `scales` is how NVFP4 chooses block scales. Raises CheckpointError, which names the matrix, for
    values that are not finite.
    """
    with torch.device("meta"):
        quantized = type(model)(model.config)
        use_weight_format(quantized, formats)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        prefix, _, last = name.rpartition(".")
        if name in formats:
            try:
                weight = quantize_weight(formats[name], tensor, scales=scales)
            except OperandError as error:
                raise CheckpointError(f"{name!r} cannot be quantized: {error}") from error
            setattr(quantized.get_submodule(prefix), last, weight)
            continue
        module = quantized.get_submodule(prefix)
        if isinstance(tensor, nn.Parameter):
            setattr(module, last, tensor)
        else:
            module.register_buffer(last, tensor)
    quantized.activation_dtype, quantized.companions = model.activation_dtype, model.companions
    return quantized
