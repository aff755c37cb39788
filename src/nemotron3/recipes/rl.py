"""Reinforcement learning runs: from a model that answers to one that answers better."""

from dataclasses import dataclass, field
from typing import Literal

from nemotron3.errors import ConfigError
from nemotron3.models.lora import LoRAConfig
from nemotron3.recipes.adapters import check_adapter_training
from nemotron3.recipes.run_config import RunConfig
from nemotron3.rl.advantages import AdvantageConfig
from nemotron3.rl.policy_objective import PolicyLossConfig
from nemotron3.rl.rollouts import RolloutConfig
from nemotron3.rl.sampling_plan import EnvironmentConfig
from nemotron3.training.trainer import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RLRun(RunConfig):
    """Everything that decides what a reinforcement learning run does.

    In `training` a batch is a number of rollouts, `group_size` of each prompt; a forward pass has
    `microbatch_size * seq_len` tokens of them at most.
    """

    kind: Literal["rl"] = "rl"
    model: str
    """Directory of the model to start from: one that answers, such as the result of `sft`."""
    environments: tuple[EnvironmentConfig, ...]
    """What it learns, all at once."""
    training: TrainingConfig
    """Steps, batch, optimizer, schedule."""
    lora: LoRAConfig | None = None
    """The adapter that is trained; null trains the model's own parameters."""
    group_size: int = 8
    """Rollouts of each prompt, whose rewards are compared."""
    max_rounds: int = 2
    """Rounds of rollouts in which groups with equal rewards are replaced; 1 for no replacement."""
    chat_style: str | None = None
    """The release whose chat template is used; null for the one in the model's directory, or
    nano's."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How tasks are played."""
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    """How rewards become advantages."""
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    """The policy's loss."""
    held_out_tasks: int = 100
    """Held-out tasks of each environment that are looked at during training."""
    final_held_out_tasks: int = 300
    """Those that are looked at before and after training."""
    max_num_seqs: int = 256
    """Rollouts that are sampled at once."""
    log_rollouts_every_steps: int = 10
    """Updates between those whose first rollouts are kept for the viewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapter_training(self.lora, self.training)
        if not self.environments:
            raise ConfigError("is empty; name one", field="environments")
        if self.group_size < 2:
            raise ConfigError(
                f"is {self.group_size}; it must be 2 or more, since advantages compare "
                "the rollouts of a prompt",
                field="group_size",
            )
        if self.training.batch_size % self.group_size:
            raise ConfigError(
                f"is {self.training.batch_size}; it must be a multiple of "
                f"group_size {self.group_size}",
                field="training.batch_size",
            )
        if self.rollouts.max_context > self.training.seq_len * self.training.microbatch_size + 1:
            raise ConfigError(
                f"is {self.rollouts.max_context}, more than a forward pass of "
                f"{self.training.microbatch_size} x {self.training.seq_len} tokens holds; raise "
                "training.seq_len",
                field="rollouts.max_context",
            )
        for name in ("max_rounds", "held_out_tasks", "final_held_out_tasks", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"is {getattr(self, name)}; it must be 1 or more", field=name)
