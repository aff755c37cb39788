"""Reinforcement learning runs: from a model that answers to one that answers better."""

from dataclasses import dataclass, field
from typing import Literal

from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.models.lora import LoRAConfig
from nemotron3.recipes.adapters import check_adapter_training
from nemotron3.recipes.run_config import RunConfig
from nemotron3.recipes.sft import TINY_ENVIRONMENTS
from nemotron3.rl.advantages import AdvantageConfig
from nemotron3.rl.alarms import AlarmConfig
from nemotron3.rl.curriculum import CurriculumConfig
from nemotron3.rl.data_parallel import EnginesConfig
from nemotron3.rl.generator import AsyncConfig
from nemotron3.rl.policy_objective import PolicyLossConfig
from nemotron3.rl.reward_shaping import RewardShapingConfig
from nemotron3.rl.rollouts import RolloutConfig
from nemotron3.rl.sampling_plan import EnvironmentConfig
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.parameter_groups import ParameterGroupConfig
from nemotron3.training.schedules import WSD
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
    curriculum: CurriculumConfig | None = None
    """How difficulty grows; null takes tasks as they come."""
    max_rounds: int = 2
    """Rounds of rollouts in which groups with equal rewards are replaced; 1 for no replacement."""
    chat_style: str | None = None
    """The release whose chat template is used; null for the one in the model's directory, or
    nano's."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How tasks are played."""
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    """How rewards become advantages."""
    shaping: RewardShapingConfig = field(default_factory=RewardShapingConfig)
    """What is changed of rewards and advantages: length, form, what was cut off."""
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    """The policy's loss."""
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    """From where a metric is a warning."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """How far the engine plays ahead of the trainer; by turns a run resumes exactly."""
    engines: EnginesConfig = field(default_factory=EnginesConfig)
    """Where tasks are played: in the trainer's process, or by several engines at once."""
    held_out_tasks: int = 100
    """Held-out tasks of each environment that are looked at during training."""
    final_held_out_tasks: int = 300
    """Those that are looked at before and after training."""
    replays_routes: bool = False
    """Whether training chooses the experts that the engine chose (routing replay). Here both run
    the same code and differ by rounding; it is for numbers of few bits."""
    max_num_seqs: int = 256
    """Rollouts that each engine samples at once."""
    max_draft_tokens: int = 0
    """Tokens that multi-token prediction drafts in every step, 0 for none. The same tokens are
    sampled with and without. Drafts are for rollouts of few sequences of a large model; of a small
    one they cost more than they save."""
    log_rollouts_every_steps: int = 10
    """Updates between those whose first rollouts are kept for the viewer."""

    def engine_config(self, *, kv_cache_bytes: int | None = None) -> EngineConfig:
        """That of an engine which plays rollouts."""
        return EngineConfig(
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.rollouts.max_context,
            max_draft_tokens=self.max_draft_tokens,
            # As many at any speed: how many tokens are in a pass decides how its sums are rounded.
            adapts_drafts=not self.max_draft_tokens,
            return_routed_experts=self.replays_routes,
            kv_cache_bytes=kv_cache_bytes,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapter_training(self.lora, self.training)
        if self.training.precision.recipe != "plain":
            raise ConfigError(
                f"is {self.training.precision.recipe!r}; engines play without rounded operands, so "
                "the trained policy would not be the one that was sampled: set it to 'plain'",
                field="training.precision.recipe",
            )
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
        if self.rollouts.temperature == 0:
            raise ConfigError(
                "is 0; it must be above 0, since the rollouts of a prompt would be alike",
                field="rollouts.temperature",
            )
        if self.rollouts.max_context > self.training.seq_len * self.training.microbatch_size + 1:
            raise ConfigError(
                f"is {self.rollouts.max_context}, more than a forward pass of "
                f"{self.training.microbatch_size} x {self.training.seq_len} tokens holds; raise "
                "training.seq_len",
                field="rollouts.max_context",
            )
        if (
            not (self.engines.num_processes or self.asynchronous.is_ahead)
            and self.engines.max_restarts != EnginesConfig.max_restarts
        ):
            raise ConfigError(
                f"is {self.engines.max_restarts} and {{other}} is 0: an engine that shares the "
                "model in training is never replaced; set {other} to 1 or more, or leave this out",
                field="engines.max_restarts",
                other="engines.num_processes",
            )
        if (self.shaping.effort is not None) != (self.rollouts.effort_fraction > 0):
            raise ConfigError(
                "shaping.effort and rollouts.effort_fraction go together: the first shapes the "
                "rewards of prompts that the second makes; set both, or neither"
            )
        for name in ("max_rounds", "held_out_tasks", "final_held_out_tasks", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"is {getattr(self, name)}; it must be 1 or more", field=name)
        if self.max_draft_tokens < 0:
            raise ConfigError(
                f"is {self.max_draft_tokens}; it must be 0 or more", field="max_draft_tokens"
            )


def tiny_rl() -> RLRun:
    """The result of tiny-sft, rewarded in nine environments at once: minutes on two cores."""
    steps = 210
    routers = ParameterGroupConfig(
        name="routers", parameters=("backbone.*.gate.weight",), is_frozen=True
    )
    mtp = ParameterGroupConfig(name="mtp", parameters=("mtp.*",), is_frozen=True)
    # Its gain, about 1, scales all logits: it is the inverse of the policy's temperature. All tasks
    # agree on where it should go, so it may move fast. The other weights are about 0.1, and what
    # they learn in hundreds of small batches is mostly noise: a higher rate makes sums wrong.
    final_norm = ParameterGroupConfig(
        name="final norm", parameters=("backbone.norm_f.weight",), lr_scale=150.0
    )
    return RLRun(
        name="tiny-rl",
        model="runs/tiny-sft/model",
        environments=tuple(
            EnvironmentConfig(name=name, difficulty=difficulty)
            for name, difficulty in TINY_ENVIRONMENTS.items()
        ),
        group_size=8,
        rollouts=RolloutConfig(max_tokens=48, max_context=256),
        engines=EnginesConfig(num_processes=2),
        training=TrainingConfig(
            steps=steps,
            batch_size=27 * 8,
            microbatch_size=18,
            seq_len=256,
            optimizer=AdamWConfig(lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0),
            schedule=WSD(total_steps=steps, warmup_steps=5, decay_steps=steps - 5, decay="linear"),
            parameter_groups=(routers, mtp, final_norm),
            evaluate_every_steps=50,
            checkpoint_every_steps=50,
        ),
        final_held_out_tasks=500,
    )
