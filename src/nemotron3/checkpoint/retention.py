"""Which checkpoints are kept.

The last few are kept for resuming (more than one, since the newest may be damaged), and every k-th
permanently, for merging and analysis.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from nemotron3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """How many checkpoints a run keeps."""

    keep_last: int = 2
    """The newest checkpoints that are kept; two, so that one may be damaged."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this step are never deleted; null keeps only the newest."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(f"keep_last is {self.keep_last}; it must be 1 or more")
        if self.keep_every_steps is not None and self.keep_every_steps < 1:
            raise ConfigError(
                f"keep_every_steps is {self.keep_every_steps}; it must be 1 or more, or null"
            )


def steps_to_delete(steps: Iterable[int], config: RetentionConfig) -> list[int]:
    """The steps whose checkpoints `config` does not keep, oldest first."""
    ordered = sorted(steps)
    every = config.keep_every_steps
    return [step for step in ordered[: -config.keep_last] if every is None or step % every != 0]
