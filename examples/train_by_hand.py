"""Train by hand: the loop that `nemotron3 pretrain` runs, without the recipe around it.

The text is this file and the vocabulary its bytes, so there is no corpus and no tokenizer. What is
left is a model, an optimizer, a schedule, an objective, and a `TrainingStep`, which makes an update
from a list of microbatches and says what happened.

    python examples/train_by_hand.py
"""

from dataclasses import replace
from pathlib import Path

import torch

from nemotron3 import LLM, LanguageModel, ModelConfig, SamplingParams
from nemotron3.ops.segments import Segments
from nemotron3.training.batch import TrainBatch
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.pretrain_objective import PretrainLossConfig, PretrainObjective
from nemotron3.training.schedules import WSD
from nemotron3.training.step import TrainingStep

ROWS, SEQ_LEN = 4, 128


def batch(text: torch.Tensor, step: int) -> TrainBatch:
    """Random windows of the text, a pure function of the step: nothing to save for a resume."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - SEQ_LEN, (ROWS,), generator=generator).tolist()
    rows = [text[start : start + SEQ_LEN + 1] for start in starts]
    return TrainBatch(
        tokens=torch.cat([row[:-1] for row in rows]),
        targets=torch.cat([row[1:] for row in rows]),
        mask=torch.ones(ROWS * SEQ_LEN),
        segments=Segments.uniform(ROWS, SEQ_LEN),
    )


def train(steps: int) -> tuple[LanguageModel, list[dict[str, float]]]:
    """Train a byte model on this file; returns it with the metrics of every step."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    config = replace(ModelConfig.preset("tiny"), vocab_size=256)
    model = LanguageModel.from_config(config, seed=0)
    adamw = AdamWConfig(lr=3e-3)
    optimizer = build_optimizer(model, adamw)
    schedule = WSD(total_steps=steps, warmup_steps=steps // 10, decay_steps=steps // 3)
    depths = config.pattern.num_mtp_depths
    objective = PretrainObjective(PretrainLossConfig(), num_mtp_depths=depths)
    update = TrainingStep(model, optimizer, objective, clip_grad_norm=adamw.clip_grad_norm)
    rates = [schedule.learning_rate(step, peak=adamw.lr) for step in range(steps)]
    return model, [
        update([batch(text, step)], learning_rate=rate) for step, rate in enumerate(rates)
    ]


def main() -> None:
    """Train for a hundred steps, print the course, and let the model write."""
    model, history = train(steps=100)
    print("step   loss   MTP 1   MTP 2   MaxVio   gradient norm")
    for step, m in enumerate(history):
        if step % 10 == 9:
            print(
                f"{step + 1:4d}  {m['train/loss']:5.2f}  {m['train/loss_mtp_1']:6.2f}  "
                f"{m['train/loss_mtp_2']:6.2f}  {m['moe/max_vio']:7.2f}  "
                f"{m['optim/grad_norm']:14.2f}"
            )
    prompt = list(b"def batch(")
    greedy = SamplingParams(max_tokens=80, temperature=0.0)
    written = LLM(model).generate([prompt], greedy)[0].outputs[0].token_ids
    print(bytes([*prompt, *written]).decode(errors="replace"))


if __name__ == "__main__":
    main()
