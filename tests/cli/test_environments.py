"""`nemotron3 env`: list, show, check, tasks, serve."""

import json

import pytest

from nemotron3.cli.main import main
from nemotron3.environments import BUILT_IN, load_environment
from nemotron3.environments.gym_protocol import gym_row
from nemotron3.server import running
from tests.environments.fake_gym import Answer, fake_server
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


def test_tasks_are_rows_of_nemo_gym(capsys, tmp_path):
    options = ("calculator", "--difficulty", "0.2", "--num-tasks", "3", "--seed", "5")
    status, printed = run(capsys, "tasks", *options)
    rows = [json.loads(line) for line in printed.out.splitlines()]
    environment = load_environment("calculator", difficulty=0.2)
    assert status == 0
    assert rows == [gym_row(environment.task(index, seed=5)) for index in range(3)]
    assert rows[0]["responses_create_params"]["tools"][0]["strict"] is False
    file = tmp_path / "folder" / "rows.jsonl"
    more = (
        "--output",
        str(file),
        "--agent",
        "calculator_agent",
        "--distinct",
        "--split",
        "held_out",
    )
    status, printed = run(capsys, "tasks", *options, *more)
    assert (status, printed.out) == (0, f"3 rows of calculator in {file}\n")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    prompts = [row["responses_create_params"]["input"][0]["content"] for row in rows]
    held_out = environment.distinct_tasks(3, seed=5)
    assert prompts == [row["responses_create_params"]["input"][0]["content"] for row in held_out]
    assert {row["agent_ref"]["name"] for row in rows} == {"calculator_agent"}


def test_tasks_of_a_server_are_shown(capsys, tmp_path):
    file = tmp_path / "rows.jsonl"
    run(capsys, "tasks", "math", "--num-tasks", "5", "--output", str(file))
    with fake_server(lambda _: Answer({"reward": 0.25})) as url:
        status, printed = run(capsys, "show", f"{file}@{url}", "--num-tasks", "1")
        assert status == 0
        assert "[user] " in printed.out
        assert "[no demonstration]" in printed.out
        run(capsys, "tasks", "math", "--num-tasks", "60", "--output", str(file))
        held_out = f"{file}@{url}?held_out={file}.held_out"
        options = ("--num-tasks", "9", "--split", "held_out", "--output", f"{file}.held_out")
        run(capsys, "tasks", "math", *options)
        status, printed = run(capsys, "check", held_out, "--num-tasks", "9")
    assert status == 0
    assert "  no demonstrations\n" in printed.out
    assert "    empty answer     0.250\n" in printed.out
    with fake_server(lambda _: Answer({})) as url:  # a verification without a reward
        held_out = f"{file}@{url}?held_out={file}.held_out"
        assert run(capsys, "check", held_out, "--num-tasks", "2")[0] == 1


def test_serve_waits_with_the_environment_and_its_limits(capsys, monkeypatch):
    served = []
    monkeypatch.setattr(
        running, "serve", lambda server, *_, **options: served.append((server, options))
    )
    limits = ("--max-sessions", "2", "--session-expiry", "7", "--drain-timeout", "3")
    status, printed = run(
        capsys, "serve", "calculator", "--difficulty", "0.1", "--port", "0", *limits
    )
    assert status == 0
    ((server, options),) = served
    assert (server.sessions._max_sessions, server.sessions._expiry_s) == (2, 7.0)
    assert options == {"drain_timeout_s": 3.0}
    assert "calculator at difficulty 0.1: http://127.0.0.1:" in printed.err
    assert run(capsys, "serve", "calculator", "--max-sessions", "0")[0] == 2
    status, printed = run(capsys, "serve", "guess_number")
    assert (status, "after a turn that calls no tool" in printed.err) == (2, True)
