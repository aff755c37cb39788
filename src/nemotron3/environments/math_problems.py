r"""Arithmetic and small algebra, answered by a number in `\boxed{}`.

At difficulty 0 a sum of three or four digits; then more and longer terms, products and parentheses,
remainders and equations. Any spelling of the right number will do (`0.5`, `1/2`), one box alone.

Rows have NeMo Gym's fields of its environment `math_with_judge`: `question`, `expected_answer`.
"""

from fractions import Fraction
from random import Random
from typing import Any, ClassVar

from nemotron3.environments.answers import answer_turn, boxed, number, with_format
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.errors import DataError
from nemotron3.text import AssistantMessage

ASK = r"Answer in \boxed{}."


class MathProblems(Environment):
    """Sums, products, remainders and equations with boxed answers."""

    name: ClassVar[str] = "math"

    def draw(self, random: Random) -> Row:
        """One problem of a kind that the difficulty allows."""
        kinds = [_sum, _sum, _product, _remainder, _equation]
        kind = random.choice(kinds[: 2 + round(3 * self.difficulty)])
        question, steps, answer = kind(random, self.difficulty)
        return self.row(
            with_format(question, ASK, self.difficulty),
            question=question,
            expected_answer=str(answer),
            steps=steps,
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The steps of the calculation, then the box."""
        answer = field_of(row, "expected_answer", str)
        return [answer_turn(f"\\boxed{{{answer}}}", "\n".join(field_of(row, "steps", list)))]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 for the right number in the one box of the answer."""
        del session
        expected = number(field_of(row, "expected_answer", str))
        if expected is None:
            raise DataError(f"the row's expected_answer is {row['expected_answer']!r}, no number")
        inside = boxed(response.answer)
        given = None if inside is None else number(inside)
        return Verification.all_of(
            {"format": given is not None, "correct": given == expected},
            answer=None if given is None else str(given),
        )


def _size(difficulty: float, low: float, high: float) -> int:
    return round(low + difficulty * (high - low))


def _sum(random: Random, difficulty: float) -> tuple[str, list[str], Fraction]:
    largest = round(9 * 111**difficulty)
    total = random.randint(1, largest)
    text, steps = str(total), []
    for _ in range(random.randint(2, _size(difficulty, 3, 6))):
        term = random.randint(1, largest)
        sign = random.choice("+-") if total > term else "+"
        result = total + term if sign == "+" else total - term
        text += f"{sign}{term}"
        steps.append(f"{total}{sign}{term}={result}")
        total = result
    return f"{text}=?", steps, Fraction(total)


def _product(random: Random, difficulty: float) -> tuple[str, list[str], Fraction]:
    a, b = (random.randint(2, _size(difficulty, 9, 99)) for _ in range(2))
    c, d = (random.randint(1, _size(difficulty, 20, 500)) for _ in range(2))
    if random.random() < 0.5:
        steps = [f"{a}*{b}={a * b}", f"{a * b}+{c}={a * b + c}"]
        return f"{c}+{a}*{b}=?", steps, Fraction(a * b + c)
    steps = [f"{c}+{d}={c + d}", f"{a}*{c + d}={a * (c + d)}"]
    return f"{a}*({c}+{d})=?", steps, Fraction(a * (c + d))


def _remainder(random: Random, difficulty: float) -> tuple[str, list[str], Fraction]:
    b = random.randint(3, _size(difficulty, 12, 60))
    a = random.randint(b + 1, _size(difficulty, 200, 2000))
    steps = [f"{a // b}*{b}={a // b * b}", f"{a}-{a // b * b}={a % b}"]
    return f"What is the remainder of {a} divided by {b}?", steps, Fraction(a % b)


def _equation(random: Random, difficulty: float) -> tuple[str, list[str], Fraction]:
    a = random.randint(2, _size(difficulty, 9, 20))
    b = random.randint(1, _size(difficulty, 20, 200))
    # At the highest difficulties the solution is a fraction.
    scale = random.randint(2, 5) if random.random() < difficulty - 0.6 else 1
    x = Fraction(random.randint(2, _size(difficulty, 20, 100)), scale)
    c = a * x + b
    steps = [f"{a}x={c}-{b}={c - b}", f"x={c - b}/{a}={x}"]
    return f"Solve {a}x+{b}={c} for x.", steps, x
