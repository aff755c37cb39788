"""The timed workloads, the same for both programs: a training step, a prefill, decoding.

* Training: forward, loss, backward and AdamW, with a learning rate so small that weights stay
  equal. Ours includes its statistics of loss and balance.
* Prefill: from a prompt to the carried state and the logits after its last token.
* Decoding: tokens chosen greedily, one at a time, after a short prompt that does not count.
"""

import time

import torch
from benchmarks.models import our_loss, their_loss
from benchmarks.timing import Contestant, warmed
from torch import Tensor, nn

from nemotron3.inference.model_runner import ModelRunner
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.training.optimizers import AdamWConfig, build_optimizer

OPTIMIZER = AdamWConfig(lr=1e-12, weight_decay=0.0)
PROMPT = 64
"""Tokens of the prompt before the decoded ones."""


def training(model: nn.Module, tokens: Tensor) -> Contestant:
    """A training step on [batch, seq] tokens, of either program."""
    optimizer = optimizer_of(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if isinstance(model, LanguageModel):
            our_loss(model, tokens).backward()
        else:
            their_loss(model, tokens).backward()
        optimizer.step()

    return warmed(step)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW of either program's model; without declarations, all parameters have weight decay."""
    if isinstance(model, LanguageModel):
        return build_optimizer(model, OPTIMIZER)
    config = OPTIMIZER
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def our_prefill(model: LanguageModel, tokens: Tensor) -> Contestant:
    """Prefill [batch, seq] prompts into a new state."""

    @torch.inference_mode()
    def read() -> None:
        _our_prompt(model, tokens, model.new_state(len(tokens)))

    return warmed(read)


def their_prefill(model: nn.Module, tokens: Tensor) -> Contestant:
    """The same in transformers."""

    @torch.inference_mode()
    def read() -> None:
        model(tokens, use_cache=True, logits_to_keep=1)

    return warmed(read)


def our_decode(model: LanguageModel, prompts: Tensor, steps: int) -> Contestant:
    """Choose `steps` tokens for each of the prompts."""
    slots = range(len(prompts))
    with torch.inference_mode():
        state = model.new_state(len(prompts))
        runner = ModelRunner(model, state)

    @torch.inference_mode()
    def run() -> float:
        for slot in slots:
            state.free(slot)
        chosen = _our_prompt(model, prompts, state).tolist()
        start = time.perf_counter()
        for _ in range(steps):
            out = runner.decode([[token] for token in chosen], slots)
            chosen = out.logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - start

    return run


def their_decode(model: nn.Module, prompts: Tensor, steps: int) -> Contestant:
    """The same in transformers."""

    @torch.inference_mode()
    def run() -> float:
        out = model(prompts, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(steps):
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
        out.logits[:, -1].argmax(-1)
        return time.perf_counter() - start

    return run


def _our_prompt(model: LanguageModel, tokens: Tensor, state: HybridCache) -> Tensor:
    layout = state.layout([tokens.shape[1]] * len(tokens))
    logits = model.next_logits(tokens.flatten(), layout=layout, state=state)
    return logits.argmax(-1)
