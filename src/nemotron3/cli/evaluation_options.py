"""Options of `nemotron3 eval` and `nemotron3 compare`."""

import argparse
from pathlib import Path

from nemotron3.cli.engine_options import add_adapter_option

_EVAL_EPILOG = """\
examples:
  nemotron3 eval runs/tiny-rl/model --environment math --environment lookup=0.2
  nemotron3 eval runs/tiny-rl/model --environment all --num-tasks 500 --json after.json
  nemotron3 eval runs/tiny/model --data held-out.txt --data notes/
  nemotron3 eval runs/tiny/model --tasks my_task --include-path tasks/

The same --seed gives the same tasks for every model, so that results can be compared task by task:
  nemotron3 compare before.json after.json
"""

_COMPARE_EPILOG = """\
examples:
  nemotron3 compare runs/tiny runs/other           two runs: results, and their curves in one page
  nemotron3 compare before.json after.json         two evaluations, task by task
  nemotron3 compare sft.json rl.json staged.json   each against the first

Where two have rewards of the same tasks they are tested in pairs (McNemar, or sign flips), with
Holm's correction over all tests of the call. A verdict is one of "holds", "does not hold" and
"cannot be told", about the claim that the later is better than the first.
"""


def add_eval_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb `eval`."""
    verb = verbs.add_parser(
        "eval",
        help="measure a model: environments, held-out text, public tasks",
        description="Measure a model directory in this process, without a server: rewards on\n"
        "held-out tasks of environments, bits per byte of text, tasks of lm-evaluation-harness.",
        epilog=_EVAL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("path", type=Path, help="a model directory, such as runs/tiny/model")
    verb.add_argument(
        "--json", type=Path, metavar="OUT", help="write everything, every task's reward included"
    )
    add_adapter_option(verb)
    verb.add_argument("--seed", type=int, help="of tasks and sampling (default: as in `rl`)")
    verb.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    verb.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="what the weights are held in (default auto: as they are stored)",
    )
    verb.add_argument(
        "--max-num-seqs", type=int, default=128, metavar="N", help="answers at once (default 128)"
    )
    _add_environment_options(verb.add_argument_group("environments"))
    text = verb.add_argument_group("text")
    text.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help="held-out text, whose bits per byte are measured: a file, folder or glob of plain "
        "text, JSON lines or Parquet (may be repeated)",
    )
    text.add_argument(
        "--column", default="text", help="the text's field in JSON lines and Parquet (default text)"
    )
    text.add_argument(
        "--seq-len", type=int, default=1024, metavar="N", help="tokens of a window (default 1024)"
    )
    harness = verb.add_argument_group("lm-evaluation-harness")
    harness.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks by name")
    harness.add_argument(
        "--include-path", type=Path, metavar="DIR", help="a folder with task files of your own"
    )
    harness.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved questions before each"
    )
    harness.add_argument("--limit", type=int, metavar="N", help="the first N questions of each")


def _add_environment_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--environment",
        action="append",
        metavar="NAME[=DIFFICULTY]",
        help="a built-in environment, your own (a Python file), or all (may be repeated)",
    )
    group.add_argument(
        "--difficulty",
        type=float,
        metavar="D",
        help="of the environments that name none, 0 to 1 (default: their own)",
    )
    group.add_argument(
        "--num-tasks",
        type=int,
        default=300,
        metavar="N",
        help="different held-out tasks of each (default 300)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0 takes the likeliest token (default 1: samples, as `rl` does)",
    )
    group.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="of a turn (default 256)"
    )
    group.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="of a whole rollout, prompt included (default: 1024, or the model's limit if less)",
    )
    group.add_argument("--no-think", action="store_true", help="answer without thinking")
    group.add_argument("--budget", type=int, metavar="N", help="most tokens of thinking in a turn")
    group.add_argument(
        "--chat-style",
        metavar="NAME",
        help="nano, super, ultra, lightning or tiny (default: the model's)",
    )


def add_compare_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb `compare`."""
    verb = verbs.add_parser(
        "compare",
        help="put runs and evaluations side by side",
        description="Put runs (runs/NAME, by pretrain, sft or rl) and evaluations (what `eval`\n"
        "writes with --json) side by side: a table here, and one HTML file with all curves.",
        epilog=_COMPARE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a file")
    verb.add_argument(
        "--out",
        type=Path,
        default=Path("compare.html"),
        metavar="HTML",
        help="the page (default compare.html)",
    )
    verb.add_argument(
        "--smallest-effect",
        type=float,
        default=0.05,
        metavar="D",
        help="the smallest gain of mean reward, or of bits per byte, that would matter; a claim "
        "does not hold where the interval excludes it (default 0.05)",
    )
    verb.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        help="chance of a wrong finding among all of them (default 0.05)",
    )
