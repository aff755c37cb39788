"""A fine-tuning run for conversations of one's own: rows and steps that fit them.

run = own_conversations("runs/tiny/model", [ConversationsConfig(path="chats.jsonl")])
summary = run_sft.sft(run)
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemotron3.data.conversations import ConversationsConfig, with_different_titles
from nemotron3.errors import ConfigError
from nemotron3.models import huggingface
from nemotron3.models.lora import LoRAConfig
from nemotron3.recipes.adapters import LEARNING_RATE_FACTOR, bias_update_rate
from nemotron3.recipes.sft import SFTRun
from nemotron3.recipes.sft_data import prepare_sft_data
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.schedules import WSD
from nemotron3.training.trainer import TrainingConfig

_NANO_LEARNING_RATE, _NANO_WIDTH = 5e-5, 2688


def own_conversations(
    model: str | Path,
    data: Sequence[ConversationsConfig],
    *,
    name: str | None = None,
    epochs: float = 3.0,
    batch_size: int = 8,
    max_seq_len: int = 4096,
    learning_rate: float | None = None,
    lora: LoRAConfig | None = None,
) -> SFTRun:
    """A run over `epochs` of own conversations, with the reports' settings at the model's width.

    The data are read to find how long rows have to be and how many steps there are. Sources whose
    files have one name are named by their folders, too. The learning rate is that of Nano, 5e-5 at
    a width of 2,688, in inverse proportion to the width; an adapter's is ten times that.
    """
    if not 0 < epochs < math.inf:
        raise ConfigError(f"is {epochs}; it must be above 0, and finite", field="epochs")
    data = with_different_titles(data)
    config = huggingface.read_config(model)
    usual = _NANO_LEARNING_RATE * _NANO_WIDTH / config.hidden_size
    peak = learning_rate or usual * (1.0 if lora is None else LEARNING_RATE_FACTOR)
    run = SFTRun(
        name=name or f"{run_name(Path(model))}-{data[0].title.replace('/', '-')}",
        model=str(model),
        data=data,
        training=_training(1, batch_size, max_seq_len, peak, lora),
        lora=lora,
    )
    found = prepare_sft_data(run)
    trained = [c for source in found.train.values() for c in source.conversations]
    looked_at = [c for rows in found.held_out.values() for c in rows]
    longest = max(map(len, (*trained, *looked_at)))  # with it, the same ones are held out
    seq_len = min(max_seq_len, math.ceil(longest / 64) * 64)
    rows = found.loader(seq_len=seq_len, batch_size=batch_size, seed=run.seed).rows_of_epoch()
    batch_size = min(batch_size, rows)
    steps = max(1, math.ceil(epochs * rows / batch_size))
    return replace(run, training=_training(steps, batch_size, seq_len, peak, lora))


def _training(
    steps: int, batch_size: int, seq_len: int, peak: float, lora: LoRAConfig | None
) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=batch_size,
        microbatch_size=1 if seq_len > 1024 else batch_size,
        seq_len=seq_len,
        optimizer=AdamWConfig(lr=peak),
        schedule=WSD(
            total_steps=steps, warmup_steps=steps // 20, decay_steps=max(1, (2 * steps) // 5)
        ),
        bias_update_rate=bias_update_rate(lora),
        evaluate_every_steps=max(1, steps // 10),
        checkpoint_every_steps=max(1, steps // 10),
    )


def run_name(model: Path) -> str:
    """That of the run whose result the model is, else of its directory."""
    resolved = model.resolve()
    return resolved.parent.name if resolved.name == "model" else resolved.name
