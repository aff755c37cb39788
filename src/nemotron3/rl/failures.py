"""Whether the errors of an environment leave anything to train on or to measure."""

from collections.abc import Sequence

from nemotron3.environments.rows import prompt_text
from nemotron3.errors import DataError
from nemotron3.rl.rollouts import Rollout, failure_of


def check_rewards(rollouts: Sequence[Rollout]) -> None:
    """Raises `DataError` for an environment that raised and gave no reward in several tasks.

    One task that it cannot judge is no reason to stop; an error that nothing comes through is.
    """
    by_environment: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_environment.setdefault(rollout.environment, []).append(rollout)
    for own in by_environment.values():
        failures = [failure for rollout in own if (failure := failure_of(rollout))]
        raised = [failure for failure in failures if failure.raised_at is not None]
        if raised and len(failures) == len(own) and len({prompt_text(r.row) for r in own}) > 1:
            raise DataError(
                f"{raised[0].message}; all {len(own)} rollouts of this environment failed. Mend "
                "it and begin again"
            )
