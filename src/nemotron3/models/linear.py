"""The embedding table, and the module of dense products.

Weights keep the dtype or the number format they are stored in (float32 masters in training,
bfloat16 or int8 in inference), and the product runs in the dtype of the activations
(ops/products.py).
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nemotron3.models.initial_values import Normal
from nemotron3.models.parameter import DeclaredModule
from nemotron3.ops.low_precision import ProductQuantization
from nemotron3.ops.products import dense
from nemotron3.ops.weights import ComputedWeight, QuantizedWeight


class Linear(DeclaredModule):
    """A product with a weight matrix, without bias: no layer of the family has one."""

    weight: nn.Parameter | QuantizedWeight | ComputedWeight

    def __init__(
        self, in_features: int, out_features: int, *, writes_residual: bool = False
    ) -> None:
        """`writes_residual` is for a product that is added to the residual stream."""
        super().__init__()
        self.quantization: ProductQuantization | None = None
        """Formats of the operands in training; None for the dtype of activations."""
        self.declare(
            "weight",
            (out_features, in_features),
            init=Normal(writes_residual),
            decays=True,
            quantizes=True,
        )

    def forward(
        self, x: Float[Tensor, "*batch d_in"], sizes: Sequence[int] | None = None
    ) -> Float[Tensor, "*batch d_out"] | tuple[Float[Tensor, "*batch d_part"], ...]:
        """x W^T in the dtype of `x`; with `sizes`, split into parts of these widths."""
        if sizes is None:
            return dense(x, self.weight, quantization=self.quantization)
        return dense(x, self.weight, sizes, quantization=self.quantization)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class Embedding(DeclaredModule):
    """A vector for each token.

    It is not `nn.Embedding`, which computes initial values even on the meta device and loads
    PyTorch's decompositions for that, which takes seconds at the start of every command.
    """

    weight: nn.Parameter

    def __init__(self, num_embeddings: int, size: int) -> None:
        super().__init__()
        shape = (num_embeddings, size)
        self.declare("weight", shape, init=Normal(), decays=True, embeds=True)

    def forward(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
        """The vectors of `tokens`."""
        return F.embedding(tokens, self.weight)
