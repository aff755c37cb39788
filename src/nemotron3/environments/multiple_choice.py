r"""Multiple choice: four to eight options, one right, its letter drawn uniformly.

The kinds of question: the largest or smallest number, the first or last word of the alphabet, the
value of an expression. An answer is one letter (`B`, `(B)`, `\boxed{B}`); two are no answer.

Rows have NeMo Gym's fields of its environment `mcqa`: `options`, `expected_answer`,
`grading_mode`.
"""

from random import Random
from typing import Any, ClassVar, cast

from nemotron3.environments.answers import answer_turn, choice, with_format
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.environments.words import WORDS
from nemotron3.text import AssistantMessage

LETTERS = "ABCDEFGH"


class MultipleChoice(Environment):
    """Questions with lettered options, each letter right equally often."""

    name: ClassVar[str] = "multiple_choice"

    def draw(self, random: Random) -> Row:
        """One question of a kind that the difficulty allows."""
        kinds = [_number, _number, _word, _expression]
        kind = random.choice(kinds[: 2 + round(2 * self.difficulty)])
        num_options = random.randint(4, 4 + round(4 * self.difficulty))
        question, options, right, reasoning = kind(random, num_options, self.difficulty)
        letters = LETTERS[:num_options]
        listed = "\n".join(f"{a}) {x}" for a, x in zip(letters, options, strict=True))
        return self.row(
            with_format(f"{question}\n{listed}", "Answer with the letter alone.", self.difficulty),
            options=[{a: x} for a, x in zip(letters, options, strict=True)],
            expected_answer=letters[right],
            grading_mode="single_letter",
            reasoning=reasoning,
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The best option, then its letter."""
        return [answer_turn(field_of(row, "expected_answer", str), field_of(row, "reasoning", str))]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 for the one right letter."""
        del session
        options = cast(list[dict[str, Any]], field_of(row, "options", list))
        letters = [letter for option in options for letter in option]
        given = choice(response.answer, letters)
        expected = field_of(row, "expected_answer", str)
        return Verification.all_of(
            {"format": given is not None, "correct": given == expected}, answer=given
        )


Question = tuple[str, list[str], int, str]
"""What is asked, the options, the place of the right one, and the reasoning to it."""


def _number(random: Random, num_options: int, difficulty: float) -> Question:
    largest = round(9 * 10 ** (3 * difficulty))
    options = random.sample(range(largest + 1), num_options)
    word, best = random.choice([("largest", max(options)), ("smallest", min(options))])
    place = options.index(best)
    return f"Which is {word}?", list(map(str, options)), place, f"{word}: {_option(place, best)}"


def _word(random: Random, num_options: int, difficulty: float) -> Question:
    del difficulty
    options = random.sample(WORDS, num_options)
    word, best = random.choice([("first", min(options)), ("last", max(options))])
    question = f"Which comes {word} in the alphabet?"
    place = options.index(best)
    return question, options, place, f"{word}: {_option(place, best)}"


def _expression(random: Random, num_options: int, difficulty: float) -> Question:
    a, b = (random.randint(3, round(9 + 40 * difficulty)) for _ in range(2))
    c = random.randint(1, 99)
    value = a * b + c
    # Wrong options are near the right one, so that its size gives nothing away.
    shift = random.randrange(num_options)
    step = random.choice([1, 2, 10])
    options = [value + step * (i - shift) for i in range(num_options)]
    random.shuffle(options)
    place = options.index(value)
    steps = f"{a}*{b}={a * b}\n{a * b}+{c}={_option(place, value)}"
    return f"What is {a}*{b}+{c}?", list(map(str, options)), place, steps


def _option(place: int, value: str | int) -> str:
    return f"{value}, {LETTERS[place]}"
