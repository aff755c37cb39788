"""The study as one HTML file and as Markdown for the documentation: the same tables in both.

Everything is shown: every arm, every comparison, every cell, the failed ones too.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nemotron3.observe.page import captioned, section
from nemotron3.observe.plots import Range, Series, lines, ranges
from nemotron3.studies import tables as pages
from nemotron3.studies.judging import mean
from nemotron3.studies.nvfp4.arms import ABLATIONS, CHANGES, DESCRIPTIONS, Arm
from nemotron3.studies.nvfp4.cell import CellResult
from nemotron3.studies.nvfp4.findings import (
    Finding,
    Measure,
    closed_share,
    relative_differences,
)
from nemotron3.studies.nvfp4.ingredients import Rounding
from nemotron3.studies.nvfp4.plan import seen
from nemotron3.studies.nvfp4.result import StudyResult
from nemotron3.studies.study import counted, duration
from nemotron3.studies.tables import Rows, StudyPage, Table

TITLE = "Training in NVFP4, ingredient by ingredient"
_WORDS = {"arm", "claim", "verdict", "ended", "rounding", "matrix"}
"""Columns that are read as words."""
MEASURES: dict[Measure, str] = {
    "training": "in the precision of training",
    "unrounded": "of the finished model without rounding",
}
"""What the measures are of, in words."""
_PRODUCTS = ("fprop", "dgrad", "wgrad")


def write_page(path: Path, result: StudyResult) -> Path:
    """Write the HTML file, which needs no network."""
    figures = [
        captioned(
            f"Difference to the baseline, {words}",
            "Mean over seeds with its 95% interval; positive is a higher loss.",
            ranges(gap_ranges(result, measure), x_label="difference in loss, %"),
        )
        for measure, words in MEASURES.items()
    ]
    # A figure has fewer colours than there are arms.
    of_recipe = (Arm.RECIPE, *ABLATIONS)
    for shown, words in ((of_recipe, "without an ingredient"), (CHANGES, "with a change")):
        difference = lines(
            curves(result, shown), y_label="difference", is_percent=True, is_smoothed=False
        )
        growth = lines(zeros(result, shown), y_label="zeros", is_percent=True, is_smoothed=False)
        figures += [
            captioned(
                f"Difference to the baseline while training, {words}",
                "Held-out loss in the precision of training, mean over seeds.",
                difference,
            ),
            captioned(
                f"Zero gradients, {words}",
                "Share of zeros in the gradients of rounded products' weights, mean over seeds.",
                growth,
            ),
        ]
    return pages.write_study_page(path, page_of(result), result, section("Plots", figures))


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
    plan, training = result.plan, result.study.run.training
    taken = sum(cell.seconds for cell in result.cells) / plan.jobs
    return (
        f"{result.date}, commit {result.commit[:7]}: {len(result.cells)} cells of {plan.steps} "
        f"updates of {training.batch_size} x {training.seq_len} tokens, "
        f"{counted(plan.num_seeds, 'seed')}; what is not in few bits, and the baseline, in "
        f"{training.precision.activations}. {result.device}, {counted(plan.jobs, 'cell')} at once, "
        f"{duration(taken)}."
    )


def asked() -> list[str]:
    """The question and the arms, a sentence each."""
    question = (
        "How much loss does training in NVFP4 cost, which ingredient of the published recipe saves "
        "how much of it, and what do later proposals save? All arms of a seed have the same "
        "initial weights and the same batches."
    )
    return [question, *(f"{arm.value}: {what}." for arm, what in DESCRIPTIONS.items())]


def tables(result: StudyResult) -> list[Table]:
    """All tables, also those without rows."""
    shown: list[Table] = []
    for measure in MEASURES:
        shown += _comparisons(result, measure)
    shown += [
        Table(
            heading="Error and bias of each ingredient",
            caption="Relative squared error of one rounding, and of the mean over noise, of "
            "matrices that nobody trained. An estimate of a bias may be a little below 0.",
            rows=rounding_rows(result.roundings),
        ),
        Table(
            heading="Values that became zero",
            caption="Of the operands of each product, at the last measurement: mean over layers "
            "and seeds. Zero gradients: share of zeros in the gradients of rounded products' "
            "weights, at the first and the last measurement.",
            rows=flushed_rows(result.cells),
        ),
        Table(
            heading="Values that became zero, layer by layer",
            caption="Of the recipe, at the last measurement: mean over seeds.",
            rows=layer_rows(result.cells),
        ),
        Table(
            heading="Every cell",
            caption="Bits per byte of held-out text at the end.",
            rows=cell_rows(result.cells),
        ),
    ]
    return shown


def _comparisons(result: StudyResult, measure: Measure) -> list[Table]:
    words, effect = MEASURES[measure], result.study.smallest_effect

    def of(against: Arm) -> list[Finding]:
        return [f for f in result.findings if f.measure == measure and f.against is against]

    baseline = finding_rows(of(Arm.BASELINE))
    baseline[0].append("closes of the recipe's gap")
    for row, found in zip(baseline[1:], of(Arm.BASELINE), strict=True):
        share = closed_share(result.findings, measure, found.arm)
        row.append("" if share is None or found.arm not in CHANGES else f"{share:.0%}")
    return [
        Table(
            heading=f"Against the baseline, loss {words}",
            caption="Relative difference in held-out loss, paired over seeds; positive is a "
            "higher loss. The 95% interval is that of a comparison by itself; the one of the "
            "family holds for all at once, and with p (Holm) it decides the verdict on the claim. "
            "Does not hold: the opposite is significant, or a difference of "
            f"{effect:.1%} is excluded. Detectable: what so many seeds find with probability 0.8, "
            "with the deviation seen here.",
            rows=baseline,
        ),
        Table(
            heading=f"Against the recipe, loss {words}",
            caption="The same against the recipe, relative to the baseline's loss; a family of its "
            "own.",
            rows=finding_rows(of(Arm.RECIPE)),
        ),
    ]


def finding_rows(findings: Sequence[Finding]) -> Rows:
    """Comparisons, a row each."""
    head = ["arm", "seeds", "difference", "95% interval", "of the family", "p (Holm)"]
    head += ["detectable", "claim", "verdict"]
    return [
        head,
        *(
            [
                found.arm.value,
                str(found.num_seeds),
                f"{found.difference:+z.2%}",
                _interval(found.low, found.high),
                _interval(found.family_low, found.family_high),
                f"{found.p_value:.2g}",
                "" if found.detectable is None else f"{found.detectable:.2%}",
                found.claim,
                found.verdict,
            ]
            for found in findings
        ),
    ]


def rounding_rows(roundings: Sequence[Rounding]) -> Rows:
    """Error and bias, a row for each ingredient and matrix."""
    return [
        ["rounding", "matrix", "error", "bias", "became zero"],
        *(
            [r.ingredient, r.matrix, f"{r.error:.3%}", f"{r.bias:z.4%}", f"{r.flushed:.1%}"]
            for r in roundings
        ),
    ]


def flushed_rows(cells: Sequence[CellResult]) -> Rows:
    """Shares of values that became zero, a row for each arm that has any."""
    rows = [["arm", *_PRODUCTS, "zero gradients, first", "last"]]
    for arm in Arm:
        done = [cell for cell in cells if cell.cell.arm is arm and cell.zero_gradients]
        if not done:
            continue
        row = [arm.value]
        for product in _PRODUCTS:
            shares = [
                share
                for cell in done
                for name, share in cell.flushed.items()
                if name.startswith(product)
            ]
            row.append(f"{mean(shares):.1%}" if shares else "")
        row += [f"{mean([cell.zero_gradients[end].value for cell in done]):.2%}" for end in (0, -1)]
        rows.append(row)
    return rows


def layer_rows(cells: Sequence[CellResult]) -> Rows:
    """Shares of values that became zero in the recipe, a row for each layer with few bits."""
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for done in cells:
        if done.cell.arm is Arm.RECIPE:
            for name, share in done.flushed.items():
                product, _, layer = name.partition("_layer_")
                shares[layer, product].append(share)
    layers = sorted({layer for layer, _ in shares})
    return [
        ["layer", *_PRODUCTS],
        *(
            [str(int(layer)), *(f"{mean(shares[layer, product]):.1%}" for product in _PRODUCTS)]
            for layer in layers
        ),
    ]


def cell_rows(cells: Sequence[CellResult]) -> Rows:
    """Every cell, whether it came to its end or not."""
    rows = [["seed", "arm", "in training", "without rounding", "seconds", "ended"]]
    for done in cells:
        last = done.bits_per_byte[-1].value if done.bits_per_byte and not done.failure else None
        rows.append(
            [
                str(done.cell.seed),
                done.cell.arm.value,
                "" if last is None else f"{last:.4f}",
                "" if done.unrounded is None else f"{done.unrounded:.4f}",
                f"{done.seconds:,.0f}",
                "finished" if done.failure is None else done.failure,
            ]
        )
    return rows


def gap_ranges(result: StudyResult, measure: Measure) -> list[Range]:
    """Each arm's difference to the baseline in percent, with its interval."""
    return [
        Range(
            label=found.arm.value,
            value=100 * found.difference,
            low=100 * found.low,
            high=100 * found.high,
            is_strong=found.verdict == "holds",
        )
        for found in result.findings
        if found.measure == measure and found.against is Arm.BASELINE
    ]


def curves(result: StudyResult, arms: Sequence[Arm]) -> list[Series]:
    """Each arm's difference to the baseline by updates: the mean over seeds."""
    losses: dict[int, dict[tuple[Arm, int], float]] = defaultdict(dict)
    for done in result.cells:
        if done.failure is None:
            for point in done.bits_per_byte:
                losses[point.step][done.cell.arm, done.cell.seed] = point.value
    return _series(
        {
            arm: {step: relative_differences(at, arm, Arm.BASELINE) for step, at in losses.items()}
            for arm in arms
        }
    )


def zeros(result: StudyResult, arms: Sequence[Arm]) -> list[Series]:
    """Each arm's zeros in gradients by updates: the mean over seeds."""
    values: dict[Arm, dict[int, list[float]]] = {arm: defaultdict(list) for arm in arms}
    for done in result.cells:
        if done.failure is None and done.cell.arm in values:
            for point in done.zero_gradients:
                values[done.cell.arm][point.step].append(point.value)
    return _series(values)


def _series(values: Mapping[Arm, Mapping[int, Sequence[float]]]) -> list[Series]:
    """Means by updates, a curve for each arm that has any."""
    found: list[Series] = []
    for arm, by_step in values.items():
        steps = sorted(step for step, of_seeds in by_step.items() if of_seeds)
        if steps:
            means = np.array([mean(by_step[step]) for step in steps])
            found.append(Series(label=arm.value, steps=np.array(steps, float), values=means))
    return found


def verdicts(result: StudyResult) -> list[str]:
    """Every comparison in the precision of training, a line each, for a terminal."""
    return [
        f"{found.arm} against {found.against}: {found.difference:+z.2%} "
        f"{_interval(found.low, found.high)}; the loss is {found.claim}: {found.verdict}"
        for found in result.findings
        if found.measure == "training"
    ]


def _interval(low: float, high: float) -> str:
    return "" if math.isinf(low) else f"{low:+.2%} to {high:+.2%}"
