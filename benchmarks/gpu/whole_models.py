"""Whole models with random weights on one device: prefill and decoding steps.

The context of a decoding step is random: pages are allocated, keys, values and states are filled
with random numbers, and the lengths are set. A step reads the same bytes as after a real prefill.
"""

import functools
import time
from dataclasses import replace
from typing import Any

import torch
from benchmarks.gpu.record import Figure
from benchmarks.gpu.setting import Setting
from benchmarks.limits import decode_bytes, prefill_flops
from benchmarks.models import configs

from nemotron3.inference.model_runner import ModelRunner
from nemotron3.models.cache.hybrid_cache import PAGE_SIZE, HybridCache
from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import kv_bytes_per_token, model_costs, state_bytes_per_sequence
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.runtime.devices import free_memory_bytes, synchronize

ROOM = 64
"""Tokens by which a measured sequence may grow."""
CHUNK = 8192
"""Tokens of a prompt in one prefill call."""
_SPARE_BYTES = 3 << 30
"""Memory left free for the temporary tensors of a step."""


def config_of(name: str, setting: Setting) -> ModelConfig:
    """A preset, or a similar configuration at toy size."""
    config = ModelConfig.preset(name)
    if not setting.is_toy:
        return config
    toy = configs()["toy"]
    if config.mamba is not None:
        return replace(toy, vocab_size=96)
    assert config.attention is not None
    assert config.moe is not None
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return replace(
        config,
        hybrid_override_pattern="*E" * 2,
        vocab_size=96,
        hidden_size=64,
        attention=replace(config.attention, **sizes),
        moe=replace(config.moe, **experts),
    )


@functools.cache
def model_of(name: str, setting: Setting) -> LanguageModel:
    """The model in bfloat16, created on the device once per process."""
    dtype = torch.float32 if setting.is_toy else torch.bfloat16
    config = config_of(name, setting)
    return LanguageModel.from_config(config, device=setting.device, dtype=dtype).eval()


def size(name: str, setting: Setting) -> Figure:
    """The device memory of the weights, and the rest."""
    model = model_of(name, setting)
    synchronize(setting.device)
    return {
        "parameters": model_costs(model.config).total,
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "free_bytes": None if setting.is_toy else free_memory_bytes(setting.device),
    }


def cache_of(model: LanguageModel, *, batch: int, length: int) -> HybridCache:
    """A cache of fixed memory for sequences of this length."""
    return HybridCache(
        model.config,
        slots=batch,
        dtype=model.compute_dtype,
        device=model.device,
        pages=batch * -(-length // PAGE_SIZE),
        max_length=length,
    )


@torch.inference_mode()
def decoding(name: str, batch: int, context: int, setting: Setting) -> Figure:
    """A step of one token for each of `batch` sequences of `context` tokens."""
    model = model_of(name, setting)
    config, length = model.config, context + ROOM
    needed = batch * (kv_bytes_per_token(config) * length + sum(state_bytes_per_sequence(config)))
    free = free_memory_bytes(setting.device) - _SPARE_BYTES
    if not setting.is_toy and needed > free:
        return {
            "left_out": f"the context takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} are free"
        }
    cache = cache_of(model, batch=batch, length=length)
    for slot in range(batch):
        cache.reserve(slot, length)
        cache.lengths[slot] = context
    for layer in cache.layers:
        for held in () if layer is None else layer.tensors():
            held.normal_()
    runner = ModelRunner(model, cache)
    tokens = torch.randint(config.vocab_size, (batch, 1)).tolist()
    slots = list(range(batch))
    timing = setting.clock.step(lambda: runner.decode(tokens, slots), repeats=20)
    itemsize = model.compute_dtype.itemsize
    return {
        "batch": batch,
        "context": context,
        "bytes": decode_bytes(config, batch=batch, context=context, itemsize=itemsize),
        "step": timing,
    }


@torch.inference_mode()
def prefill(name: str, length: int, setting: Setting) -> Figure:
    """The prefill of one prompt in chunks, with logits for its last token."""
    model = model_of(name, setting)
    tokens = torch.randint(model.config.vocab_size, (length,), device=setting.device)

    def read() -> None:
        cache = cache_of(model, batch=1, length=length)
        read_on(model, cache, tokens)

    timing = setting.clock.step(read, repeats=3)
    flops = length * prefill_flops(model.config, length=length)
    return {"length": length, "flops": flops, "step": timing}


def read_on(model: LanguageModel, cache: HybridCache, tokens: torch.Tensor) -> None:
    """Prefill tokens after those in the first slot."""
    for part in tokens.split(CHUNK):
        model.next_logits(part, layout=cache.layout([len(part)], [0]), state=cache)


class LongPrompt:
    """One prompt that is prefilled in consecutive parts, each of which is timed."""

    def __init__(self, name: str, most: int, setting: Setting) -> None:
        self.name, self.most, self.setting = name, most, setting
        self._cache: HybridCache | None = None

    @torch.inference_mode()
    def read_to(self, end: int) -> Figure:
        """Prefill from the end of the last part; a part cannot be repeated, so it is timed once."""
        model, device = model_of(self.name, self.setting), self.setting.device
        if self._cache is None:
            self._cache = cache_of(model, batch=1, length=self.most + ROOM)
        start = self._cache.lengths[0]
        assert start < end, f"{start} tokens are read already; stretches come in order"
        tokens = torch.randint(model.config.vocab_size, (end - start,), device=device)
        synchronize(device)
        begin = time.perf_counter()
        read_on(model, self._cache, tokens)
        synchronize(device)
        seconds = time.perf_counter() - begin
        config = model.config
        flops = end * prefill_flops(config, length=end)
        flops -= start * prefill_flops(config, length=start) if start else 0.0
        return {
            "start": start,
            "length": end,
            "flops": flops,
            "step": {"median_s": None if self.setting.is_toy else seconds},
            "peak_bytes": None if self.setting.is_toy else torch.cuda.max_memory_allocated(device),
        }

    @torch.inference_mode()
    def decode(self) -> Figure:
        """Decoding steps after the whole prompt."""
        model = model_of(self.name, self.setting)
        assert self._cache is not None, "no prompt has been read in this process"
        context, cache = self._cache.lengths[0], self._cache
        runner = ModelRunner(model, cache)
        timing = self.setting.clock.step(lambda: runner.decode([[1]], [0]), repeats=20)
        itemsize = model.compute_dtype.itemsize
        moved = decode_bytes(model.config, batch=1, context=context, itemsize=itemsize)
        return {"batch": 1, "context": context, "bytes": moved, "step": timing}


def throughput(
    figures: dict[str, dict[str, Any]], *, prompt: int, answer: int
) -> tuple[float, int] | None:
    """The highest output tokens per second of whole requests, and its batch size.

    It is computed from measured parts: a batch prefills its prompts one after another, and then
    decodes in steps whose time grows with the context, interpolated between measured ones.
    """
    read = next((f for f in figures.values() if f.get("length") == prompt), None)
    read_s = read["step"]["median_s"] if read else None
    by_batch: dict[int, dict[int, float]] = {}
    for figure in figures.values():
        if figure.get("context") in (prompt, prompt + answer) and figure["step"]["median_s"]:
            by_batch.setdefault(figure["batch"], {})[figure["context"]] = figure["step"]["median_s"]
    rates = [
        (batch * answer / (batch * read_s + answer * sum(steps.values()) / 2), batch)
        for batch, steps in by_batch.items()
        if read_s and len(steps) == 2
    ]
    return max(rates, default=None)
