"""Small programs to be written, each with a solution that gives the expected outputs of its tests.

An expression is to be found from examples: f(2)=5, f(3)=7, so it is 2*x+1. A pipeline of list
operations is to be written from its description, as a function or as a program that reads and
prints. Descriptions and code are drawn together, and expected outputs are calculated by the code
itself; all of it is text of this file.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

MAX_EXAMPLES = 5
_SMALL = range(2, 10)
# Kinds of expressions from easy to hard; the difficulty says how many of them there are.
_EXPRESSIONS = (
    "x+{b}",
    "{a}*x",
    "{a}*x+{b}",
    "{a}*x-{b}",
    "{b}-x",
    "x*x+{b}",
    "x%{a}+{b}",
    "x//{a}+{b}",
    "max(x,{a})+{b}",
    "abs(x-{a})*{b}",
    "x*(x+{a})-{b}",
    "min({a}*x,x+{b})",
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation on the list `xs`: how it is told, and its code; `k` is drawn from a range."""

    told: str
    code: str
    low: int = 0
    high: int = 0


_STEPS = (
    Step(told="keep the even ones", code="[x for x in xs if x % 2 == 0]"),
    Step(told="keep those above {k}", code="[x for x in xs if x > {k}]", low=-3, high=9),
    Step(told="add {k} to each", code="[x + {k} for x in xs]", low=1, high=20),
    Step(told="multiply each by {k}", code="[x * {k} for x in xs]", low=2, high=12),
    Step(told="reverse their order", code="xs[::-1]"),
    Step(told="sort them", code="sorted(xs)"),
    Step(told="drop the first {k}", code="xs[{k}:]", low=1, high=3),
    Step(told="keep the first {k}", code="xs[:{k}]", low=2, high=5),
    Step(told="keep the odd ones", code="[x for x in xs if x % 2 == 1]"),
    Step(told="square each", code="[x * x for x in xs]"),
    Step(
        told="replace each by its remainder when divided by {k}",
        code="[x % {k} for x in xs]",
        low=3,
        high=15,
    ),
    Step(told="drop repeated ones, keeping the first of each", code="list(dict.fromkeys(xs))"),
    Step(told="sort them from the largest down", code="sorted(xs, reverse=True)"),
    Step(told="keep every {k}. one, from the first", code="xs[::{k}]", low=2, high=3),
    Step(
        told="replace each by the sum of those up to it, itself included",
        code="[sum(xs[: i + 1]) for i in range(len(xs))]",
    ),
    Step(
        told="replace them by the differences of neighbours, the later minus the earlier",
        code="[b - a for a, b in zip(xs, xs[1:])]",
    ),
)
_ENDS = (
    Step(told="their sum", code="sum(xs)"),
    Step(told="how many there are", code="len(xs)"),
    Step(told="the largest, or 0 if there is none", code="max(xs, default=0)"),
    Step(told="the list", code="xs"),
    Step(told="the smallest, or 0 if there is none", code="min(xs, default=0)"),
    Step(told="how many different ones there are", code="len(set(xs))"),
)
_LISTED = "the list"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a program reads its list: told, in code, and written for a test."""

    told: str
    code: str
    written: Callable[[Sequence[int]], str]


def _one_line(xs: Sequence[int]) -> str:
    return " ".join(map(str, xs))


_READINGS = (
    Reading(
        told="one line of whole numbers, which may be empty",
        code="xs = list(map(int, input().split()))",
        written=lambda xs: f"{_one_line(xs)}\n",
    ),
    Reading(
        told="a line with a count, then a line with that many whole numbers",
        code="n = int(input())\nxs = list(map(int, input().split()))",
        written=lambda xs: f"{len(xs)}\n{_one_line(xs)}\n",
    ),
    Reading(
        told="a line with a count, then that many lines with one whole number each",
        code="xs = [int(input()) for _ in range(int(input()))]",
        written=lambda xs: "\n".join(map(str, [len(xs), *xs])) + "\n",
    ),
)


def evaluate(code: str, **names: Any) -> Any:
    """The value of an expression of this file."""
    return eval(code, names)


@lru_cache
def _family(num_kinds: int) -> tuple[Any, ...]:
    """Every expression of the first kinds, compiled."""
    texts = {
        kind.format(a=a, b=b) for kind in _EXPRESSIONS[:num_kinds] for a in _SMALL for b in _SMALL
    }
    return tuple(compile(text, "f", "eval") for text in sorted(texts))


@dataclass(frozen=True, kw_only=True)
class Induction:
    """An expression of x, examples that determine it among all that are drawn, and tests."""

    expression: str
    examples: tuple[tuple[int, int], ...]
    tests: tuple[tuple[int, int], ...]


def draw_induction(random: Random, difficulty: float) -> Induction:
    """An expression that no other one of its difficulty could be mistaken for."""
    num_kinds = 5 + round(7 * min(1.0, 2 * difficulty))
    while True:
        a, b = random.choice(_SMALL), random.choice(_SMALL)
        expression = random.choice(_EXPRESSIONS[:num_kinds]).format(a=a, b=b)
        inputs = random.sample(range(-9 if difficulty > 0.2 else 0, 20), MAX_EXAMPLES)
        hidden = [x for x in random.sample(range(-30, 60), 12) if x not in inputs][:7]
        outputs = {x: evaluate(expression, x=x) for x in (*inputs, *hidden)}
        rivals = [
            each
            for each in _family(num_kinds)
            if any(eval(each, {}, {"x": x}) != outputs[x] for x in hidden)
        ]
        for count in range(1, MAX_EXAMPLES + 1):
            x = inputs[count - 1]
            rivals = [each for each in rivals if eval(each, {}, {"x": x}) == outputs[x]]
            if not rivals and count > 1:
                return Induction(
                    expression=expression,
                    examples=tuple((x, outputs[x]) for x in inputs[:count]),
                    tests=tuple((x, outputs[x]) for x in hidden),
                )


def with_value(expression: str, x: int) -> str:
    """An expression with a number for its x."""
    return re.sub(r"\bx\b", str(x) if x >= 0 else f"({x})", expression)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Operations on a list and what is given in the end, with inputs that tell it from others."""

    steps: tuple[tuple[str, str], ...]
    """How each is told, and its code."""
    end: tuple[str, str]
    inputs: tuple[tuple[int, ...], ...]
    """The first is the example."""

    @property
    def told(self) -> str:
        """All operations in words."""
        return ", then ".join(told for told, _ in self.steps)

    @property
    def is_list(self) -> bool:
        """Whether a list is given in the end."""
        return self.end[0] == _LISTED

    @property
    def body(self) -> list[str]:
        """The lines of code that change `xs`."""
        return [f"xs = {code}" for _, code in self.steps]

    def output(self, xs: Sequence[int]) -> Any:
        """What is to come out for a list."""
        value: Any = list(xs)
        for _, code in (*self.steps, self.end):
            value = evaluate(code, xs=value)
        return value


def draw_pipeline(random: Random, difficulty: float) -> Pipeline:
    """One step at low difficulties, up to four at 1, whose outputs differ from test to test."""
    most = 1 + round(3 * difficulty)
    known = _STEPS[: 8 + round(8 * difficulty)]
    ends = _ENDS[: 4 + round(2 * difficulty)]
    while True:
        steps = random.sample(known, random.randint(max(1, most - 1), most))
        pipeline = Pipeline(
            steps=tuple(_filled(random, step) for step in steps),
            end=_filled(random, random.choice(ends)),
            inputs=tuple(_numbers(random, length) for length in (4, 0, 1, 3, 5, 6, 8, 9)),
        )
        outputs = [str(pipeline.output(xs)) for xs in pipeline.inputs[1:]]
        without = [str(evaluate(pipeline.end[1], xs=list(xs))) for xs in pipeline.inputs[1:]]
        if max(map(outputs.count, outputs)) <= 3 and outputs != without:
            return pipeline


def draw_reading(random: Random) -> Reading:
    """A way to read a list from standard input."""
    return random.choice(_READINGS)


def _filled(random: Random, step: Step) -> tuple[str, str]:
    k = random.randint(step.low, step.high)
    return step.told.format(k=k), step.code.format(k=k)


def _numbers(random: Random, length: int) -> tuple[int, ...]:
    numbers = [random.randint(-9, 20) for _ in range(length)]
    if length > 4:  # some are repeated
        numbers[-1] = numbers[0]
    return tuple(numbers)
