"""The options of `nemotron3 study`; importing them loads no PyTorch."""

import argparse
from pathlib import Path

_EPILOG = """\
A study is many short trainings, its cells. Each is finished once: the command that was interrupted
goes on where it was, and with more --seeds it adds the cells that are missing (not with --quick,
where they decide how many updates fit).
The number of cells, how long they take on this machine, and the smallest effect that so many seeds
can show are said before the first one begins.

  nemotron3 study NAME --quick         under 20 minutes on two cores
  nemotron3 study NAME                 the whole study: hours
  nemotron3 study NAME --seeds 10      more seeds of a study that has fewer
"""

_SIMULTANEOUS_RL = """\
Is it better to learn from all environments at once than from one after another? Trains the same
model at once, at once with a curriculum, in stages in two orders, and in stages with replay, all
with equal updates and rollouts, and compares reward, forgetting, stability and signs of hacking.
"""

_NVFP4 = """\
What does training in NVFP4 cost, and what is each ingredient worth? Trains the tiny model without
rounding, with the published recipe, without each of its ingredients, and with later proposals, all
from the same initial weights and on the same batches, and compares the loss on held-out text.
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
    _add_simultaneous_rl(studies)
    _add_nvfp4(studies)


def _add_simultaneous_rl(studies: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = _add_study(
        studies,
        "simultaneous-rl",
        help="reinforcement learning in all environments at once, or in stages",
        description=_SIMULTANEOUS_RL,
        quick="four environments, one learning rate, three seeds",
        seeds="default 4; --quick: 3",
        steps="a multiple of the number of environments (default 90; --quick: what fits)",
    )
    one.add_argument(
        "--model",
        default="runs/tiny-sft/model",
        metavar="PATH",
        help="a model that answers, which every cell starts from (default runs/tiny-sft/model, "
        "which `make run STAGE=sft` makes)",
    )
    one.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        metavar="LR",
        help="peak learning rates (default 1e-4 3e-4 1e-3; --quick: 3e-4); more of them add cells",
    )
    one.add_argument(
        "--held-out-tasks",
        type=int,
        metavar="N",
        help="of each environment, played after every stage (default 100; --quick: 60)",
    )


def _add_nvfp4(studies: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = _add_study(
        studies,
        "nvfp4",
        help="training in four bits: what each ingredient is worth",
        description=_NVFP4,
        quick="three seeds",
        seeds="default 8; --quick: 3",
        steps="default half of the recipe's, 600 of tiny; --quick: what fits",
    )
    one.add_argument(
        "--recipe",
        default="tiny",
        metavar="NAME",
        help="the pre-training recipe, or a Python file with one, whose model and text are trained "
        "(default tiny)",
    )


def _add_study(
    studies: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    *,
    help: str,
    description: str,
    quick: str,
    seeds: str,
    steps: str,
) -> argparse.ArgumentParser:
    """The action of a study, with the options that all of them have."""
    one = studies.add_parser(
        name,
        help=help,
        description=description,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument(
        "--quick", action="store_true", help=f"{quick}, as many updates as fit 20 minutes"
    )
    one.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of all runs (default runs)"
    )
    one.add_argument("--name", help="folder in RUNS/studies (default: the study's name)")
    one.add_argument("--seeds", type=int, metavar="N", help=f"repetitions ({seeds})")
    one.add_argument("--steps", type=int, metavar="N", help=f"updates of a cell ({steps})")
    one.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="cells that are trained at once, each with its share of the processors (default one "
        "on each processor, or one on a GPU)",
    )
    one.add_argument("--device", help="auto, cpu or cuda (default auto)")
    return one
