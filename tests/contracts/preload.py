"""What PyTorch imports on first use, imported before a process is forked and not in each again."""

import torch
import torch.utils.tensorboard

torch.optim.AdamW([torch.zeros(1)], fused=True).zero_grad()
