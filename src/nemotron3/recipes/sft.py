"""Fine-tuning runs: from a model and conversations to a model that answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from nemotron3.data.chat_tokens import ReasoningControlConfig
from nemotron3.data.conversations import ConversationsConfig
from nemotron3.errors import ConfigError
from nemotron3.models.lora import LoRAConfig
from nemotron3.recipes.adapters import check_adapter_training
from nemotron3.recipes.demonstrations import DemonstrationsConfig
from nemotron3.recipes.run_config import RunConfig
from nemotron3.recipes.samples import SampleConfig
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.schedules import WSD
from nemotron3.training.sft_objective import NormalisationStage, SFTLossConfig
from nemotron3.training.trainer import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class SFTRun(RunConfig):
    """Everything that decides what a fine-tuning run does.

    In `training` a batch is a number of rows, of `seq_len` tokens of conversations at most.
    """

    kind: Literal["sft"] = "sft"
    model: str
    """Directory of the model to start from: a run's, or a published one."""
    data: tuple[ConversationsConfig, ...] = ()
    """Files of conversations, source by source."""
    demonstrations: tuple[DemonstrationsConfig, ...] = ()
    """Solved tasks of environments, each another source."""
    follow_up_fraction: float = 0.0
    """Share of the demonstrations that follow one or two others in the same conversation, so that
    the model also answers a second question."""
    training: TrainingConfig
    """Steps, batch, optimizer, schedule."""
    lora: LoRAConfig | None = None
    """The adapter that is trained; null trains the model's own parameters."""
    held_out: tuple[ConversationsConfig, ...] = ()
    """Conversations that are only looked at; empty takes a part of each source."""
    held_out_fraction: float = 0.05
    """The part of each source that is held out where `held_out` is empty."""
    max_held_out: int = 256
    """Most conversations of a source that are held out."""
    reasoning: ReasoningControlConfig = field(default_factory=ReasoningControlConfig)
    """Samples that teach to answer without reasoning, with little, and with cut reasoning."""
    loss: SFTLossConfig = field(default_factory=SFTLossConfig)
    """Weights of the terms of the loss, and what counts the same."""
    chat_style: str | None = None
    """The release whose chat template is used; null for the one in the model's directory, or
    nano's."""
    num_samples: int = 4
    """Held-out conversations that the finished model answers."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How it answers them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapter_training(self.lora, self.training)
        if not self.data and not self.demonstrations:
            raise ConfigError(
                "is empty, and so is demonstrations; name a file of conversations", field="data"
            )
        for sources in ((*self.data, *self.demonstrations), self.held_out):
            names = [source.title for source in sources]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ConfigError(
                    f"has two sources named {min(twice)!r}; give them names of their own",
                    field="data",
                )
            if "all" in names:
                raise ConfigError(
                    "has a source named 'all', which is all sources together; give it another name",
                    field="data",
                )
        if not 0 <= self.follow_up_fraction <= 1:
            raise ConfigError(
                f"is {self.follow_up_fraction}; it must be from 0 to 1", field="follow_up_fraction"
            )
        if self.follow_up_fraction and not self.demonstrations:
            raise ConfigError(
                f"is {self.follow_up_fraction} and there are no demonstrations; set it to 0",
                field="follow_up_fraction",
            )
        if not self.held_out and not 0 < self.held_out_fraction < 1:
            raise ConfigError(
                f"is {self.held_out_fraction}; it must be above 0 and below 1",
                field="held_out_fraction",
            )


TINY_ENVIRONMENTS: Mapping[str, float] = MappingProxyType(
    {
        "math": 0.0,
        "multiple_choice": 0.0,
        "instruction_following": 0.0,
        "structured_output": 0.0,
        "calculator": 0.2,
        "lookup": 0.0,
        "list_operations": 0.0,
        "letter_counting": 0.0,
        "over_refusal": 0.0,
    }
)
"""What the tiny model is taught, and how difficult: environments whose tasks fit into a hundred
tokens, so difficult that it solves some of them after fine-tuning and not all."""


def tiny_sft() -> SFTRun:
    """The tiny model on solved tasks of nine environments: minutes on two cores."""
    weights = {"multiple_choice": 2.0, "over_refusal": 0.5}  # learned slowly, learned at once
    steps = 3000
    return SFTRun(
        name="tiny-sft",
        model="runs/tiny/model",
        demonstrations=tuple(
            DemonstrationsConfig(
                environment=name,
                difficulty=difficulty,
                num_tasks=2500,
                weight=weights.get(name, 1.0),
            )
            for name, difficulty in TINY_ENVIRONMENTS.items()
        ),
        follow_up_fraction=0.1,
        training=TrainingConfig(
            steps=steps,
            batch_size=6,
            microbatch_size=6,
            seq_len=256,
            optimizer=AdamWConfig(lr=4e-3, weight_decay=0.01),
            schedule=WSD(total_steps=steps, warmup_steps=30, decay_steps=2 * steps // 5),
            evaluate_every_steps=600,
            checkpoint_every_steps=600,
        ),
        chat_style="tiny",
        # Answers without reasoning, and with reasoning that a budget has cut.
        reasoning=ReasoningControlConfig(strip_fraction=0.05, truncate_fraction=0.1),
        loss=SFTLossConfig(
            mtp_loss_scaling=0.0,
            stages=(NormalisationStage(normalisation="sequence"),),
        ),
        max_held_out=64,
        num_samples=len(TINY_ENVIRONMENTS),
        sampling=SampleConfig(max_tokens=64, temperature=0.0),
    )
