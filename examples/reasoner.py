"""Train a model that thinks, then ask it in every way that its thinking can be governed.

The task is in `sums.py`. There is no special stage for conversations: they are rendered by the chat
template, written as token files, and pre-trained on like any other text, with two depths of
multi-token prediction. Some minutes later the model adds up to eight digits nearly always right
with its thinking, and seldom without.

    python examples/reasoner.py           # some minutes on two cores, into runs/reasoner
    nemotron3 chat runs/reasoner/model
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

from sums import TEMPLATE, VOCABULARY, problem, question, write_corpus

from nemotron3 import LLM, ModelConfig, SamplingParams
from nemotron3.data import TokenizedConfig
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_pretrain import pretrain
from nemotron3.recipes.samples import SampleConfig
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.schedules import WSD
from nemotron3.training.trainer import StepReport, TrainingConfig


class Line(RunCallback):
    """Says every hundredth step how far it is."""

    def stage(self, message: str) -> None:
        """A part begins."""
        print(message)

    def trained(self, report: StepReport) -> None:
        """An update was made."""
        if report.step % 100 == 0:
            metrics = report.metrics
            print(
                f"  {report.step}/{report.steps}  loss {metrics['train/loss']:.3f}  "
                f"MTP {metrics['train/loss_mtp_1']:.3f} {metrics['train/loss_mtp_2']:.3f}  "
                f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"
            )


def recipe(corpus: TokenizedConfig, *, steps: int) -> PretrainRun:
    """The tiny model with a small vocabulary, on conversations."""
    ask = [question([7, 5, 9, 4])]
    warmup, decay = steps // 30 + 1, steps // 3 + 1
    return PretrainRun(
        name="reasoner",
        model=replace(ModelConfig.preset("tiny"), vocab_size=VOCABULARY),
        corpus=corpus,
        training=TrainingConfig(
            steps=steps,
            batch_size=8,
            microbatch_size=8,
            seq_len=256,
            optimizer=AdamWConfig(lr=5e-3),
            schedule=WSD(total_steps=steps, warmup_steps=warmup, decay_steps=decay),
        ),
        prompts=tuple(TEMPLATE.render(ask, enable_thinking=way).text for way in (True, False)),
        sampling=SampleConfig(max_tokens=60, temperature=0.0),
    )


def main(runs: Path, *, conversations: int = 30_000, steps: int = 750) -> None:
    """Train, and ask."""
    corpus = write_corpus(runs / "reasoner" / "corpus", conversations=conversations)
    pretrain(recipe(corpus, steps=steps), runs=runs, callback=Line())
    llm = LLM(runs / "reasoner" / "model")
    numbers = problem(random.Random(1), held_out=True)
    ways = {
        "thinking": (None, {}),
        "low effort": (None, {"effort": "low"}),
        "at most 16 tokens of thinking": (16, {}),
        "no thinking": (None, {"enable_thinking": False}),
    }
    for title, (budget, options) in ways.items():
        params = SamplingParams(temperature=0, max_tokens=100, reasoning_budget=budget)
        answer = llm.chat([question(numbers)], params, **options)[0].outputs[0]
        print(f"\n{title}: {question(numbers)['content']} is {sum(numbers)}")
        print(f"{answer.reasoning.strip()}\nanswer {answer.content}".strip())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of runs")
    main(parser.parse_args().runs)
