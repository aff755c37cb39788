"""Flash attention for queries behind remembered keys: its causal corner is the last of both.

A file of its own, imported when it is first wanted: PyTorch's name for that corner loads its
compiler, seconds at the start of every command.
"""

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


def attend_behind_flash(q: Tensor, k: Tensor, v: Tensor, *, is_grouped: bool) -> Tensor:
    """Attend, [row, head, length, head_dim]; the queries are the last positions."""
    corner = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=corner, enable_gqa=is_grouped)
