"""What a verifier says of a response: a reward, or that there is none because something failed.

A judge that did not answer, a tool that was down or a generation that was lost says nothing about
the policy. Counted as a reward of 0 it would enter the baseline of its group and push the policy
away from what may have been right. So a failure is a value of its own (NeMo Gym tags such rows
`_ng_failure_class`): whoever drives rollouts tries them again, and then drops and counts them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from nemotron3.errors import DataError, Nemotron3Error


class FailureKind(StrEnum):
    """What failed, so that no reward could be given."""

    GENERATION = "generation_failed"
    TOOL = "tool_failed"
    JUDGE = "judge_failed"
    ENVIRONMENT = "environment_failed"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no reward; the policy is not to blame."""

    kind: FailureKind
    message: str
    raised_at: str | None = None
    """`file:line` of an exception that is the reason; see `failures`."""
    traceback: str | None = None
    """Its traceback."""


class RolloutFailedError(Nemotron3Error, RuntimeError):
    """Raised by any method of an environment that cannot go on, through no fault of the policy."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.failure = Failure(kind=kind, message=message)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A verifier's verdict: either a `reward` or a `failure`.

    `components` are the parts that the reward is made of, by name, for plots and for methods that
    weigh them apart. `info` is for people and for probes of reward hacking: what was answered
    (`answer`), whether the task had an answer (`is_answerable`), and so on.
    Raises `DataError` for a reward that is no finite number, and for both or neither.
    """

    reward: float | None = None
    components: Mapping[str, float] = field(default_factory=dict[str, float])
    failure: Failure | None = None
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.failure is None):
            raise DataError(
                f"a verification has reward {self.reward} and failure {self.failure}; "
                "give one of them"
            )
        for name, value in {"reward": self.reward or 0.0, **self.components}.items():
            if not math.isfinite(value):
                raise DataError(f"a verification's {name} is {value}; give a finite number")
        if self.reward is not None:  # numbers of NumPy and PyTorch too become those of records
            object.__setattr__(self, "reward", float(self.reward))
        object.__setattr__(self, "components", {k: float(v) for k, v in self.components.items()})

    @classmethod
    def all_of(cls, components: Mapping[str, bool], **info: Any) -> "Verification":
        """Reward 1 where every component holds, else 0."""
        if not components:
            raise DataError("a verification has no components; name what was verified")
        return cls(
            reward=float(all(components.values())),
            components={name: float(holds) for name, holds in components.items()},
            info=info,
        )

    @classmethod
    def failed(cls, kind: FailureKind, message: str) -> "Verification":
        """No reward, and why."""
        return cls(failure=Failure(kind=kind, message=message))
