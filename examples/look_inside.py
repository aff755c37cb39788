"""Look inside a model: what a token passes, and what a neighbour changes (nothing).

Builds a small model with random weights, packs two documents into one stream, and shows three
things that hold for every model of this package:

1. A document is alone. Another one in the same stream does not change a single bit of its logits.
2. Each token goes through a few experts only; the router says which, and how evenly they are used.
3. Reading token by token, with a carried state, gives what reading all at once gives.

    python examples/look_inside.py
"""

from dataclasses import replace

import torch

from nemotron3 import LanguageModel, ModelConfig
from nemotron3.models.accounting import model_costs
from nemotron3.models.layout import SequenceLayout
from nemotron3.training.balancing import expert_load, max_violation


@torch.inference_mode()
def neighbour_changes_nothing(model: LanguageModel) -> bool:
    """Whether document B's logits stay bit for bit the same when document A ends differently."""
    a, b = torch.arange(100, 119), torch.arange(300, 331)
    layout = SequenceLayout.packed([len(a), len(b)])
    before = model(torch.cat([a, b]), layout=layout)[len(a) :]
    a[-1] = 7
    after = model(torch.cat([a, b]), layout=layout)[len(a) :]
    return torch.equal(before, after)


@torch.inference_mode()
def router_choices(model: LanguageModel, tokens: torch.Tensor) -> list[tuple[list[int], float]]:
    """For each mixture: the experts that the last token chose, and MaxVio over all tokens."""
    output = model(tokens[None], head=lambda output: output)
    return [
        (sorted(routing.indices[-1].tolist()), max_violation(expert_load(routing)))
        for routing in output.routings
    ]


@torch.inference_mode()
def decoding_difference(model: LanguageModel, tokens: torch.Tensor) -> float:
    """Largest difference between token-by-token logits and those of one full pass."""
    whole = model(tokens.unsqueeze(0))
    state = model.new_state(slots=1)
    steps = [model(token.view(1, 1), state=state) for token in tokens]
    return (torch.cat(steps, dim=1) - whole).abs().max().item()


def main() -> None:
    """Build the model and print what was found."""
    config = replace(ModelConfig.preset("tiny"), vocab_size=512)
    model = LanguageModel.from_config(config, seed=0)
    costs = model_costs(config)
    print(f"pattern        {config.hybrid_override_pattern}")
    print(f"parameters     {costs.total:,} in all, {costs.total_active:,} of them per token")
    depths = config.pattern.num_mtp_depths
    print(f"MTP block      {costs.mtp_parameters:,}, shared by {depths} depths")
    tokens = torch.randint(512, (256,), generator=torch.Generator().manual_seed(1))
    print(f"neighbour      changes nothing: {neighbour_changes_nothing(model)}")
    for layer, (experts, max_vio) in enumerate(router_choices(model, tokens)):
        print(f"mixture {layer}      last token chose {experts}, MaxVio {max_vio:.2f}")
    print(f"decoding       differs from the full pass by {decoding_difference(model, tokens):.1e}")


if __name__ == "__main__":
    main()
