"""`nemotron3 env`: list, show, check."""

import pytest

from nemotron3.cli.main import main
from nemotron3.environments import BUILT_IN
from tests.environments.test_registry import GOOD


def run(capsys, *arguments):
    status = main(["env", *arguments])
    return status, capsys.readouterr()


def test_list_names_every_environment(capsys):
    status, printed = run(capsys, "list")
    assert status == 0
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == list(BUILT_IN)
    assert all(len(line.split()) > 4 for line in lines)


def test_show_prints_tasks_with_their_solutions(capsys):
    options = ("--difficulty", "1", "--num-tasks", "2", "--split", "held_out", "--seed", "3")
    status, printed = run(capsys, "show", "calculator", *options)
    assert status == 0
    assert printed.out.count("[user] Calculate ") == 2
    assert printed.out.count("[reward] 1 (format 1, calculated 1, correct 1)") == 2
    assert "[tools] calculate\n" in printed.out
    assert "[call] calculate(expression='" in printed.out
    assert "\n[tool] " in printed.out
    assert "\n[reasoning] " in printed.out


def test_show_prints_tasks_that_have_no_solutions(capsys, tmp_path):
    file = tmp_path / "parrot.py"
    file.write_text(GOOD, encoding="utf-8")
    status, printed = run(capsys, "show", str(file), "--num-tasks", "1")
    assert status == 0
    assert "[user] Say " in printed.out
    assert "[no demonstration]" in printed.out


def test_check_tells_what_could_be_guessed(capsys):
    status, printed = run(capsys, "check", "math", "--num-tasks", "50")
    assert status == 0
    assert "math at difficulty 0.5, 50 held-out tasks" in printed.out
    assert "reward of the solutions  1.000" in printed.out
    assert "answer twenty times            0.000" in printed.out


def test_check_fails_where_a_solution_is_not_rewarded(capsys, tmp_path):
    file = tmp_path / "parrot.py"
    wrong = GOOD + (
        "\n    def solve(self, row):\n"
        "        from nemotron3.text import AssistantMessage\n"
        "        return [AssistantMessage(content='?', reasoning='')]\n"
    )
    file.write_text(wrong, encoding="utf-8")
    status, printed = run(capsys, "check", str(file), "--num-tasks", "5")
    assert status == 1
    assert "reward of the solutions  0.000" in printed.out
    assert "100.0%: '?'" in printed.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "maths"], "no environment 'maths' (did you mean 'math'?)"),
        (["show", "math", "--difficulty", "2"], "difficulty is 2.0; give a number from 0 to 1"),
        (["show", "math", "--split", "test"], "no split 'test'; there are train, held_out"),
        (["check", "math", "--num-tasks", "0"], "--num-tasks is 0"),
    ],
)
def test_bad_input_is_answered(capsys, arguments, said):
    status, printed = run(capsys, *arguments)
    assert status == 2
    assert said in printed.err


def test_an_action_is_needed(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["env"])
    assert "required: action" in capsys.readouterr().err
