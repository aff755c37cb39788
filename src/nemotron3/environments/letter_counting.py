"""Counting a letter, with every count equally often the right one.

Counts of letters in natural words are mostly 0 and 1, and a policy that always answers "1" is
rewarded well without counting. Here the count is drawn first, uniformly, and the letters after it.
At difficulty 0 a few separate letters; then longer rows of them, and whole words.
"""

from random import Random
from typing import Any, ClassVar

from nemotron3.environments.answers import answer_turn, with_format
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.environments.words import LETTERS, WORDS
from nemotron3.text import AssistantMessage


class LetterCounting(Environment):
    """How often a letter occurs; the answers 0, 1, 2, ... are equally frequent."""

    name: ClassVar[str] = "letter_counting"

    def draw(self, random: Random) -> Row:
        """A count, then letters or words with that many."""
        most = 4 + round(5 * self.difficulty)
        wanted = random.randint(0, most)
        letter = random.choice(LETTERS[:20])
        if random.random() < self.difficulty - 0.25:
            units = _words(random, letter, wanted)
        else:
            units = _letters(random, letter, wanted, most + random.randint(1, 3))
        text = " ".join(units)
        counted = [f"{unit} {unit.count(letter)}" for unit in units if letter in unit]
        return self.row(
            with_format(
                f"How many {letter} in: {text}", "Answer with the number alone.", self.difficulty
            ),
            expected_answer=str(wanted),
            counted=counted,
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The places where the letter is, one by one, then their number."""
        reasoning = "\n".join(field_of(row, "counted", list)) or "none"
        return [answer_turn(field_of(row, "expected_answer", str), reasoning)]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 for the number, written in digits and alone."""
        del session
        given = response.answer
        is_number = given.isascii() and given.isdecimal() and len(given) <= 3
        is_right = is_number and int(given) == int(field_of(row, "expected_answer", str))
        return Verification.all_of({"format": is_number, "correct": is_right}, answer=given[:20])


def _letters(random: Random, letter: str, wanted: int, length: int) -> list[str]:
    others = [other for other in LETTERS[:20] if other != letter]
    found = [letter] * wanted + random.choices(others, k=max(length, wanted) - wanted)
    random.shuffle(found)
    return found


def _words(random: Random, letter: str, wanted: int) -> list[str]:
    """Words that hold the letter as often as is wanted, and some that do not."""
    without = [word for word in WORDS if letter not in word]
    found = random.sample(without, random.randint(2, 4))
    while wanted:
        with_it = [word for word in WORDS if 0 < word.count(letter) <= wanted]
        word = random.choice(with_it) if with_it else letter
        found.append(word)
        wanted -= word.count(letter)
    random.shuffle(found)
    return found
