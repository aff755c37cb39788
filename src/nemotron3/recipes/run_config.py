"""The configuration that runs of all kinds share.

Pre-training is one kind. Each kind extends `RunConfig` by its own fields and names itself in
`kind`; `run_folder.py` is their shared execution.
"""

from dataclasses import dataclass, field

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.errors import ConfigError
from nemotron3.runtime.devices import DeviceName


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run's name, its place, and what is kept of it."""

    kind: str
    """What kind of run this is; a kind narrows it to its own name."""
    name: str
    """The run's folder is runs/NAME; a run that was interrupted goes on from there."""
    device: DeviceName = "auto"
    """Where to train; auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of everything random: the initial weights, the order of the data."""
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    """Which checkpoints are kept."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"is {self.name!r}; it names a folder, so no slash or leading dot",
                field="name",
            )
