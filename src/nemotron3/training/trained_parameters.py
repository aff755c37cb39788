"""Which parameters are trained, counted by part of the model."""

from typing import NamedTuple

from nemotron3.models.adapted_weight import AdaptedWeight
from nemotron3.models.block import Block
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.weights import QuantizedWeight

_OF_MIXTURES = {
    "gate": "router",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "fc1_latent_proj": "latent projections",
    "fc2_latent_proj": "latent projections",
}


class TrainedCount(NamedTuple):
    """Parameters of a part."""

    trained: int
    """Those with gradients; of an adapted weight, the parameters of its change."""
    total: int
    """All of the model's own, without those of an adapter."""
    formats: frozenset[str] = frozenset()
    """Number formats of those that are frozen because they are quantized."""


def trained_by_part(model: LanguageModel) -> dict[str, TrainedCount]:
    """Counts of every part that the model has, in the order of its layers."""
    changes = {
        id(part)
        for module in model.modules()
        if isinstance(module, AdaptedWeight)
        for part in (module.A, module.B)
    }
    counts: dict[str, TrainedCount] = {}
    for name, parameter in model.named_parameters():
        part, size = _part_of(model, name), parameter.numel()
        have = counts.get(part, TrainedCount(0, 0))
        counts[part] = have._replace(
            trained=have.trained + (size if parameter.requires_grad else 0),
            total=have.total + (0 if id(parameter) in changes else size),
        )
    for name, weight in model.named_modules():
        if isinstance(weight, QuantizedWeight):
            part = _part_of(model, name)
            have = counts.get(part, TrainedCount(0, 0))
            counts[part] = have._replace(
                total=have.total + weight.shape.numel(), formats=have.formats | {weight.format}
            )
    return counts


def trained_text(model: LanguageModel) -> str:
    """The counts as lines for a person."""
    counts = trained_by_part(model)
    trained = sum(count.trained for count in counts.values())
    total = sum(count.total for count in counts.values())
    lines = [f"Trained are {trained:,} parameters ({trained / total:.2%} of {total:,}):"]
    for part, count in counts.items():
        said = f"{count.trained:>14,}" if count.trained else f"{'frozen':>14}"
        held = f", kept in {' and '.join(sorted(count.formats))}" if count.formats else ""
        lines.append(f"  {part:<24}{said} of {count.total:,}{held}")
    return "\n".join(lines)


def _part_of(model: LanguageModel, name: str) -> str:
    match name.split("."):
        case ["mtp", *_]:
            return "multi-token prediction"
        case ["lm_head", *_]:
            return "output layer"
        case ["backbone", "embeddings", *_]:
            return "embedding"
        case ["backbone", "layers", index, "mixer", child, *_]:
            block = model.backbone.layers[int(index)]
            assert isinstance(block, Block)
            label = block.kind.label
            return _OF_MIXTURES.get(child, label) if block.has_router else label
        case _:
            return "norms"
