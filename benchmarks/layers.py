"""The time of a pass by part of the model, measured by hooks.

`parts_of` assigns a part to each module of interest; hooks open and close a named range around its
forward pass, and time counts for the innermost open range. Time outside all ranges is that of the
output layer with the loss. The backward pass has no ranges of its own: its nodes have the sequence
number of the forward operation that created them, which identifies the part.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.limits import mixing_flops
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from nemotron3.models.attention import Attention, AttentionConfig
from nemotron3.models.block import Block
from nemotron3.models.experts import MixtureOfExperts, RoutedExperts, Router
from nemotron3.models.linear import Embedding, Linear
from nemotron3.models.mamba2 import CausalConv1d, Mamba2Mixer, MambaConfig
from nemotron3.models.mlp import MLP
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.norm import GatedGroupNorm, RMSNorm

OUTPUT, OPTIMIZER = "output layer and loss", "optimizer"
_SCAN, _MIXING = "mamba: scan", "attention: scores and values"
_KINDS: dict[type[nn.Module], str] = {
    Embedding: "embedding",
    CausalConv1d: "mamba: convolution",
    GatedGroupNorm: "mamba: gated norm",
    Mamba2Mixer: _SCAN,
    Attention: _MIXING,
    Router: "router",
    RoutedExperts: "routed experts",
    MLP: "shared expert",
    RMSNorm: "norms and residual",
    Block: "norms and residual",
}
_LINEAR = {
    Mamba2Mixer: "mamba: projections",
    Attention: "attention: projections",
    MixtureOfExperts: "latent projections",
}
_PREFIX = "part: "


def parts_of(model: LanguageModel) -> dict[nn.Module, str]:
    """The part of each module; a module without one belongs to the part of its parent."""
    parts: dict[nn.Module, str] = {}
    for module in model.modules():
        if type(module) in _KINDS:
            parts[module] = _KINDS[type(module)]
        if type(module) in _LINEAR:
            linear = [child for child in module.children() if isinstance(child, Linear)]
            parts |= dict.fromkeys(linear, _LINEAR[type(module)])
    return parts


def flops_per_token(model: LanguageModel, *, context: int) -> dict[str, float]:
    """FLOPs of each part's products in a forward pass."""
    config = model.config
    flops: defaultdict[str, float] = defaultdict(float)
    owners = parts_of(model)
    for module, part in owners.items():
        if isinstance(module, Linear | Router):
            flops[part] += 2 * math.prod(module.weight.shape)
        elif isinstance(module, RoutedExperts):
            elements = math.prod(module.up_proj.shape) + math.prod(module.down_proj.shape)
            share = module.config.num_experts_per_tok / module.config.n_routed_experts
            flops[part] += 2 * elements * share
        elif isinstance(module, MLP):
            flops[part] += 2 * sum(parameter.numel() for parameter in module.parameters())
    flops[_SCAN] += mixing_flops(config, MambaConfig, context=context)
    flops[_MIXING] += mixing_flops(config, AttentionConfig, context=context)
    flops[OUTPUT] += 2 * math.prod(model.output_weight.shape)
    return dict(flops)


@contextmanager
def watched(
    model: LanguageModel, enter: Callable[[str], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Call `enter(part)` and `leave()` around the forward pass of every module with a part."""
    hooks = []
    for module, part in parts_of(model).items():
        hooks.append(module.register_forward_pre_hook(lambda *_, part=part: enter(part)))
        hooks.append(module.register_forward_hook(lambda *_: leave()))
    yield
    for hook in hooks:
        hook.remove()


def clocked(model: LanguageModel, action: Callable[[], object]) -> dict[str, float]:
    """Wall-clock seconds of each part in a forward pass, for passes of many tiny operations."""
    seconds: defaultdict[str, float] = defaultdict(float)
    stack, last = [OUTPUT], time.perf_counter()

    def charge() -> None:
        nonlocal last
        at = time.perf_counter()
        seconds[stack[-1]] += at - last
        last = at

    def enter(part: str) -> None:
        charge()
        stack.append(part)

    def leave() -> None:
        charge()
        stack.pop()

    with watched(model, enter, leave):
        last = time.perf_counter()
        action()
        charge()
    return dict(seconds)


def profiled(
    model: LanguageModel, loss: Callable[[], torch.Tensor], update: Callable[[], object]
) -> dict[str, dict[str, float]]:
    """Seconds of each part in a training step: {"forward": ..., "backward": ...}."""
    ranges: list[record_function] = []

    def enter(part: str) -> None:
        ranges.append(record_function(_PREFIX + part))
        ranges[-1].__enter__()

    def leave() -> None:
        ranges.pop().__exit__(None, None, None)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with watched(model, enter, leave):
            total = loss()
        total.backward()
        with record_function(_PREFIX + OPTIMIZER):
            update()
    return _attribute(profiler.events())


def _attribute(events: Any) -> dict[str, dict[str, float]]:
    forward: dict[str, float] = defaultdict(float)
    backward: dict[str, float] = defaultdict(float)
    owner: dict[int, str] = {}
    nodes = []
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name.startswith("autograd::engine::evaluate_function"):
            nodes.append(event)
            continue
        part, in_backward = _part_of(event)
        if in_backward:
            continue
        if event.sequence_nr >= 0:
            owner[event.sequence_nr] = part
        forward[part] += event.self_cpu_time_total / 1e6
    for node in nodes:
        backward[owner.get(node.sequence_nr, OUTPUT)] += node.cpu_time_total / 1e6
    return {"forward": dict(forward), "backward": dict(backward)}


def _part_of(event: Any) -> tuple[str, bool]:
    """The innermost range around an event, and whether the event is in the backward pass."""
    part = None
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return OUTPUT, True
        if part is None and event.name.startswith(_PREFIX):
            part = event.name.removeprefix(_PREFIX)
        event = event.cpu_parent
    return part or OUTPUT, False
