"""Texts that keep constraints which a program checks, combined at random.

At difficulty 0 two to four constraints on a few words in lower case; at 1 up to six on a text of
several lines.
A task always asks for an exact quantity (words, sentences, lines, ...), so that a repeated or
padded answer fails.

Rows have NeMo Gym's fields of its environment `instruction_following`: `instruction_id_list`,
`kwargs`, `grading_mode`, which is `binary` (all or nothing) or `fraction`. The constraints
themselves are those of `constraints.py`.
"""

from random import Random
from typing import Any, ClassVar, cast

from nemotron3.environments.answers import MAX_ANSWER, answer_turn
from nemotron3.environments.constraints import (
    CONSTRAINTS,
    DISTINCT,
    OTHERS,
    QUANTITIES,
    Constraint,
    Kwargs,
)
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.environments.words import EASY_WORDS, LETTERS, WORDS
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import AssistantMessage

GRADING_MODES = ("binary", "fraction")
_EASY = 0.2
"""Below this difficulty a task needs no knowledge of how the words are spelled."""
_SPELLING = frozenset({"letters:frequency", "letters:first_letter", "words:sorted"})


class InstructionFollowing(Environment):
    """Some thirty checkable constraints on a text, combined."""

    name: ClassVar[str] = "instruction_following"

    def __init__(self, *, difficulty: float = 0.5, grading_mode: str = "binary") -> None:
        """`grading_mode` "fraction" rewards the share of the constraints that hold."""
        super().__init__(difficulty=difficulty)
        if grading_mode not in GRADING_MODES:
            raise ConfigError(
                f"grading_mode is {grading_mode!r}; the modes are {', '.join(GRADING_MODES)}"
            )
        self.grading_mode = grading_mode

    def draw(self, random: Random) -> Row:
        """A text, and constraints that it keeps and its own request does not."""
        while True:
            text = draw_text(random, self.difficulty)
            chosen = _choose(random, text, self.difficulty)
            prompt = " ".join(constraint.ask(kwargs) for constraint, kwargs in chosen)
            if not all(constraint.holds(prompt, kwargs) for constraint, kwargs in chosen):
                break
        return self.row(
            prompt,
            prompt=prompt,
            instruction_id_list=[constraint.id for constraint, _ in chosen],
            kwargs=[dict(kwargs) for _, kwargs in chosen],
            grading_mode=self.grading_mode,
            solution=text,
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The names of the constraints, then the text that they were measured on."""
        plan = [
            " ".join([name.partition(":")[2], *map(str, kwargs.values())])
            for name, kwargs in constraints_of(row)
        ]
        return [answer_turn(field_of(row, "solution", str), "\n".join(plan))]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 where every constraint holds (or the share that holds)."""
        del session
        text = response.answer if len(response.answer) <= MAX_ANSWER else ""
        held: dict[str, bool] = {}
        for name, kwargs in constraints_of(row):
            if name not in CONSTRAINTS:
                raise DataError(f"the row asks for {name!r}, which is no known constraint")
            held[name] = bool(text) and CONSTRAINTS[name].holds(text, kwargs)
        verification = Verification.all_of(held, answer=text[:80])
        if row.get("grading_mode") != "fraction":
            return verification
        share = sum(held.values()) / len(held)
        return Verification(
            reward=share, components=verification.components, info=verification.info
        )


def constraints_of(row: Row) -> list[tuple[str, Kwargs]]:
    """Ids and parameters of a row's constraints; raises `DataError` where they do not match."""
    ids = cast(list[str], field_of(row, "instruction_id_list", list))
    kwargs = cast(list[Kwargs], field_of(row, "kwargs", list))
    if not ids or len(ids) != len(kwargs):
        raise DataError(f"the row has {len(ids)} constraints and {len(kwargs)} kwargs; pair them")
    return list(zip(ids, kwargs, strict=True))


def _choose(random: Random, text: str, difficulty: float) -> list[tuple[Constraint, Kwargs]]:
    """A quantity and some others of different families, all of which the text keeps."""
    quantities = [(each, each.measure(text, random)) for each in QUANTITIES]
    chosen = [random.choice([(each, k) for each, k in quantities if k is not None])]
    if DISTINCT.holds(text, {}):  # else one word again and again keeps most constraints
        chosen.append((DISTINCT, {}))
    known = [each for each in OTHERS if difficulty >= _EASY or each.id not in _SPELLING]
    others = random.sample(known, len(known))
    wanted = len(chosen) + random.randint(1, 2 + round(2 * difficulty))
    for constraint in others:
        if len(chosen) == wanted:
            break
        if constraint.family not in {each.family for each, _ in chosen}:
            kwargs = constraint.measure(text, random)
            chosen += [] if kwargs is None else [(constraint, kwargs)]
    return chosen


def draw_text(random: Random, difficulty: float) -> str:
    """Words with a layout, in a case, now and then with something common to all of them."""
    num_words = random.randint(2, 4 + round(8 * difficulty))
    found = _words(random, num_words, difficulty)
    if difficulty < _EASY:
        return " ".join(found)
    style = random.choice([str.lower, str.lower, str.upper, str.capitalize])
    found = [style(word) for word in found]
    if random.random() < 0.15:
        place = random.randrange(len(found))
        found[place] = f"[{found[place]}]"
    elif random.random() < 0.15:
        place = random.randrange(len(found))
        found[place] = found[place].upper()
    text = _laid_out(random, found)
    return _decorated(random, text, difficulty)


def _words(random: Random, num_words: int, difficulty: float) -> list[str]:
    every = EASY_WORDS if difficulty < _EASY else WORDS
    pool = every
    match random.randrange(4):
        case 0:
            letter = random.choice(LETTERS)
            pool = tuple(word for word in every if word[0] == letter)
        case 1:
            length = random.choice([3, 4, 5])
            pool = tuple(word for word in every if len(word) == length)
        case _:
            pass
    pool = pool if len(pool) >= num_words else every
    found = random.sample(pool, num_words)
    if random.random() < 0.2:
        return sorted(found)
    if num_words > 2 and random.random() < 0.3 * difficulty:
        found[-1] = found[0]  # one word twice
    return found


def _laid_out(random: Random, found: list[str]) -> str:
    half = (len(found) + 1) // 2
    first, second = " ".join(found[:half]), " ".join(found[half:])
    match random.randrange(9):
        case 0:
            return "\n".join(f"* {word}" for word in found)
        case 1:
            return "\n".join(f"{i}. {word}" for i, word in enumerate(found, start=1))
        case 2:
            return f"{first}\n{second}"
        case 3:
            return f"{first}\n\n{second}"
        case 4:
            return f"{first}\n***\n{second}"
        case 5:
            return f"{first}. {second}{random.choice('.!?')}"
        case 6:
            return ", ".join(found)
        case _:
            return " ".join(found)


def _decorated(random: Random, text: str, difficulty: float) -> str:
    if random.random() > difficulty:
        return text
    match random.randrange(5):
        case 0:
            return f'"{text}"'
        case 1:
            return f"<<{random.choice(WORDS).capitalize()}>>\n{text}"
        case 2:
            return f"{text}\nP.S. {random.choice(WORDS)}"
        case 3 if text[-1].isalpha():
            return text + random.choice("!?.")
        case _:
            return text
