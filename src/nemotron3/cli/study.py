"""`nemotron3 study`: claims put to the test, by many short trainings of equal cost."""

import argparse
from dataclasses import replace
from pathlib import Path

from nemotron3.cli.tuning import watched
from nemotron3.errors import ConfigError
from nemotron3.studies.simultaneous_rl import SimultaneousRL, simultaneous_rl
from nemotron3.studies.simultaneous_rl.config import full_study, quick_study
from nemotron3.studies.simultaneous_rl.page import verdicts
from nemotron3.studies.study import MARKDOWN_FILE, PAGE_FILE, RESULT_FILE

STUDIES = {
    "simultaneous-rl": "is it better to learn from all environments at once than in stages?",
}


def study_command(known: argparse.Namespace) -> int:
    """List the studies, or carry one out."""
    if known.study == "list":
        for name, question in STUDIES.items():
            print(f"{name}  {question}")
        return 0
    study = chosen_study(known)
    try:
        result = watched(
            lambda callback: simultaneous_rl(
                study, runs=known.runs, callback=callback, jobs=known.jobs
            )
        )
    except ConfigError as error:
        raise error.renamed({"jobs": "--jobs"}) from error
    folder: Path = known.runs / "studies" / study.name
    print("\n".join(["", *verdicts(result), ""]))
    for what, file in (
        ("page", PAGE_FILE),
        ("tables", MARKDOWN_FILE),
        ("everything", RESULT_FILE),
    ):
        print(f"  {what:<11}{folder / file}")
    return 0


def chosen_study(known: argparse.Namespace) -> SimultaneousRL:
    """The study that a line describes."""
    study = (quick_study if known.quick else full_study)(known.model)
    changes = {
        "name": known.name,
        "num_seeds": known.seeds,
        "learning_rates": known.learning_rates and tuple(known.learning_rates),
        "held_out_tasks": known.held_out_tasks,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if known.steps is not None:
        changes |= {"steps": known.steps, "budget_s": None}
    if known.device is not None:
        changes["run"] = replace(study.run, device=known.device)
    try:
        return replace(study, **changes)
    except ConfigError as error:
        raise error.renamed(
            {"num_seeds": "--seeds", "learning_rates": "--learning-rates"}
        ) from error
