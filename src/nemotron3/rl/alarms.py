"""Signs that a reinforcement learning run is going wrong, said once and logged at every update.

Rewards may look well for hundreds of updates after engine and trainer have come apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nemotron3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """From where a metric is an alarm."""

    max_logprob_error: float = 1e-3
    """Largest mean |difference of log-probabilities| between engine and training, over tokens of
    the weights that are trained; in float32 the mean is below 1e-6, in bfloat16 near 1e-2."""
    min_kept: float = 0.5
    """Smallest share of the sampled tokens that importance weights leave in the loss."""
    max_failed: float = 0.2
    """Largest share of rollouts that fail without the policy's fault."""

    def __post_init__(self) -> None:
        if not self.max_logprob_error > 0:
            raise ConfigError(
                f"is {self.max_logprob_error}; it must be above 0",
                field="alarms.max_logprob_error",
            )
        for name in ("min_kept", "max_failed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"is {getattr(self, name)}; it must be from 0 to 1", field=f"alarms.{name}"
                )


class Alarms:
    """Compares the metrics of updates with their thresholds."""

    def __init__(self, config: AlarmConfig, say: Callable[[str], None]) -> None:
        """`say` hears of each kind of alarm once."""
        self._config, self._say = config, say
        self._said: set[str] = set()

    def check(self, metrics: Mapping[str, float], *, update: int) -> dict[str, float]:
        """1 for each alarm that rings at this update, 0 for the others, as `alarm/...`."""
        config = self._config
        error = metrics["policy/logprob_error_current"]
        kept = metrics["policy/kept"]
        failed = metrics["rollouts/failed"] / max(metrics["rollouts/played"], 1.0)
        rings = {
            "logprob_error": self._rings(
                "logprob_error",
                # A log-probability that is no number is no small one.
                is_wrong=not error <= config.max_logprob_error,
                text=f"engine and training differ by {error:.2g} in the mean log-probability of "
                f"tokens that the current weights sampled, more than alarms.max_logprob_error "
                f"{config.max_logprob_error:g}; likely weights that did not arrive, or numbers of "
                "too few bits",
                update=update,
            ),
            "kept": self._rings(
                "kept",
                is_wrong=kept < config.min_kept,
                text=f"importance weights keep {kept:.0%} of the sampled tokens, less than "
                f"alarms.min_kept {config.min_kept:.0%}; likely rollouts that are too stale or a "
                "learning rate that is too high",
                update=update,
            ),
            "failed": self._rings(
                "failed",
                is_wrong=failed > config.max_failed,
                text=f"{failed:.0%} of the rollouts failed, more than alarms.max_failed "
                f"{config.max_failed:.0%}; likely a judge, a tool or an environment's server that "
                "is down (rollouts.jsonl says why)",
                update=update,
            ),
        }
        return {f"alarm/{name}": float(is_ringing) for name, is_ringing in rings.items()}

    def _rings(self, name: str, *, is_wrong: bool, text: str, update: int) -> bool:
        if is_wrong and name not in self._said:
            self._said.add(name)
            self._say(f"Warning at update {update}: {text}")
        return is_wrong
