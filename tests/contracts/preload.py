"""What PyTorch imports on first use, imported before a process is forked and not in each again."""

import torch
import torch.utils.tensorboard

with torch.device("meta"):
    torch.nn.Embedding(1, 1)
torch.optim.AdamW([torch.zeros(1)], fused=True).zero_grad()
