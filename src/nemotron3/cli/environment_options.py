"""Options of `nemotron3 env`."""

import argparse
from pathlib import Path

from nemotron3.cli.option_types import seconds


def add_environment_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb `env` and its actions."""
    env = verbs.add_parser(
        "env",
        help="environments for reinforcement learning: list, show, check, serve",
        description="Environments for reinforcement learning: tasks, tools and rewards. NAME is a "
        "built-in one, a Python file with your own, or ROWS@URL, a file of rows and the resources "
        "server of NeMo Gym that verifies them, such as train.jsonl@http://127.0.0.1:8001.",
    )
    actions = env.add_subparsers(dest="action", metavar="action", required=True)
    actions.add_parser("list", help="the built-in environments")
    show = actions.add_parser("show", help="a few tasks, with a right solution of each")
    check = actions.add_parser(
        "check",
        help="play solutions and hacks, and count prompts and answers",
        description="Look an environment over before a model trains on it: are its own solutions "
        "rewarded, and hacks not; are there prompts enough; can the answer be guessed? Ends with "
        "status 1 where a solution is not rewarded, and without solutions where something fails.",
    )
    solved = actions.add_parser(
        "demonstrations",
        help="solved tasks as conversations, for `nemotron3 sft --data`",
        description="Print solved tasks as JSON lines of conversations, which "
        "`nemotron3 sft MODEL --data FILE` trains on.",
    )
    tasks = actions.add_parser(
        "tasks",
        help="tasks as rows of NeMo Gym",
        description="Write tasks as JSON lines, in the format of NeMo Gym's rows.",
    )
    served = actions.add_parser(
        "serve",
        help="serve the environment over HTTP, as a resources server of NeMo Gym",
        description="Serve the environment over HTTP: /seed_session, an address for each tool, "
        "/verify, as NeMo Gym's agents call them. `nemotron3 env tasks NAME` writes the rows.",
    )
    for action in (show, check, solved, tasks, served):
        action.add_argument("name", metavar="NAME", help="such as math, or my_env.py")
        action.add_argument("--difficulty", type=float, metavar="D", help="0 to 1 (default 0.5)")
    for action, num_tasks in ((show, 3), (check, 300), (solved, 1000), (tasks, 1000)):
        action.add_argument("--seed", type=int, default=0, help="default 0")
        action.add_argument(
            "--num-tasks", type=int, default=num_tasks, metavar="N", help=f"default {num_tasks}"
        )
    solved.add_argument(
        "--with-tools", action="store_true", help="describe the tools in every conversation"
    )
    tasks.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    tasks.add_argument(
        "--agent", metavar="NAME", help="the agent in `agent_ref` (default: the environment's name)"
    )
    tasks.add_argument("--distinct", action="store_true", help="no prompt twice")
    _add_env_serve(served)
    for action in (show, solved, tasks):
        action.add_argument("--split", default="train", help="train or held_out (default train)")


def _add_env_serve(served: argparse.ArgumentParser) -> None:
    served.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for everyone (default 127.0.0.1)"
    )
    served.add_argument("--port", type=int, default=8001, help="0 for any (default 8001)")
    served.add_argument(
        "--max-sessions",
        type=int,
        default=4096,
        metavar="N",
        help="rollouts at the same time; beyond that, 503 (default 4096)",
    )
    served.add_argument(
        "--session-expiry",
        type=seconds,
        default=3600.0,
        metavar="S",
        help="seconds without a request after which a rollout is forgotten (default 3600)",
    )
    served.add_argument(
        "--drain-timeout",
        type=seconds,
        default=10.0,
        metavar="S",
        help="seconds that SIGTERM leaves to the requests in flight (default 10)",
    )
    served.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="default text"
    )
