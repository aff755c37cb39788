"""Rewards on held-out tasks of environments, with what tells a gain from a trick.

    driver = RolloutDriver(llm, tokenizer, template, environments, RolloutConfig())
    played = play_tasks(driver, held_out_tasks(environments["math"], 300), when="now")
    results = results_by_environment(played)

The tasks of a seed are the same for every model, so two evaluations can be compared task by task.
A mean reward may rise without skill, where a policy learns which answer is most often right. So
beside it stand the share of its most common answer, how often that answer would be right, and the
reward by what is known of a task: answerable or not, and each true answer where there are few.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nemotron3.environments.environment import Environment
from nemotron3.environments.rows import Row, Split
from nemotron3.errors import ConfigError
from nemotron3.evaluation.statistics import Interval, mean_interval
from nemotron3.observe.metrics import is_metric_name
from nemotron3.rl.data_parallel import TaskPlayer
from nemotron3.rl.failures import check_rewards
from nemotron3.rl.records import RolloutRecord, rollout_record
from nemotron3.rl.rollouts import OnEnded

HELD_OUT_SEED = 0x5EED
"""Of the tasks that are held out for measuring, and of the sampling."""
MAX_LABELS = 12
"""True answers up to which the reward of each is shown."""


@dataclass(frozen=True, kw_only=True)
class MeanReward:
    """The mean reward of some tasks."""

    n: int
    """Tasks with a reward."""
    mean: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class EnvironmentResult:
    """What a policy reached in one environment."""

    environment: str
    num_tasks: int
    """Different prompts that were played."""
    num_failures: int
    """Rollouts that have no reward because something else failed; they are in no reward below."""
    reward: MeanReward | None
    """None where every rollout failed."""
    share_perfect: float
    """Share of the rewards that are exactly 1."""
    tokens: float
    """Sampled tokens of a rollout, mean."""
    share_cut: float
    """Share of the rollouts that a limit of tokens or turns ended."""
    top_answer: str
    """The most common answer."""
    top_answer_share: float
    """Its share of the answers."""
    top_answer_is_right: float | None
    """Share of the tasks whose true answer it is; None where tasks do not name theirs."""
    by_label: dict[str, dict[str, MeanReward]]
    """Rewards by what is known of a task, such as {"is_answerable": {"yes": ..., "no": ...}}."""


def held_out_tasks(
    environment: Environment, num_tasks: int, *, seed: int = HELD_OUT_SEED
) -> list[Row]:
    """So many different held-out tasks: the same for every model.

    Raises `DataError` where the environment has fewer.
    """
    return environment.distinct_tasks(num_tasks, split=Split.HELD_OUT, seed=seed)


def play_tasks(
    player: TaskPlayer,
    tasks: Sequence[Row],
    *,
    when: str,
    seed: int = HELD_OUT_SEED,
    on_ended: OnEnded = lambda _: None,
) -> list[RolloutRecord]:
    """A rollout of each task; `seed` is that of the sampling, `when` goes into the records.

    Raises `DataError` for an environment that raised an error in all of them.
    """
    played = player.play(tasks, seed=seed, on_ended=on_ended)
    check_rewards(played)
    return [rollout_record(rollout, when=when) for rollout in played]


def environments_by_name(environments: Iterable[Environment]) -> dict[str, Environment]:
    """Raises `ConfigError` where two have one name: results could not be told apart."""
    found: dict[str, Environment] = {}
    for environment in environments:
        check_name(environment)
        if environment.name in found:
            raise ConfigError(
                f"there are two environments named {environment.name!r}; one is wanted"
            )
        found[environment.name] = environment
    return found


def check_name(environment: Environment) -> None:
    """Raise `ConfigError` for a name that cannot be one of results, such as `all`, their mean."""
    if environment.name == "all" or not is_metric_name(f"reward/{environment.name}"):
        raise ConfigError(
            f"an environment is named {environment.name!r}, which cannot name its results; "
            "give it a name of printable characters that is not 'all'"
        )


def results_by_environment(
    played: Sequence[RolloutRecord], *, level: float = 0.95
) -> dict[str, EnvironmentResult]:
    """The result in each environment, in the order of the tasks."""
    tasks: dict[str, list[RolloutRecord]] = {}
    for task in played:
        tasks.setdefault(task.environment, []).append(task)
    return {name: _result(name, own, level) for name, own in tasks.items()}


def _result(name: str, tasks: Sequence[RolloutRecord], level: float) -> EnvironmentResult:
    scored = [task for task in tasks if task.reward is not None]
    rewards = [task.reward for task in tasks if task.reward is not None]
    answers = Counter(task.answer for task in scored)
    top, count = answers.most_common(1)[0] if answers else ("", 0)
    expected = [
        task.labels["expected_answer"] for task in scored if "expected_answer" in task.labels
    ]
    return EnvironmentResult(
        environment=name,
        num_tasks=len({task.prompt for task in tasks}),
        num_failures=len(tasks) - len(scored),
        reward=_mean_reward(scored, level),
        share_perfect=sum(reward == 1 for reward in rewards) / max(len(rewards), 1),
        tokens=sum(task.tokens for task in tasks) / len(tasks),
        share_cut=sum(task.is_cut for task in tasks) / len(tasks),
        top_answer=top,
        top_answer_share=count / max(len(scored), 1),
        top_answer_is_right=expected.count(top) / len(expected) if expected else None,
        by_label=_by_label(scored, level),
    )


def _by_label(tasks: Sequence[RolloutRecord], level: float) -> dict[str, dict[str, MeanReward]]:
    found: dict[str, dict[str, list[RolloutRecord]]] = {}
    for task in tasks:
        for label, value in task.labels.items():
            found.setdefault(label, {}).setdefault(value, []).append(task)
    return {
        label: {
            value: mean
            for value, own in sorted(groups.items())
            if (mean := _mean_reward(own, level)) is not None
        }
        for label, groups in found.items()
        if 1 < len(groups) <= MAX_LABELS
    }


def _mean_reward(tasks: Sequence[RolloutRecord], level: float) -> MeanReward | None:
    rewards = [task.reward for task in tasks if task.reward is not None]
    if not rewards:
        return None
    return MeanReward(
        n=len(rewards),
        mean=sum(rewards) / len(rewards),
        interval=mean_interval(rewards, level=level),
    )
