"""`nemotron3 study`: claims put to the test, by many short trainings of equal cost."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from nemotron3.cli.tuning import watched
from nemotron3.errors import ConfigError
from nemotron3.recipes.load import load_recipe
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.studies.nvfp4 import NVFP4Study, nvfp4
from nemotron3.studies.nvfp4 import config as nvfp4_config
from nemotron3.studies.nvfp4 import page as nvfp4_page
from nemotron3.studies.simultaneous_rl import SimultaneousRL, simultaneous_rl
from nemotron3.studies.simultaneous_rl.config import full_study, quick_study
from nemotron3.studies.simultaneous_rl.page import verdicts
from nemotron3.studies.study import MARKDOWN_FILE, PAGE_FILE, RESULT_FILE

STUDIES = {
    "simultaneous-rl": "is it better to learn from all environments at once than in stages?",
    "nvfp4": "what does training in four bits cost, and what is each ingredient worth?",
}
StudyT = TypeVar("StudyT", SimultaneousRL, NVFP4Study)
_OPTIONS = {"num_seeds": "--seeds", "learning_rates": "--learning-rates"}
"""Fields whose options have other names."""


def study_command(known: argparse.Namespace) -> int:
    """List the studies, or carry one out."""
    if known.study == "list":
        for name, question in STUDIES.items():
            print(f"{name}  {question}")
        return 0
    study = chosen_study(known)
    try:
        found = watched(lambda callback: _carried_out(study, known, callback))
    except ConfigError as error:
        raise error.renamed({"jobs": "--jobs"}) from error
    folder: Path = known.runs / "studies" / study.name
    print("\n".join(["", *found, ""]))
    for what, file in (
        ("page", PAGE_FILE),
        ("tables", MARKDOWN_FILE),
        ("everything", RESULT_FILE),
    ):
        print(f"  {what:<11}{folder / file}")
    return 0


def _carried_out(
    study: SimultaneousRL | NVFP4Study, known: argparse.Namespace, callback: RunCallback
) -> list[str]:
    """The verdicts of a study, a line each."""
    given: dict[str, Any] = {"runs": known.runs, "callback": callback, "jobs": known.jobs}
    if isinstance(study, NVFP4Study):
        return nvfp4_page.verdicts(nvfp4(study, **given))
    return verdicts(simultaneous_rl(study, **given))


def chosen_study(known: argparse.Namespace) -> SimultaneousRL | NVFP4Study:
    """The study that a line describes."""
    if known.study == "nvfp4":
        quick, full = nvfp4_config.quick_study, nvfp4_config.full_study
        return _changed(
            (quick if known.quick else full)(load_recipe(known.recipe, PretrainRun)), known
        )
    study = (quick_study if known.quick else full_study)(known.model)
    return _changed(
        study,
        known,
        learning_rates=known.learning_rates and tuple(known.learning_rates),
        held_out_tasks=known.held_out_tasks,
    )


def _changed(study: StudyT, known: argparse.Namespace, **own: Any) -> StudyT:
    """The study with the values of options that were given; `own` are those of this study."""
    changes = {"name": known.name, "num_seeds": known.seeds, **own}
    changes = {name: value for name, value in changes.items() if value is not None}
    if known.steps is not None:
        changes |= {"steps": known.steps, "budget_s": None}
    if known.device is not None:
        changes["run"] = replace(study.run, device=known.device)
    try:
        return replace(study, **changes)
    except ConfigError as error:
        raise error.renamed(_OPTIONS) from error
