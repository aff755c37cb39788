"""Programs in Python, run against hidden tests in a sandbox.

At difficulty 0 an expression is to be found from examples, in a prompt of a few dozen characters:

    f(2)=5 f(3)=7 f(9)=19. f(x)=?    ->    2*x+1

From 0.3 on functions of lists are to be written from a description, from 0.5 on also programs that
read and print, with up to four operations. Rows have NeMo Gym's fields of its environment
`code_gen`, so that its data can be verified too: `verifier_metadata.unit_tests` with `inputs` and
`outputs`, which are standard input and output, or with `fn_name` the arguments (JSON, one a line)
and the result (JSON) of a function.

Expected outputs stay on this side: the program's are compared outside of the jail.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from random import Random
from typing import Any, ClassVar, cast

from nemotron3.environments.answers import MAX_ANSWER, answer_turn, with_format
from nemotron3.environments.code_tasks import (
    draw_induction,
    draw_pipeline,
    draw_reading,
    with_value,
)
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.sandbox import Ending, Limits, ProgramResult, Sandbox
from nemotron3.environments.verification import RolloutFailedError, Verification
from nemotron3.errors import DataError
from nemotron3.text import AssistantMessage

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_FENCE = "```"
_EXPRESSION, _PROGRAM = "expression", "program"
_NAME = "f"
_BLOCK_FORM = "Answer with one ```python block."


class Code(Environment):
    """Expressions, functions and programs with hidden tests, in a sandbox."""

    name: ClassVar[str] = "code"

    def __init__(self, *, difficulty: float = 0.5, sandbox: Sandbox | None = None) -> None:
        super().__init__(difficulty=difficulty)
        self._sandbox = sandbox or Sandbox(limits=Limits())

    def draw(self, random: Random) -> Row:
        """An expression, a function or a program, as the difficulty allows."""
        place = random.random()
        if place < 1.2 - 2 * self.difficulty:
            return self._induction(random)
        return self._pipeline(random, is_program=place > 1.4 - self.difficulty)

    def _induction(self, random: Random) -> Row:
        task = draw_induction(random, self.difficulty)
        shown = " ".join(f"{_NAME}({x})={y}" for x, y in task.examples)
        checked = [f"{with_value(task.expression, x)}={y}" for x, y in task.examples]
        return self._task(
            with_format(
                f"{shown}. {_NAME}(x)=?", "Answer with an expression of x alone.", self.difficulty
            ),
            inputs=[str(x) for x, _ in task.tests],
            outputs=[str(y) for _, y in task.tests],
            fn_name=_NAME,
            answer_form=_EXPRESSION,
            solution=task.expression,
            reasoning=", ".join(checked),
        )

    def _pipeline(self, random: Random, *, is_program: bool) -> Row:
        task = draw_pipeline(random, self.difficulty)
        example, *tests = task.inputs
        told, end = task.end
        outputs = [task.output(xs) for xs in task.inputs]
        if is_program:
            reading = draw_reading(random)
            printed = [" ".join(map(str, y)) if task.is_list else str(y) for y in outputs]
            told = "them in one line, separated by spaces" if task.is_list else told
            prompt = (
                f"Write a Python program that reads {reading.told}. Of the numbers: {task.told}; "
                f"print {told}.\nFor the input\n{reading.written(example)}it prints\n{printed[0]}"
            )
            last = f"print(*{end})" if task.is_list else f"print({end})"
            lines = [reading.code, *task.body, last]
            inputs = [reading.written(xs) for xs in tests]
            expected = printed[1:]
        else:
            prompt = (
                f"Write {_NAME}(xs) in Python. Of the whole numbers xs: {task.told}; "
                f"return {told}.\n{_NAME}({json.dumps(example)})={json.dumps(outputs[0])}"
            )
            lines = [f"def {_NAME}(xs):", *(f"    {each}" for each in task.body)]
            lines.append(f"    return {end}")
            inputs = [json.dumps(xs) for xs in tests]
            expected = [json.dumps(y) for y in outputs[1:]]
        code = "\n".join(lines)
        return self._task(
            with_format(prompt, _BLOCK_FORM, self.difficulty),
            inputs=inputs,
            outputs=expected,
            fn_name=None if is_program else _NAME,
            answer_form=_PROGRAM,
            solution=f"{_FENCE}python\n{code}\n{_FENCE}",
            reasoning=f"{task.told}, then {told}",
        )

    def _task(
        self,
        prompt: str,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        fn_name: str | None,
        **fields: Any,
    ) -> Row:
        tests: dict[str, Any] = {"inputs": list(inputs), "outputs": list(outputs)}
        tests |= {} if fn_name is None else {"fn_name": fn_name}
        return self.row(prompt, verifier_metadata={"unit_tests": tests}, **fields)

    def solve(self, row: Row) -> list[AssistantMessage]:
        """A check of the examples or the operations in words, then the code."""
        return [answer_turn(field_of(row, "solution", str), field_of(row, "reasoning", str))]

    async def demonstration(self, row: Row) -> TaskResponse:
        """The solution; nothing has to be run for it."""
        return TaskResponse(messages=tuple(self.solve(row)))

    async def seed_session(self, row: Row) -> None:
        """Nothing to remember; but without a sandbox no rollout begins.

        Raises `SandboxUnavailableError` where there is none.
        """
        del row
        await self._sandbox.start()

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 where the one program of the answer passes every test; a failed sandbox is a failure.

        Raises `DataError` for a row without tests that can be read.
        """
        del session
        inputs, outputs, function = _tests_of(row)
        program = program_in(response.answer, str(row.get("answer_form", _PROGRAM)))
        if program is None:
            return Verification.all_of(
                {"format": False, "runs": False, "correct": False}, answer=response.answer[:40]
            )
        try:
            if function is None:
                results = await self._printed(program, inputs, outputs)
            else:
                results = await self._returned(program, function, inputs, outputs)
        except RolloutFailedError as error:
            return Verification(failure=error.failure)
        num_passed, ended = results
        return Verification.all_of(
            {
                "format": True,
                "runs": ended.ending is Ending.OK,
                "correct": num_passed == len(inputs),
            },
            answer=response.answer[:200],
            num_passed=num_passed,
            num_tests=len(inputs),
            ending=str(ended.ending),
            error=(ended.stderr.strip().splitlines() or [""])[-1][:200],
        )

    async def verify_group(
        self, row: Row, responses: Sequence[TaskResponse], sessions: Sequence[Any]
    ) -> list[Verification]:
        """The same answers of a group are run once: a program's tests do not depend on luck."""
        distinct = {response.answer: response for response in responses}
        given = await asyncio.gather(
            *(self.verify(row, response, None) for response in distinct.values())
        )
        verdicts = dict(zip(distinct, given, strict=True))
        del sessions
        return [verdicts[response.answer] for response in responses]

    async def _printed(
        self, program: str, inputs: Sequence[str], outputs: Sequence[str]
    ) -> tuple[int, ProgramResult]:
        """How many tests pass before the first that does not, and the last run."""
        ended: ProgramResult | None = None
        for place, (given, expected) in enumerate(zip(inputs, outputs, strict=True)):
            ended = await self._sandbox.run(program, stdin=given)
            if ended.ending is not Ending.OK or not same_output(ended.stdout, expected):
                return place, ended
        assert ended is not None  # there is a test
        return len(inputs), ended

    async def _returned(
        self, program: str, function: str, inputs: Sequence[str], outputs: Sequence[str]
    ) -> tuple[int, ProgramResult]:
        """How many calls of a function give what is expected, and the run that made them."""
        calls = [[_json(line) for line in given.splitlines()] for given in inputs]
        ended = await self._sandbox.call(program, function, calls)
        pairs = zip(ended.results, outputs, strict=False)
        passed = (bool(r) and same_value(r[0], _json(expected)) for r, expected in pairs)
        return sum(passed), ended


def program_in(answer: str, form: str) -> str | None:
    """The program that an answer gives: the one block, or a function of the one expression.

    None where there is none, several, or an answer of more than `MAX_ANSWER` characters.
    """
    if not answer or len(answer) > MAX_ANSWER:
        return None
    if form == _EXPRESSION:
        if "\n" in answer:
            return None
        # Compiled by itself: nothing that is no expression becomes one by what is put around it.
        compiled = f"compile({answer!r}, 'answer', 'eval')"
        return f"_answer = {compiled}\n{_NAME} = lambda x: eval(_answer, {{'x': x}})"
    blocks = _BLOCK.findall(answer)
    return blocks[0] if len(blocks) == 1 and answer.count(_FENCE) == 2 else None


def same_output(given: str, expected: str) -> bool:
    """Whether two texts are alike, up to space at the ends of lines and spellings of numbers."""
    ours, theirs = (
        [line.rstrip() for line in text.strip().splitlines()] for text in (given, expected)
    )
    if ours == theirs:
        return True
    if len(ours) != len(theirs):
        return False
    pairs = zip(ours, theirs, strict=True)
    return all(a == b or _are_same_numbers(a, b) for a, b in pairs)


def same_value(given: Any, expected: Any) -> bool:
    """Whether two values of JSON are equal; `true` is no number."""
    if isinstance(given, bool) or isinstance(expected, bool):
        return given is expected
    if isinstance(given, list) and isinstance(expected, list):
        ours, theirs = cast(list[Any], given), cast(list[Any], expected)
        return len(ours) == len(theirs) and all(map(same_value, ours, theirs))
    if isinstance(given, dict) and isinstance(expected, dict):
        ours_by, theirs_by = cast(dict[str, Any], given), cast(dict[str, Any], expected)
        return ours_by.keys() == theirs_by.keys() and all(
            same_value(ours_by[key], theirs_by[key]) for key in theirs_by
        )
    return given == expected


def _are_same_numbers(line: str, other: str) -> bool:
    # A program may print a million numbers; they are read where as many are expected.
    is_alike = len(line.split()) == len(other.split())
    return is_alike and _numbers(line) == _numbers(other) != []


def _numbers(line: str) -> list[Decimal]:
    """The numbers that a line consists of; nothing where one of its words is none."""
    found: list[Decimal] = []
    for word in line.split():
        number = Decimal("NaN")
        with suppress(InvalidOperation):
            number = Decimal(word)
        if not number.is_finite():
            return []
        found.append(number)
    return found


def _tests_of(row: Row) -> tuple[list[str], list[str], str | None]:
    metadata = field_of(row, "verifier_metadata", dict)
    where = "the row's verifier_metadata.unit_tests"
    tests: Any = metadata.get("unit_tests")
    if not isinstance(tests, Mapping):
        raise DataError(f"{where} is missing; it holds inputs and outputs")
    fields = cast(Mapping[str, Any], tests)
    inputs, outputs = (
        _texts(fields.get(name), f"{where}.{name}") for name in ("inputs", "outputs")
    )
    if not inputs or len(inputs) != len(outputs):
        raise DataError(
            f"{where} has {len(inputs)} inputs and {len(outputs)} outputs; give as many of both, "
            "and one at least"
        )
    function: Any = fields.get("fn_name")
    if function is not None and not isinstance(function, str):
        raise DataError(f"{where}.fn_name is {function!r}; give a name or nothing")
    return inputs, outputs, function


def _texts(value: Any, where: str) -> list[str]:
    texts = cast(list[Any], value) if isinstance(value, list) else []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} is no list of texts; give one text for each test")
    return texts


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"a test of the row's function is no JSON ({error}): {text[:80]!r}; give arguments one "
            "a line, and the result"
        ) from error
