"""Puzzles of the package reasoning-gym, one environment for each of its about 100 tasks.

    load_environment("reasoning_gym:chain_sum", difficulty=0.2)

The package has the questions, the answers and the scores; see
https://github.com/open-thought/reasoning-gym. Many of its scores are above 0 for an answer that
only contains the right one; only a full score is rewarded here. Some scorers give a full one to a
part of the right answer, or to one with something behind it: there only the package's own answer is
rewarded. Refused are tasks whose own answers are not fully scored, and those where an answer that
says nothing is (no difference from `NaN` is large), as they would teach something else. So are
tasks whose scorers evaluate an answer as Python: what a policy writes would run in this process.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from random import Random
from typing import Any, ClassVar, cast

from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.errors import ConfigError, DependencyMissingError
from nemotron3.text import AssistantMessage

PREFIX = "reasoning_gym:"
_NUM_ITEMS = 20_000
"""Items of a task that are drawn from; some tasks make them all at once."""
_FULL_SCORE = 1 - 1e-6
_NUM_TRIED = 8
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(\s*(?!entry\b|metadata\b)")
_NO_ANSWERS = (
    *("", "zzz", "0 0 0 0 0", "?", "..."),
    *("NaN", "nan", "-nan", "inf", "-inf", "Infinity", "1e999", "NaN NaN", "nan, nan", "[NaN]"),
    *("nanj", "nan+nanj", "(nan+nanj)", "nan + nani", "inf+infj", "nan/nan"),
)
_MORE_OR_LESS: tuple[Callable[[str], str], ...] = (
    lambda answer: f"{answer}\n" * 20,
    lambda answer: f"{answer} {answer}",
    lambda answer: f"{answer} = {answer}",
    lambda answer: f"{answer} or 1",
    lambda answer: f"{answer} or zzz",
    lambda answer: f"{answer} and 1",
    lambda answer: f"2 or {answer}",
    lambda answer: f"It is {answer}",
    lambda answer: f"zzz {answer}",
    lambda answer: f"{answer} zzz",
    lambda answer: f"zzz\n{answer}",
    lambda answer: f"{answer}\nzzz",
    lambda answer: f"{answer} 0",
    lambda answer: f"{answer}, 1",
    lambda answer: f"{answer}, zzz",
    lambda answer: f"{answer}; 1",
    lambda answer: f"{answer} # 1",
    lambda answer: f"{answer}|1",
    lambda answer: f"{answer}+0j",
    lambda answer: answer[: len(answer) // 2],
    lambda answer: answer[:1],
)
"""Answers that say more than the right one, or but a part of it."""


class ReasoningGym(Environment):
    """Puzzles of one task of reasoning-gym."""

    task_name: ClassVar[str]

    def __init__(self, *, difficulty: float = 0.5) -> None:
        """Raises `DependencyMissingError`, and `ConfigError` for a task that cannot be trained on.

        `difficulty` is the level of each of the task's settings, from its lowest to its highest.
        """
        super().__init__(difficulty=difficulty)
        if _EVALUATES.search(inspect.getsource(_datasets()[self.task_name][0])):
            raise ConfigError(
                f"{self.name} evaluates answers as Python outside of any sandbox; choose another "
                "task"
            )
        self._dataset = _dataset(self.task_name, difficulty)
        self._is_exact = False
        """Whether only the package's answer counts, as the scorer reads but a part of another."""
        self._try_scores()

    def draw(self, random: Random) -> Row:
        """One item, with the fields of NeMo Gym's environment `reasoning_gym`."""
        item = self._dataset[random.randrange(_NUM_ITEMS)]
        # As it will be read from a file: what the scorer needs must survive that.
        metadata = json.loads(json.dumps(item["metadata"], default=str))
        return self.row(
            item["question"],
            question=item["question"],
            answer=str(item["answer"]),
            metadata=metadata,
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The answer; the package has no reasoning."""
        return [AssistantMessage(content=field_of(row, "answer", str))]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 for a full score of the package, and nothing for part of one."""
        del session
        answer = response.answer
        is_right = self._score(row, answer) >= _FULL_SCORE
        if is_right and answer != field_of(row, "answer", str).strip():
            is_right = not (self._is_exact or self._is_lax(row))
        return Verification.all_of({"correct": is_right}, answer=answer[:40])

    def _score(self, row: Row, answer: str) -> float:
        entry = {name: row[name] for name in ("question", "answer")}
        entry["metadata"] = field_of(row, "metadata", dict)
        try:
            return float(self._dataset.score_answer(answer.strip(), entry))
        except Exception:  # noqa: BLE001  (some scorers raise where an answer is none of theirs)
            return 0.0

    def _is_lax(self, row: Row) -> bool:
        """Whether the scorer gives an answer to this row a full score that is not the right one."""
        right = field_of(row, "answer", str).strip()
        changed = (change(right) for change in _MORE_OR_LESS)
        return any(
            each.strip() != right and self._score(row, each) >= _FULL_SCORE for each in changed
        )

    def _try_scores(self) -> None:
        random = Random(0)
        for _ in range(_NUM_TRIED):
            try:
                row = self.draw(random)
            except (RuntimeError, ValueError, IndexError) as error:
                raise ConfigError(
                    f"{self.name} makes no task at difficulty {self.difficulty} ({error}); choose "
                    "another one"
                ) from error
            answer = field_of(row, "answer", str)
            right = self._score(row, answer)
            if right < _FULL_SCORE:
                raise ConfigError(
                    f"{self.name} scores one of its own answers with {right:.2f}; it cannot be "
                    "trained on, choose another task"
                )
            self._is_exact = self._is_exact or self._is_lax(row)
            for none in _NO_ANSWERS:
                if answer.strip() != none and self._score(row, none) >= _FULL_SCORE:
                    raise ConfigError(
                        f"{self.name} gives the answer {none!r} a full score; it would teach "
                        "that, choose another task"
                    )


def reasoning_gym(name: str) -> type[Environment]:
    """The class of an environment `reasoning_gym:TASK`.

    Raises `DependencyMissingError` without the package and `ConfigError` for a task that it lacks.
    """
    task = name.removeprefix(PREFIX)
    known = _datasets()
    if task not in known:
        raise ConfigError(
            f"reasoning-gym has no task {task!r}; there are {', '.join(sorted(known))}"
        )
    fields = {"name": name, "task_name": task, "__doc__": f"Puzzles of reasoning-gym: {task}."}
    return type("ReasoningGym", (ReasoningGym,), fields)


def _factory() -> Any:
    try:
        import_module("reasoning_gym")  # registers the tasks
        return import_module("reasoning_gym.factory")
    except ImportError as error:
        raise DependencyMissingError(
            "environments reasoning_gym:TASK need the package reasoning-gym, which is not "
            "installed: pip install 'nemotron3[reasoning-gym]'"
        ) from error


def _datasets() -> Mapping[str, Any]:
    return cast(Mapping[str, Any], _factory().DATASETS)


def _dataset(task: str, difficulty: float) -> Any:
    factory = _factory()
    kind: Callable[..., Any] = _datasets()[task][0]
    size = {"size": _NUM_ITEMS, "seed": 0}
    try:
        if not factory.has_curriculum(task):
            return factory.create_dataset(task, **size)
        curriculum = factory.create_curriculum(task)
        for name, attribute in curriculum.attributes.items():
            level = round(difficulty * (len(attribute.levels) - 1))
            curriculum.set_attr_level(name, level)
        return kind(config=curriculum.generate_configuration(size))
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{PREFIX}{task} has no tasks at difficulty {difficulty} ({error}); choose another one"
        ) from error
