"""The environment of programs: its tasks are clear, and only right programs are rewarded."""

import asyncio
import json
import sys
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.environments import (
    FailureKind,
    RolloutFailedError,
    TaskResponse,
    load_environment,
    make_row,
)
from nemotron3.environments.code import Code, program_in, same_output, same_value
from nemotron3.environments.code_tasks import (
    _READINGS,
    _STEPS,
    draw_induction,
    draw_pipeline,
    evaluate,
    with_value,
)
from nemotron3.environments.sandbox import Ending, ProgramResult
from nemotron3.errors import DataError
from nemotron3.text import AssistantMessage

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(scope="module")
def code():
    return Code()


def rows_of(inputs, outputs, **fields):
    tests = {"inputs": inputs, "outputs": outputs, **fields}
    return make_row("code", "?", verifier_metadata={"unit_tests": tests})


def fenced(program):
    return f"```python\n{program}\n```"


def judged(code, row, answer):
    response = TaskResponse.of(AssistantMessage(content=answer))
    return asyncio.run(code.verify(row, response, None))


@needs_linux
def test_a_program_that_reads_and_prints(code):
    row = rows_of(["1 2\n", "5 5\n"], ["3\n", "10\n"])
    right = "a, b = map(int, input().split())\nprint(a + b)"
    assert judged(code, row, fenced(right)).reward == 1
    assert judged(code, row, f"So:\n{fenced(right)}\nThat is it.").reward == 1
    for wrong in (
        right,  # in no block
        fenced(right) * 2,
        fenced("print(3)"),
        fenced(f"{right}\nprint('done')"),
        fenced(f"{right}\n1/0"),
        fenced(f"{right}\nexit(1)"),
        fenced("print('3\\n10')"),
        "```python\n" + right,
        fenced(""),
    ):
        assert judged(code, row, wrong).reward == 0
    half = judged(code, row, fenced("print(3)"))
    assert (half.info["num_passed"], half.info["num_tests"]) == (1, 2)
    assert half.components == {"format": 1, "runs": 1, "correct": 0}
    crashed = judged(code, row, fenced("1/0"))
    assert crashed.components["runs"] == 0
    assert crashed.info["error"] == "ZeroDivisionError: division by zero"


@needs_linux
def test_rows_of_nemo_gym_with_a_function(code):
    row = rows_of(["[1, 2]\n3", "[]\n0"], ["6", "0"], fn_name="total")
    for right in (
        "def total(xs, k):\n    return sum(xs) + k",
        "class Solution:\n    def total(self, xs, k): return sum(xs, k)",
        "from functools import reduce\ntotal = lambda xs, k: float(sum(xs) + k)",
    ):
        assert judged(code, row, fenced(right)).reward == 1
    for wrong in (
        "def total(xs, k): return str(sum(xs) + k)",
        "def total(xs, k): print(sum(xs) + k)",
        "def total(xs, k): return [sum(xs) + k]",
        "def total(xs, k): return sum(xs) + k if xs else False",
        "def total(xs): return sum(xs)",
        "def other(xs, k): return sum(xs) + k",
        "def total(xs, k):\n    if not xs: exit(0)\n    return 6",
    ):
        assert judged(code, row, fenced(wrong)).reward == 0


@needs_linux
def test_an_expression_is_one_line_of_python(code):
    row = {**rows_of(["1", "5"], ["3", "11"], fn_name="f"), "answer_form": "expression"}
    for right in ("2*x+1", " 2 * x + 1  # twice", "sum((x, x, 1))"):
        assert judged(code, row, right).reward == 1
    for wrong in (
        "2*x",
        "3",
        "f(x)=2*x+1",
        "2*x\n+1",
        fenced("2*x+1"),
        "x)+(x+1",
        "2x+1",
        "(2*x+1",
    ):
        assert judged(code, row, wrong).reward == 0


@needs_linux
def test_a_group_s_equal_answers_are_run_once():
    class Counting(Code):
        name = "code"
        runs = 0

        async def _returned(self, *given):
            self.runs += 1
            return await super()._returned(*given)

    code = Counting(difficulty=0.0)
    row = code.task(0)
    right = row["solution"]
    answers = [right, "x", right, right, "", "x"]
    responses = [TaskResponse.of(AssistantMessage(content=answer)) for answer in answers]
    found = asyncio.run(code.verify_group(row, responses, [None] * 6))
    assert [verification.reward for verification in found] == [1, 0, 1, 1, 0, 0]
    assert code.runs == 2


class Broken:
    """A sandbox that fails, or whose programs end as they are told."""

    def __init__(self, result=None):
        self._result = result

    async def run(self, *_, **__):
        if self._result is None:
            raise RolloutFailedError(FailureKind.ENVIRONMENT, "sandbox: out of memory")
        return self._result

    call = run


@pytest.mark.parametrize("function", [None, "f"])
def test_a_failed_sandbox_is_no_reward(function):
    row = rows_of(["1"], ["1"], **({} if function is None else {"fn_name": function}))
    verification = judged(Code(sandbox=Broken()), row, fenced("f = print"))
    assert verification.reward is None
    assert verification.failure.kind is FailureKind.ENVIRONMENT


@pytest.mark.parametrize("ending", list(Ending))
def test_right_output_counts_only_from_a_program_that_ended_well(ending):
    result = ProgramResult(
        ending=ending, exit_status=0, stdout="1\n", stderr="", results=((1,),), cpu_s=0.0
    )
    for fields in ({}, {"fn_name": "f"}):
        row = rows_of(["1"], ["1"], **fields)
        verification = judged(Code(sandbox=Broken(result)), row, fenced("print(1)"))
        assert verification.reward == (ending is Ending.OK)


WRONG_ROWS = {
    "no metadata": ({}, "verifier_metadata is missing"),
    "no tests": ({"verifier_metadata": {}}, "unit_tests is missing"),
    "no inputs": ({"verifier_metadata": {"unit_tests": {"outputs": []}}}, "inputs is no list"),
    "uneven": (rows_of(["1"], []), "1 inputs and 0 outputs"),
    "none": (rows_of([], []), "0 inputs"),
    "numbers": (rows_of([1], ["1"]), "inputs is no list of texts"),
    "function": (rows_of(["1"], ["1"], fn_name=3), "fn_name is 3"),
    "no JSON": (rows_of(["x"], ["1"], fn_name="f"), "no JSON"),
}


@pytest.mark.parametrize(("row", "said"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_rows_without_tests_are_refused(code, row, said):
    with pytest.raises(DataError, match=said):
        judged(code, row, fenced("f = abs"))


def test_one_block_is_a_program():
    assert program_in("```\nx\n```", "program") == "x"
    assert program_in("a\n```py\nx\ny\n```\nb", "program") == "x\ny"
    for none in ("", "x", "```python x```", "```js\nx\n```", "```\nx\n``` ```\ny\n```", "```\nx"):
        assert program_in(none, "program") is None
    assert program_in(fenced("x" * 20_001), "program") is None


def test_outputs_are_compared_by_lines_and_numbers():
    assert same_output("1 2\n3\n", "1 2 \n3")
    assert same_output("0.50 1e2\n", "0.5 100")
    assert same_output("", "\n")
    for found, expected in (
        ("1 2 3", "1 2\n3"),
        ("1  2", "1 3"),
        ("a  b", "a b"),
        ("yes", "Yes"),
        ("NaN", "nan"),
        ("1", "1 1"),
        ("", "0"),
        ("1\n\n2", "1\n2"),
    ):
        assert not same_output(found, expected)


def test_values_are_compared_by_type():
    assert same_value([1, {"a": 2.0}], [1.0, {"a": 2}])
    for found, expected in ((True, 1), (1, True), (0, False), ("1", 1), (None, 0), ([1], [1, 1])):
        assert not same_value(found, expected)
    assert not same_value({"a": 1}, {"a": True})
    assert not same_value({"a": 1, "b": 2}, {"a": 1})


@settings(max_examples=60)
@given(st.integers(0, 10**9), st.sampled_from([0.0, 0.2, 0.5]))
def test_examples_leave_one_expression(seed, difficulty):
    task = draw_induction(Random(seed), difficulty)
    assert 2 <= len(task.examples) <= 5
    assert all(evaluate(task.expression, x=x) == y for x, y in (*task.examples, *task.tests))
    assert not {x for x, _ in task.examples} & {x for x, _ in task.tests}
    assert len(task.tests) >= 5
    table = json.dumps(dict(task.examples))
    assert any(str(x) not in table for x, _ in task.tests)


def test_values_take_the_place_of_x_alone():
    assert with_value("max(x,3)+x", -2) == "max((-2),3)+(-2)"
    assert with_value("x*x", 4) == "4*4"


MEANT = {
    "keep the even ones": ([3, -2, 0, 5, 4], [-2, 0, 4]),
    "keep those above 3": ([3, 4, -9, 7], [4, 7]),
    "add 3 to each": ([1, -1], [4, 2]),
    "multiply each by 3": ([1, -1], [3, -3]),
    "reverse their order": ([1, 5, 2], [2, 5, 1]),
    "sort them": ([1, -5, 2, 1], [-5, 1, 1, 2]),
    "drop the first 3": ([4, 5, 6, 7], [7]),
    "keep the first 3": ([4, 5, 6, 7], [4, 5, 6]),
    "keep the odd ones": ([3, -2, -5, 4], [3, -5]),
    "square each": ([-2, 3], [4, 9]),
    "replace each by its remainder when divided by 3": ([7, -1, 3], [1, 2, 0]),
    "drop repeated ones, keeping the first of each": ([2, 1, 2, 3, 1], [2, 1, 3]),
    "sort them from the largest down": ([1, -5, 2], [2, 1, -5]),
    "keep every 3. one, from the first": ([1, 2, 3, 4, 5, 6, 7], [1, 4, 7]),
    "replace each by the sum of those up to it, itself included": ([1, 2, -5], [1, 3, -2]),
    "replace them by the differences of neighbours, the later minus the earlier": (
        [4, 9, 7],
        [5, -2],
    ),
}


def test_steps_do_what_they_say():
    assert {step.told.format(k=3) for step in _STEPS} == set(MEANT)
    for step in _STEPS:
        before, after = MEANT[step.told.format(k=3)]
        assert evaluate(step.code.format(k=3), xs=before) == after
        assert evaluate(step.code.format(k=3), xs=[]) == []


def test_inputs_are_written_as_they_are_told():
    for reading, wanted in zip(_READINGS, ("4 -5\n", "2\n4 -5\n", "2\n4\n-5\n"), strict=True):
        assert reading.written([4, -5]) == wanted


@settings(max_examples=40)
@given(st.integers(0, 10**9), st.floats(0, 1))
def test_pipelines_have_tests_that_tell_them_from_less(seed, difficulty):
    task = draw_pipeline(Random(seed), difficulty)
    outputs = [task.output(xs) for xs in task.inputs]
    assert len(task.inputs) == 8
    assert any(task.inputs[place] == () for place in range(1, 8))
    assert len({str(output) for output in outputs[1:]}) >= 3
    assert 1 <= len(task.steps) <= 1 + round(3 * difficulty)


@pytest.mark.parametrize(
    ("difficulty", "forms"), [(0.0, {"expression"}), (0.4, {"expression", "program"})]
)
def test_easy_tasks_are_expressions(difficulty, forms):
    rows = [load_environment("code", difficulty=difficulty).task(i) for i in range(60)]
    assert {row["answer_form"] for row in rows} == forms
    if difficulty == 0:
        assert max(len(row["solution"]) for row in rows) <= 8


def test_hard_tasks_are_functions_and_programs():
    rows = [load_environment("code", difficulty=1.0).task(i) for i in range(60)]
    assert {row["answer_form"] for row in rows} == {"program"}
    with_function = ["fn_name" in row["verifier_metadata"]["unit_tests"] for row in rows]
    assert 10 < sum(with_function) < 50


def test_expected_outputs_are_not_in_the_prompt_but_for_the_example():
    for index in range(40):
        row = load_environment("code", difficulty=0.0).task(index)
        prompt = row["responses_create_params"]["input"][0]["content"]
        tests = row["verifier_metadata"]["unit_tests"]
        assert not [x for x in tests["inputs"] if f"f({x})" in prompt]
