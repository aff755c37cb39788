"""The options of `nemotron3 study`; importing them loads no PyTorch."""

import argparse
from pathlib import Path

_EPILOG = """\
A study is many short trainings, its cells. Each is finished once: the command that was interrupted
goes on where it was, and with more --seeds or --learning-rates it adds the cells that are missing
(not with --quick, where they decide how many updates fit).
The number of cells, how long they take on this machine, and the smallest effect that so many seeds
can show are said before the first one begins.

  nemotron3 study simultaneous-rl --quick         under 20 minutes on two cores
  nemotron3 study simultaneous-rl                 the whole sweep: hours
  nemotron3 study simultaneous-rl --seeds 6       two more seeds of a study that has four
"""

_SIMULTANEOUS_RL = """\
Is it better to learn from all environments at once than from one after another? Trains the same
model at once, at once with a curriculum, in stages in two orders, and in stages with replay, all
with equal updates and rollouts, and compares reward, forgetting, stability and signs of hacking.
"""


def add_study_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb, with one action for each study."""
    study = verbs.add_parser(
        "study",
        help="put a claim to the test: many short trainings, compared",
        description="Claims put to the test by many short trainings of equal cost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    studies = study.add_subparsers(dest="study", metavar="study", required=True)
    studies.add_parser("list", help="the studies there are")
    one = studies.add_parser(
        "simultaneous-rl",
        help="reinforcement learning in all environments at once, or in stages",
        description=_SIMULTANEOUS_RL,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument(
        "--model",
        default="runs/tiny-sft/model",
        metavar="PATH",
        help="a model that answers, which every cell starts from (default runs/tiny-sft/model, "
        "which `make run STAGE=sft` makes)",
    )
    one.add_argument(
        "--quick",
        action="store_true",
        help="four environments, one learning rate, three seeds, as many updates as fit 20 minutes",
    )
    one.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of all runs (default runs)"
    )
    one.add_argument("--name", help="folder in RUNS/studies (default: the study's name)")
    one.add_argument("--seeds", type=int, metavar="N", help="repetitions (default 4; --quick: 3)")
    one.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="updates of a cell, a multiple of the number of environments (default 90; --quick: "
        "what fits)",
    )
    one.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        metavar="LR",
        help="peak learning rates (default 1e-4 3e-4 1e-3; --quick: 3e-4)",
    )
    one.add_argument(
        "--held-out-tasks",
        type=int,
        metavar="N",
        help="of each environment, played after every stage (default 100; --quick: 60)",
    )
    one.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="cells that are trained at once, each with its share of the processors (default one "
        "on each processor, or one on a GPU)",
    )
    one.add_argument("--device", help="auto, cpu or cuda (default auto)")
