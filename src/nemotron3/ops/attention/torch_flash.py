"""Flash attention for queries that follow cached keys: a causal mask aligned to the lower right.

It is a file of its own that is imported on first use, because `torch.nn.attention.bias` imports
PyTorch's compiler, which takes seconds at the start of every command.
"""

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


def attend_behind_flash(q: Tensor, k: Tensor, v: Tensor, *, is_grouped: bool) -> Tensor:
    """Attend to [row, head, length, head_dim] tensors; the queries are the last positions."""
    corner = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=corner, enable_gqa=is_grouped)
