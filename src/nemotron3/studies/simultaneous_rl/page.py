"""The study as one HTML file and as Markdown for the documentation: the same tables in both.

Everything is shown: every learning rate, every cell, the failed ones too, and comparisons that the
claim does not survive.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nemotron3.observe.page import captioned, section
from nemotron3.observe.plots import Figure, Series, lines
from nemotron3.studies import tables as pages
from nemotron3.studies.judging import mean
from nemotron3.studies.simultaneous_rl.arms import DESCRIPTIONS, Arm
from nemotron3.studies.simultaneous_rl.cell import CellResult, Evaluation, Score
from nemotron3.studies.simultaneous_rl.findings import Finding, measures_of
from nemotron3.studies.simultaneous_rl.plan import seen
from nemotron3.studies.simultaneous_rl.result import StudyResult
from nemotron3.studies.study import counted, duration
from nemotron3.studies.tables import Rows, StudyPage, Table

TITLE = "All environments at once, or one after another"
_MEASURES = {
    "reward": "final mean reward",
    "forgetting": "forgetting",
    "worst_change": "worst change of an environment",
    "most_common_rise": "rise of the most common answer",
    "max_grad_norm": "largest gradient norm",
}
_WORDS = {"learning rate", "measure", "arm", "compared with", "better", "at least as good", "ended"}
"""Columns that are read as words."""


def write_study_page(path: Path, result: StudyResult) -> Path:
    """Write the HTML file, which needs no network."""
    figures = "".join(
        section(f"Held-out reward at learning rate {rate:g}", _figures(result, rate))
        for rate in result.study.learning_rates
    )
    return pages.write_study_page(path, page_of(result), result, figures)


def as_markdown(result: StudyResult) -> str:
    """The tables and what is needed to read them."""
    return pages.as_markdown(page_of(result), result.command)


def page_of(result: StudyResult) -> StudyPage:
    """What both forms of the page show."""
    return StudyPage(
        title=TITLE,
        origin=origin(result),
        asked=asked(),
        seen=f"{seen(result.plan)}.",
        tables=tables(result),
        words=_WORDS,
    )


def origin(result: StudyResult) -> str:
    """What was trained, where and when."""
    study, plan = result.study, result.plan
    taken = sum(cell.seconds for cell in result.cells) / plan.jobs
    return (
        f"{result.date}, commit {result.commit[:7]}: {study.run.model}, {len(result.cells)} cells "
        f"of {plan.steps} updates of {study.run.training.batch_size} rollouts in "
        f"{study.num_stages} environments, {counted(plan.num_seeds, 'seed')}. {result.device}, "
        f"{counted(plan.jobs, 'cell')} at once, {duration(taken)}."
    )


def asked() -> list[str]:
    """The claim and the arms, a sentence each."""
    claim = (
        "The white paper (section 2.6) claims that training on all environments simultaneously is "
        "more stable, less prone to reward hacking and better than stages one after another. All "
        "cells start from the same model and have the same number of updates and rollouts."
    )
    return [claim, *(f"{arm.value}: {what}." for arm, what in DESCRIPTIONS.items())]


def tables(result: StudyResult) -> list[Table]:
    """All tables, also those without rows."""
    study = result.study
    primary = [finding for finding in result.findings if finding.is_primary]
    others = [finding for finding in result.findings if not finding.is_primary]
    return [
        Table(
            heading="The claim",
            caption="Trained at once against the mean of both staged orders, paired over seeds. A "
            "positive difference is in favour of training at once. At least as good: a loss of "
            f"{study.smallest_effect:g} is excluded.",
            rows=finding_rows(primary),
        ),
        Table(
            heading="Other comparisons",
            caption="A family of their own.",
            rows=finding_rows(others),
        ),
        Table(
            heading="Final reward by environment",
            caption="Held-out tasks sampled at temperature 1, mean over seeds.",
            rows=score_rows(result, lambda score: score.reward),
        ),
        Table(
            heading="Share of the most common answer",
            caption="Where it rises above that of the model before, a policy may have learned one "
            "answer for all tasks.",
            rows=score_rows(result, lambda score: score.most_common),
        ),
        Table(
            heading="Every cell",
            caption="Forgetting is the mean over environments of the highest reward at any "
            "evaluation minus the final one. Rollouts in groups of equal rewards teach nothing.",
            rows=cell_rows(result.cells),
        ),
    ]


def finding_rows(findings: Sequence[Finding]) -> Rows:
    """Comparisons, a row each."""
    head = ["learning rate", "measure", "arm", "compared with", "seeds", "arm's", "the other's"]
    head += ["difference", "p (Holm)", "better", "at least as good"]
    return [
        head,
        *(
            [
                f"{found.learning_rate:g}",
                _MEASURES[found.measure],
                found.second,
                found.first,
                str(found.num_seeds),
                f"{found.second_mean:z.3f}",
                f"{found.first_mean:z.3f}",
                _interval(found),
                f"{found.p_value:.2g}",
                found.better,
                found.at_least_as_good,
            ]
            for found in findings
        ),
    ]


def score_rows(result: StudyResult, value: Callable[[Score], float]) -> Rows:
    """A number of each environment at the end, for each learning rate and arm."""
    start = result.timing.start
    names = list(start.scores)
    rows = [["learning rate", "arm", *names, "mean"]]
    rows.append(["", "before", *_numbers([value(start.scores[name]) for name in names])])
    for rate in result.study.learning_rates:
        for arm in Arm:
            ends = [cell.evaluations[-1] for cell in _finished(result, rate, arm)]
            if ends:
                means = [mean([value(end.scores[name]) for end in ends]) for name in names]
                rows.append([f"{rate:g}", arm.value, *_numbers(means)])
    return rows


def cell_rows(cells: Sequence[CellResult]) -> Rows:
    """Every cell, whether it came to its end or not."""
    head = ["learning rate", "seed", "arm", "reward", "worst change", "forgetting"]
    head += ["most common answer", "equal rewards", "largest gradient norm", "rollouts"]
    head += ["of profiling", "tokens", "seconds", "ended"]
    rows = [head]
    for done in cells:
        measured = ["", "", "", ""]
        largest = ""
        if done.failure is None:
            found = measures_of(done)
            largest = f"{found.max_grad_norm:.2f}"
            measured = [
                f"{found.reward:.3f}",
                f"{found.worst_change:+z.3f}",
                f"{found.forgetting:.3f}",
                f"{found.most_common_rise:+z.3f}",
            ]
        rows.append(
            [
                f"{done.cell.learning_rate:g}",
                str(done.cell.seed),
                done.cell.arm.value,
                *measured,
                f"{done.without_variance:.0%}",
                largest,
                f"{done.rollouts:,}",
                f"{done.profiling_rollouts:,}",
                f"{done.tokens:,}",
                f"{done.seconds:,.0f}",
                "finished" if done.failure is None else done.failure,
            ]
        )
    return rows


def curves(result: StudyResult, rate: float, value: Callable[[Evaluation], float]) -> list[Series]:
    """A number of every evaluation by updates, an arm each: the mean over finished cells."""
    found: list[Series] = []
    for arm in Arm:
        cells = _finished(result, rate, arm)
        if cells:
            updates = [float(evaluation.updates) for evaluation in cells[0].evaluations]
            values = [[value(evaluation) for evaluation in done.evaluations] for done in cells]
            means = np.mean(values, axis=0)
            found.append(Series(label=arm.value, steps=np.array(updates), values=means))
    return found


def verdicts(result: StudyResult) -> list[str]:
    """The claim at each learning rate, a line each, for a terminal."""
    return [
        f"learning rate {found.learning_rate:g}, {_MEASURES[found.measure]}: "
        f"{found.second_mean:z.3f} against {found.first_mean:z.3f}, {_interval(found)}; "
        f"better: {found.better}; at least as good: {found.at_least_as_good}"
        for found in result.findings
        if found.is_primary
    ]


def _interval(found: Finding) -> str:
    if math.isinf(found.low):
        return f"{found.difference:+z.3f}"
    return f"{found.difference:+z.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _finished(result: StudyResult, rate: float, arm: Arm) -> list[CellResult]:
    return [
        done
        for done in result.cells
        if (done.cell.learning_rate, done.cell.arm) == (rate, arm) and done.failure is None
    ]


def _figures(result: StudyResult, rate: float) -> list[str]:
    mean = captioned(
        "Mean of the environments",
        "Mean over seeds; every point is a stage.",
        _curves(result, rate, lambda evaluation: evaluation.mean),
    )
    return [
        mean,
        *(
            captioned(
                name,
                "",
                _curves(result, rate, lambda evaluation, name=name: evaluation.scores[name].reward),
            )
            for name in result.timing.start.scores
        ),
    ]


def _curves(
    result: StudyResult, rate: float, value: Callable[[Evaluation], float]
) -> Figure | None:
    found = curves(result, rate, value)
    return lines(found, y_label="reward", is_smoothed=False)


def _numbers(values: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" for value in (*values, mean(values))]
