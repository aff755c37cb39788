"""A reinforcement learning run for a model and environments of one's choice."""

from collections.abc import Sequence
from pathlib import Path

from nemotron3.errors import ConfigError
from nemotron3.models import huggingface
from nemotron3.models.lora import LoRAConfig
from nemotron3.recipes.adapters import LEARNING_RATE_FACTOR, bias_update_rate
from nemotron3.recipes.own_conversations import run_name
from nemotron3.recipes.rl import RLRun
from nemotron3.rl.rollouts import RolloutConfig
from nemotron3.rl.sampling_plan import EnvironmentConfig
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.parameter_groups import ParameterGroupConfig
from nemotron3.training.schedules import WSD
from nemotron3.training.trainer import TrainingConfig

_SUPER_LEARNING_RATE, _SUPER_WIDTH = 3e-6, 4096


def own_environments(
    model: str | Path,
    environments: Sequence[EnvironmentConfig],
    *,
    name: str | None = None,
    steps: int = 100,
    group_size: int = 8,
    max_context: int = 1024,
    learning_rate: float | None = None,
    lora: LoRAConfig | None = None,
) -> RLRun:
    """A run with the reports' settings, at the model's width and eight prompts an environment.

    The learning rate is that of Super, 3e-6 at a width of 4,096, in inverse proportion to the
    width; an adapter's is ten times that. Routers are frozen, as in the reports.
    """
    if steps < 1:
        raise ConfigError(f"is {steps}; it must be 1 or more", field="steps")
    config = huggingface.read_config(model)
    usual = _SUPER_LEARNING_RATE * _SUPER_WIDTH / config.hidden_size
    peak = learning_rate or usual * (1.0 if lora is None else LEARNING_RATE_FACTOR)
    batch_size = 8 * group_size * len(environments)
    routers = ParameterGroupConfig(name="routers", parameters=("*.gate.weight",), is_frozen=True)
    return RLRun(
        name=name or f"{run_name(Path(model))}-{Path(environments[0].name).stem}",
        model=str(model),
        environments=tuple(environments),
        group_size=group_size,
        lora=lora,
        rollouts=RolloutConfig(max_context=max_context),
        training=TrainingConfig(
            steps=steps,
            batch_size=batch_size,
            microbatch_size=group_size,
            seq_len=max_context,
            optimizer=AdamWConfig(lr=peak, betas=(0.9, 0.99), weight_decay=0.0),
            schedule=WSD(
                total_steps=steps, warmup_steps=min(10, steps // 4), decay_steps=max(1, steps // 4)
            ),
            parameter_groups=(routers,) if any(m.has_router for m in config.layers) else (),
            bias_update_rate=bias_update_rate(lora),
            evaluate_every_steps=max(1, steps // 5),
            checkpoint_every_steps=max(1, steps // 5),
        ),
    )
