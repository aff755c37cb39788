"""Sums that are calculated with a tool, one operation a call.

The calculator takes one operation at a time, so a chain of k operations is k calls, each with the
result of the one before. At difficulty 0 one call; at 1 five, with large numbers, told in an order
that is not that of the call ("45 less than ..."). A right number without the calls is not
rewarded: large products are to be calculated, not guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

from nemotron3.environments.answers import answer_turn, call_turns, number, with_format
from nemotron3.environments.environment import ERROR, Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.text import AssistantMessage, Tool

MAX_DIGITS = 15
_NUMBER = rf"\s*(-?\d{{1,{MAX_DIGITS}}})\s*"
_OPERATION = re.compile(rf"{_NUMBER}([-+*]){_NUMBER}", re.ASCII)
CALCULATE = Tool(
    name="calculate",
    description="Calculate one operation of two whole numbers, such as 12*34.",
    parameters={
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
)
"""What the page and the terminal chat offer, too."""


@dataclass
class CalculatorSession:
    """The results of one rollout's calls, in order."""

    results: list[int] = field(default_factory=list[int])


class Calculator(Environment):
    """Chains of operations, each by a call of the tool `calculate`."""

    name: ClassVar[str] = "calculator"
    tools = (CALCULATE,)
    max_turns = 8

    def draw(self, random: Random) -> Row:
        """A chain of operations in words; none of its results is negative."""
        largest = round(99 * 10 ** (2 * self.difficulty))
        value = random.randint(10, largest)
        told = str(value)
        expressions: list[str] = []
        for step in range(random.randint(1, 1 + round(4 * self.difficulty))):
            n = random.randint(2, 99 if step else largest)
            sign = random.choice("+-*" if value > n else "+*")
            sign = "+" if sign == "*" and value * n >= 10**MAX_DIGITS else sign
            told = _told(random, told, sign, n)
            expressions.append(f"{value}{sign}{n}")
            value = calculate(value, sign, n)
        prompt = with_format(f"Calculate {told}.", "Answer with the number alone.", self.difficulty)
        return self.row(prompt, expected_answer=str(value), expressions=expressions)

    def solve(self, row: Row) -> list[AssistantMessage]:
        """One call for each operation, then the last result."""
        expressions = field_of(row, "expressions", list)
        calls = [("calculate", {"expression": expression}) for expression in expressions]
        steps = [f"step {i}" for i in range(1, len(calls) + 1)]
        return [
            *call_turns(calls, steps),
            answer_turn(field_of(row, "expected_answer", str), "done"),
        ]

    async def seed_session(self, row: Row) -> CalculatorSession:
        """No calls yet."""
        del row
        return CalculatorSession()

    async def run_tool(
        self, session: CalculatorSession, name: str, arguments: Mapping[str, Any]
    ) -> str:
        """The result of one operation."""
        del name
        operation = _OPERATION.fullmatch(arguments["expression"])
        if operation is None:
            return f"{ERROR}the expression is not two whole numbers with +, - or * between them"
        session.results.append(calculate(int(operation[1]), operation[2], int(operation[3])))
        return str(session.results[-1])

    async def verify(
        self, row: Row, response: TaskResponse, session: CalculatorSession
    ) -> Verification:
        """1 for the right number, where it is the result of as many calls as are needed."""
        expected = number(field_of(row, "expected_answer", str))
        given = number(response.answer)
        needed = len(field_of(row, "expressions", list))
        results = session.results
        is_calculated = bool(results) and len(results) >= needed and results[-1] == expected
        return Verification.all_of(
            {
                "format": given is not None,
                "calculated": is_calculated,
                "correct": given is not None and given == expected,
            },
            answer=response.answer[:20],
            num_calls=len(response.tool_calls),
        )


def calculate(left: int, sign: str, right: int) -> int:
    """One operation."""
    match sign:
        case "+":
            return left + right
        case "-":
            return left - right
        case _:
            return left * right


def _told(random: Random, told: str, sign: str, n: int) -> str:
    ways = {
        "+": ("{0} plus {1}", "{1} added to {0}"),
        "-": ("{0} minus {1}", "{1} less than {0}"),
        "*": ("{0} times {1}", "{1} times {0}"),
    }
    # Nested phrases are put in parentheses: words have no order of operations.
    inside = told if told.isdecimal() else f"({told})"
    return random.choice(ways[sign]).format(inside, n)
