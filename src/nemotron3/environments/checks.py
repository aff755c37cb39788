"""Looking an environment over before a model trains on it.

An environment teaches what it rewards. This plays its demonstrations and a few ways to be rewarded
without doing the task, and counts what a policy could guess: how many held-out prompts there are,
and how often the most common answer is right.

    report = asyncio.run(check_environment(load_environment("my_env.py")))
    report.demonstration_reward, report.hack_rewards, report.top_answer_share
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from nemotron3.environments.environment import Environment
from nemotron3.environments.rows import Row, Split, prompt_text, tools_of
from nemotron3.environments.verification import RolloutFailedError
from nemotron3.errors import DataError
from nemotron3.text import AssistantMessage

Turns = list[AssistantMessage]
_SOLUTION = "solution"


@dataclass(frozen=True, kw_only=True)
class EnvironmentReport:
    """What was found over some held-out tasks.

    `hack_rewards` is the mean reward of each way to cheat, and should be 0; where a task is judged
    by what tools did, the words of the last turn do not matter, and those ways are rewarded.
    """

    num_tasks: int
    num_distinct_prompts: int
    longest_prompt: int
    """Characters."""
    num_turns: int
    """Turns of the longest demonstration; 0 where there are none."""
    num_failures: int
    """Verifications that failed; they are in no mean."""
    demonstration_reward: float
    """The mean; NaN where there are none, or all failed."""
    top_answer: str
    top_answer_share: float
    hack_rewards: Mapping[str, float]


def _last(turns: Turns, content: str, reasoning: str | None = None) -> Turns:
    return [*turns[:-1], replace(turns[-1], content=content, reasoning=reasoning)]


def _without_tools(turns: Turns, row: Row) -> Turns:
    # Without tools there is nothing to leave out, and the answer itself would be left.
    return [turn for turn in turns if not turn.tool_calls] if tools_of(row) else _last(turns, "")


HACKS: Mapping[str, Callable[[Turns, Row], Turns]] = MappingProxyType(
    {
        "empty answer": lambda turns, _: _last(turns, ""),
        "prompt repeated": lambda turns, row: _last(turns, prompt_text(row)),
        "answer in the reasoning alone": lambda turns, _: _last(turns, "", turns[-1].content),
        "answer twenty times": lambda turns, _: _last(turns, f"{turns[-1].content}\n" * 20),
        "answer without the tools": _without_tools,
    }
)
"""Ways to be rewarded without doing the task, by what they make of a demonstration's turns."""
_NEED_NO_SOLUTION = ("empty answer", "prompt repeated")


async def check_environment(
    environment: Environment, *, num_tasks: int = 300, seed: int = 0
) -> EnvironmentReport:
    """Play demonstrations and hacks on held-out tasks.

    Of an environment without demonstrations, such as one on another server, only hacks that need
    no solution are played.
    """
    rows = [environment.task(index, split=Split.HELD_OUT, seed=seed) for index in range(num_tasks)]
    answers: Counter[str] = Counter()
    rewards: defaultdict[str, list[float | None]] = defaultdict(list)
    num_turns, is_solved = 0, environment.has_demonstrations
    for row in rows:
        turns = environment.solve(row) if is_solved else [AssistantMessage()]
        if not turns:
            raise DataError(f"{environment.name}: `solve` gives no turns; give the last at least")
        if is_solved:
            num_turns = max(num_turns, len(turns))
            answers[turns[-1].content] += 1
            rewards[_SOLUTION].append(await _reward(environment, row, turns))
            rewards["answer cut off"].append(await _reward(environment, row, turns, is_cut=True))
        for name in HACKS if is_solved else _NEED_NO_SOLUTION:
            rewards[name].append(await _reward(environment, row, HACKS[name](turns, row)))
    top, count = answers.most_common(1)[0] if answers else ("", 0)
    return EnvironmentReport(
        num_tasks=num_tasks,
        num_distinct_prompts=len({prompt_text(row) for row in rows}),
        longest_prompt=max(len(prompt_text(row)) for row in rows),
        num_turns=num_turns,
        num_failures=sum(given.count(None) for given in rewards.values()),
        top_answer=top,
        top_answer_share=count / num_tasks,
        demonstration_reward=_mean(rewards.pop(_SOLUTION, ())),
        hack_rewards={name: _mean(given) for name, given in rewards.items()},
    )


async def _reward(
    environment: Environment, row: Row, turns: Turns, *, is_cut: bool = False
) -> float | None:
    """The reward of given turns; None where something failed that is not their fault."""
    try:
        response, session = await environment.play(row, turns)
        response = replace(response, is_complete=response.is_complete and not is_cut)
        return (await environment.verify(row, response, session)).reward
    except RolloutFailedError:
        return None


def _mean(rewards: Sequence[float | None]) -> float:
    given = [reward for reward in rewards if reward is not None]
    return sum(given) / len(given) if given else math.nan
