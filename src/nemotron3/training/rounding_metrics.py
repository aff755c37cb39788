"""What the published reports watch in training with few bits.

* `precision/flushed_PRODUCT_layer_07`: of the values of a layer's operands, the share that became
  zero by rounding, for each of the products fprop, dgrad and wgrad. A rotated operand is counted in
  its rotated basis.
* `precision/zero_gradients_layer_07` and `precision/zero_gradients`: the share of zeros in the
  gradients of the weights of rounded products. It grows where channels die out (Super report,
  section 2.2: to 7% of all parameters). Experts that no token chose count.

Both are of this process's part of the batch.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from nemotron3.models.experts import RoutedExperts
from nemotron3.models.linear import Linear
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.low_precision import FlushedValues


def rounding_metrics(model: LanguageModel, flushed: FlushedValues) -> dict[str, float]:
    """The metrics after the backward passes of an update; empty without rounded products."""
    metrics = {
        f"precision/flushed_{product}_layer_{layer:02d}": share
        for (layer, product), share in flushed.shares().items()
    }
    zeros = {index: counts for index, counts in _zeros(model).items() if counts[1]}
    metrics |= {
        f"precision/zero_gradients_layer_{layer:02d}": count / total
        for layer, (count, total) in zeros.items()
    }
    if zeros:
        count, total = (sum(counts[i] for counts in zeros.values()) for i in (0, 1))
        metrics["precision/zero_gradients"] = count / total
    return metrics


def _zeros(model: LanguageModel) -> dict[int, tuple[int, int]]:
    """Zeros and elements of the gradients of rounded products' weights, by layer."""
    return {
        index: _counted([p.grad for p in _weights(layer) if p.grad is not None])
        for index, layer in enumerate(model.backbone.layers)
    }


def _weights(layer: nn.Module) -> Iterator[nn.Parameter]:
    for module in layer.modules():
        if isinstance(module, (Linear, RoutedExperts)) and module.quantization is not None:
            yield from module.parameters()


def _counted(gradients: list[Tensor]) -> tuple[int, int]:
    zeros = sum(int((gradient == 0).sum()) for gradient in gradients)
    return zeros, sum(gradient.numel() for gradient in gradients)
