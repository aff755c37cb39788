"""Lower bounds on the work of each workload: FLOPs if products limit it, bytes if memory does.

`nemotron3.models.costs` counts the products. A training step has three times those of a forward
pass. Of a prompt, only the last token needs the layers after the last stateful one, and the output
layer. A decoding step must at least read the weights that its tokens use, and read and write their
states. A batch of b tokens that choose k of E experts evenly uses a share of 1 - (1 - k/E)^b of
them.
"""

from collections.abc import Sequence
from dataclasses import replace

from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import (
    forward_flops_per_token,
    kv_bytes_per_token,
    model_costs,
    state_bytes_per_sequence,
)
from nemotron3.models.mixer import MixerConfig, last_stateful_layer


def training_flops(config: ModelConfig, *, length: int) -> float:
    """FLOPs per token of a training step."""
    return 3 * forward_flops_per_token(config, context=length)


def prefill_flops(config: ModelConfig, *, length: int) -> float:
    """FLOPs per token of a prompt."""
    main = config.pattern.main
    all_pass = _with_layers(config, main[: last_stateful_layer(config.layers) + 1])
    flops = backbone_flops(all_pass, length=length)
    return flops + (forward_flops_per_token(config, context=length) - flops) / length


def backbone_flops(config: ModelConfig, *, length: int) -> float:
    """FLOPs per token of a forward pass without the output layer."""
    output = 2 * config.vocab_size * config.hidden_size
    return forward_flops_per_token(config, context=length) - output


def decode_bytes(config: ModelConfig, *, batch: int, context: int, itemsize: int = 4) -> float:
    """Bytes per step of `batch` sequences."""
    costs = model_costs(config)
    weights = float(costs.total_active)
    if config.moe is not None:
        chosen = config.moe.num_experts_per_tok / config.moe.n_routed_experts
        touched = 1 - (1 - chosen) ** batch
        weights += costs.parameters["routed experts"] * (touched - chosen)
    state = 2 * sum(state_bytes_per_sequence(config, conv_itemsize=itemsize))
    keys = kv_bytes_per_token(config, itemsize=itemsize) * context
    return weights * itemsize + batch * (state + keys)


def mixing_flops(config: ModelConfig, kind: type[MixerConfig], *, context: int) -> float:
    """FLOPs per token of all layers of a kind that are not products with weights."""
    layers = [mixer for mixer in config.layers if isinstance(mixer, kind)]
    return sum(mixer.mixing_flops(context) for mixer in layers)


def _with_layers(config: ModelConfig, symbols: Sequence[str]) -> ModelConfig:
    """The same widths with other layers, without MTP."""
    parts = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    unused = {part: None for symbol, part in parts.items() if symbol not in symbols}
    return replace(config, hybrid_override_pattern="".join(symbols), **unused)
