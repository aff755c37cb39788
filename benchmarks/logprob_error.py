"""Where the error of a token's log-probability comes from, in float32.

    python -m benchmarks.logprob_error runs/tiny-sft/model runs/tiny-rl/model

The model plays tasks of four environments. The log-probabilities of the sampled tokens, as training
computes them, are compared with those of the same weights in float64, part by part. The result is a
row of figures for each model; decision 0017 stands on them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from nemotron3 import LLM, EngineConfig
from nemotron3.environments import load_environment
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel, ModelOutput
from nemotron3.ops.cross_entropy import token_logprobs
from nemotron3.ops.segments import Segments
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.rl.rollouts import Rollout, RolloutConfig, RolloutDriver
from nemotron3.text import Tokenizer

RESULTS = Path(__file__).parent / "results"
ENVIRONMENTS = {"math": 0.0, "calculator": 0.2, "guess_number": 0.0, "lookup": 0.0}
GROUP_SIZE = 4


def play(path: str, model: LanguageModel, *, tasks: int) -> list[Rollout]:
    """Rollouts of so many tasks of each environment."""
    tokenizer = Tokenizer.from_directory(path)
    config = RolloutConfig(max_tokens=48, max_context=256)
    llm = LLM(
        model,
        tokenizer=tokenizer,
        config=EngineConfig(max_num_seqs=64, max_model_len=256, max_draft_tokens=0),
    )
    environments = {n: load_environment(n, difficulty=d) for n, d in ENVIRONMENTS.items()}
    template = chat_template_for(None, tokenizer, path)
    driver = RolloutDriver(llm, tokenizer, template, environments, config)
    rows = [each.task(number) for each in environments.values() for number in range(tasks)]
    return driver.play(rows, group_size=GROUP_SIZE, seed=1)


def parts(output: ModelOutput, targets: Tensor) -> dict[str, Tensor]:
    """Log-probabilities of the targets with more and more of the head in float64."""
    hidden, weight = output.hidden[0], output.output_weight
    assert isinstance(weight, Tensor)
    places = targets[:, None]
    wide = hidden.double() @ weight.double().T
    narrow = (hidden @ weight.T.to(hidden.dtype)).double()
    return {
        "float32": token_logprobs(hidden, weight, targets).double(),
        "float64 softmax": narrow.log_softmax(-1).gather(1, places)[:, 0],
        "float64 head": wide.log_softmax(-1).gather(1, places)[:, 0],
        "largest logit": wide.abs().amax(-1),
    }


@torch.no_grad()
def errors(path: str, *, tasks: int) -> dict[str, float]:
    """The largest errors over all sampled tokens, by their source."""
    model = LanguageModel.from_pretrained(path, dtype=torch.float32).eval()
    exact = LanguageModel.from_pretrained(path, dtype=torch.float64).eval()
    exact.activation_dtype = torch.float64
    found: dict[str, float] = {"sampled tokens": 0}

    def note(name: str, values: Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float(values.abs().max()))

    for rollout in play(path, model, tasks=tasks):
        sampled = torch.tensor(rollout.is_sampled[1:])
        if not sampled.any():
            continue
        ids = torch.tensor(rollout.ids)
        layout = SequenceLayout(Segments([len(ids) - 1]))
        ours = model(ids[:-1], layout=layout, head=lambda o, t=ids[1:]: parts(o, t))
        true = exact(ids[:-1], layout=layout, head=lambda o, t=ids[1:]: parts(o, t))["float64 head"]
        ours, true = {name: values[sampled] for name, values in ours.items()}, true[sampled]
        engine = torch.tensor(rollout.logprobs[1:], dtype=torch.float64)[sampled]
        difference, largest = engine - ours["float32"], ours["largest logit"]
        found["sampled tokens"] += len(true)
        note("largest logit", largest)
        note("hidden states, with the head in float64", ours["float64 head"] - true)
        note("head and softmax in float32", ours["float32"] - ours["float64 head"])
        note("head in float32, softmax in float64", ours["float64 softmax"] - ours["float64 head"])
        note("all, engine against training", difference)
        note("the same, in roundings of the largest logit", difference / (largest * 2**-23))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", help="model directories that answer chats")
    parser.add_argument("--tasks", type=int, default=12, help="of each of four environments")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    given = parser.parse_args(arguments)
    every = {path: errors(path, tasks=given.tasks) for path in given.models}
    for path, found in every.items():
        print(path)
        for name, value in found.items():
            print(f"  {name:<44} {value:.3g}")
    machine.write_result("logprob_error", {"errors": every}, arguments=arguments, folder=given.out)


if __name__ == "__main__":
    main()
