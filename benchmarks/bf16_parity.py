"""The error of bfloat16: our model and transformers', compared with the same weights in float32.

    python -m benchmarks.bf16_parity [MODEL] [--tokens N]

MODEL is a directory in the published layout; without one, a random model is used in which every
path matters, the hardest case. Weights are rounded to bfloat16 first, so that all runs have the
same ones and only the arithmetic differs:

* ours, float32 activations: the reference;
* ours, bfloat16 activations, as a full pass and token by token through the state;
* ours, bfloat16, with the experts that float32 chose: the error without changed choices;
* transformers in bfloat16, likewise, without its lower bound on dt (see tests/oracles).

It prints the mean KL divergence from the reference in nats, how often the most probable token is
the same, and how often a router chooses exactly the same experts.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.oracles.huggingface import repaired
from tests.tiny import tiny_config, tiny_model
from torch import Tensor, nn
from transformers import NemotronHForCausalLM

from nemotron3.models.experts import Router, Routing
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel


def round_weights(model: LanguageModel, folder: Path) -> LanguageModel:
    """Save the model in bfloat16, like published checkpoints, and load it again."""
    model.mtp = None
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.bfloat16())
    model.save_pretrained(folder)
    return model


def ours(model: LanguageModel, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Logits and router choices of a full pass."""
    model.activation_dtype = dtype
    layout = SequenceLayout.of(tokens)
    out = model.backbone(model.embed(tokens.flatten()), layout)
    return model.logits(out.hidden), [routing.indices for routing in out.routings]


def ours_rerouted(model: LanguageModel, tokens: Tensor, choices: list[Tensor]) -> Tensor:
    """Logits of a full pass in bfloat16 with given experts, weighted by its own scores."""
    hooks = []
    for router, indices in zip(model.routers, choices, strict=True):

        def reroute(router: Router, _: object, out: Routing, indices: Tensor = indices) -> Routing:
            weights = out.scores.gather(-1, indices)
            if router.config.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return Routing(indices, weights * router.config.routed_scaling_factor, out.scores)

        hooks.append(router.register_forward_hook(reroute))
    logits, _ = ours(model, tokens, torch.bfloat16)
    for hook in hooks:
        hook.remove()
    return logits


def ours_stepwise(model: LanguageModel, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of decoding token by token."""
    model.activation_dtype = dtype
    state = model.new_state(len(tokens))
    steps = [model(token, state=state) for token in tokens.split(1, dim=1)]
    return torch.cat(steps, dim=1).flatten(0, 1)


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model in `dtype`, without its lower bound on dt."""
    with contextlib.redirect_stderr(io.StringIO()):
        model = NemotronHForCausalLM.from_pretrained(folder, dtype=dtype)
    return repaired(model).eval()


def theirs(model: Any, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and router choices of a full pass."""
    choices: list[Tensor] = []
    hooks = [
        block.mixer.gate.register_forward_hook(lambda _, __, out: choices.append(out[2]))
        for block in model.model.layers
        if block.block_type == "moe"
    ]
    logits = model(tokens, use_cache=False).logits.float().flatten(0, 1)
    for hook in hooks:
        hook.remove()
    return logits, choices


def theirs_stepwise(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of decoding token by token."""
    cache, steps = None, []
    for token in tokens.split(1, dim=1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits.float())
    return torch.cat(steps, dim=1).flatten(0, 1)


def same_choices(choices: list[Tensor], expected: list[Tensor]) -> float:
    """Share of (token, layer) pairs whose set of experts is the same."""
    same = [
        (a.sort(-1).values == b.sort(-1).values).all(-1)
        for a, b in zip(choices, expected, strict=True)
    ]
    return torch.cat(same).float().mean().item()


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="a directory in the published layout")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per sequence")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = (
        LanguageModel.from_pretrained(arguments.model)
        if arguments.model
        else tiny_model(tiny_config("MEMEM*EMEM*E", vocab_size=512))
    )
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = round_weights(model, Path(folder))
        wide, narrow = (
            transformers_model(Path(folder), dtype) for dtype in (torch.float32, torch.bfloat16)
        )
    # The model's own text, so that a trained model is measured on likely text.
    tokens = sampled_text(model, arguments.tokens, generator)
    expected, choices = ours(model, tokens, torch.float32)
    rows: list[tuple[str, Callable[[], Tensor | tuple[Tensor, list[Tensor]]]]] = [
        ("ours, float32, token by token", lambda: ours_stepwise(model, tokens, torch.float32)),
        ("transformers, float32", lambda: theirs(wide, tokens)),
        ("ours, bfloat16", lambda: ours(model, tokens, torch.bfloat16)),
        ("ours, bfloat16, token by token", lambda: ours_stepwise(model, tokens, torch.bfloat16)),
        ("ours, bfloat16, float32's experts", lambda: ours_rerouted(model, tokens, choices)),
        ("transformers, bfloat16", lambda: theirs(narrow, tokens)),
        ("transformers, bfloat16, token by token", lambda: theirs_stepwise(narrow, tokens)),
    ]
    reference = expected.log_softmax(-1)
    print(f"{tokens.numel()} tokens; against ours in float32, whole")
    print(f"| {'':40} | KL (nats) | same top-1 | same experts |")
    print(f"|{'-' * 42}|----------:|-----------:|-------------:|")
    for name, run in rows:
        out = run()
        logits, chosen = out if isinstance(out, tuple) else (out, None)
        other = logits.log_softmax(-1)
        kl = (reference.exp() * (reference - other)).sum(-1).mean().item()
        top = (other.argmax(-1) == reference.argmax(-1)).float().mean().item()
        routed = "" if chosen is None else f"{same_choices(chosen, choices):.2%}"
        print(f"| {name:40} | {kl:9.1e} | {top:10.2%} | {routed:>12} |")


def sampled_text(model: LanguageModel, length: int, generator: torch.Generator) -> Tensor:
    """Four sequences that are sampled from the model in float32."""
    model.activation_dtype = torch.float32
    state = model.new_state(4)
    vocab = model.config.vocab_size
    tokens = [torch.randint(vocab, (4, 1), generator=generator)]
    for _ in range(length - 1):
        probabilities = model(tokens[-1], state=state)[:, -1].softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1, generator=generator))
    return torch.cat(tokens, dim=1)


if __name__ == "__main__":
    main()
