"""Hugging Face transformers as an oracle: loading, and the one repair it needs.

Its Mamba mixer floors the step dt at `time_step_min` in the scan and not in the single-token step,
whatever `time_step_limit` says (transformers pull request 48989). `repaired` removes the floor,
which is what the models were trained with and what every other engine does.
"""

import contextlib
import io
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import NemotronHForCausalLM, PreTrainedModel


def repaired(model: nn.Module) -> nn.Module:
    """The same model without a floor under dt."""
    for module in model.modules():
        if type(module).__name__ == "NemotronHMamba2Mixer":
            module.time_step_limit = (0.0, math.inf)
    return model


def load(
    path: Path, kind: type[PreTrainedModel] = NemotronHForCausalLM, *, repair: bool = True
) -> PreTrainedModel:
    """A model that transformers reads from `path` without a tensor missing or left over."""
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        model, report = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return (repaired(model) if repair else model).eval()


def save(model: PreTrainedModel, path: Path) -> None:
    """What transformers writes."""
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(path)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of a full forward pass."""
    # Without attention layers its cache has no length to ask for, so none is made.
    return model(tokens, use_cache=False).logits
