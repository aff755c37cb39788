"""Measures and verdicts of cells, against values computed by hand; the budget; the pages."""

import math
from dataclasses import replace

import pytest
from benchmarks.drawing import BLUE, GREEN
from benchmarks.studies import STUDIES, draw_simultaneous_rl, read_result

from nemotron3.config import write_json
from nemotron3.recipes.rl import tiny_rl
from nemotron3.studies.simultaneous_rl.arms import Arm, Cell
from nemotron3.studies.simultaneous_rl.cell import CellResult
from nemotron3.studies.simultaneous_rl.config import SimultaneousRL, quick_study
from nemotron3.studies.simultaneous_rl.findings import findings_of, measures_of, smallest_effect
from nemotron3.studies.simultaneous_rl.page import as_markdown, verdicts, write_study_page
from nemotron3.studies.simultaneous_rl.plan import Timing, cell_s, make_plan, statement
from nemotron3.studies.simultaneous_rl.result import StudyResult
from tests.studies.toy import evaluation

START = evaluation(0, a=(0.5, 0.2), b=(0.8, 0.1))


def result_of(*evaluations, arm=Arm.STAGED, seed=0, rate=1e-3, failure=None):
    return CellResult(
        cell=Cell(arm=arm, learning_rate=rate, seed=seed),
        failure=failure,
        evaluations=(START, *evaluations),
        rollouts=32,
        profiling_rollouts=0,
        tokens=100,
        without_variance=0.25,
        grad_norms=(1.0, 3.0, 2.0),
        seconds=5.0,
    )


def study_of(**changes):
    run = tiny_rl()
    batch = 36 * run.group_size
    training = replace(run.training, batch_size=batch, microbatch_size=batch)
    run = replace(run, environments=run.environments[:2], training=training)
    return SimultaneousRL(run=run, steps=2, learning_rates=(1e-3,), **changes)


def test_measures_are_those_computed_by_hand():
    found = measures_of(
        result_of(
            evaluation(1, a=(0.9, 0.1), b=(0.6, 0.3)), evaluation(2, a=(0.7, 0.15), b=(0.7, 0.6))
        )
    )
    assert found.reward == pytest.approx(0.7)
    assert found.worst_change == pytest.approx(-0.1)  # b: .7 - .8
    assert found.forgetting == pytest.approx((0.9 - 0.7 + 0.8 - 0.7) / 2)  # b was best at first
    assert found.most_common_rise == pytest.approx(0.5)
    assert found.max_grad_norm == 3.0


def sweep(simultaneous, staged, *, rate=1e-3):
    """Cells whose final reward in both environments is given by seed."""
    cells = []
    for arm in Arm:
        values = simultaneous if arm in (Arm.SIMULTANEOUS, Arm.CURRICULUM) else staged
        cells += [
            result_of(evaluation(2, a=value, b=value), arm=arm, seed=seed, rate=rate)
            for seed, value in enumerate(values)
        ]
    return cells


def claim(cells, measure="reward", **changes):
    found = findings_of(study_of(**changes), cells)
    return next(each for each in found if each.is_primary and each.measure == measure)


def test_a_clear_difference_holds_and_its_opposite_does_not():
    high, low = (0.90, 0.91, 0.92), (0.70, 0.705, 0.73)
    better = claim(sweep(high, low))
    assert (better.better, better.at_least_as_good, better.num_seeds) == ("holds", "holds", 3)
    assert better.difference == pytest.approx((0.2 + 0.205 + 0.19) / 3)
    assert better.low < better.difference < better.high
    worse = claim(sweep(low, high))
    assert (worse.better, worse.at_least_as_good) == ("does not hold", "does not hold")
    # b begins at .8, so ending at .9 forgets nothing and ending at .7 forgets .1: better is less.
    forgetting = claim(sweep(high, low), "forgetting")
    assert forgetting.second_mean == pytest.approx(0.0)
    assert forgetting.first_mean == pytest.approx((0.1 + 0.095 + 0.07) / 2 / 3)
    assert forgetting.difference == pytest.approx(forgetting.first_mean)


def test_equal_arms_are_as_good_and_not_better():
    found = claim(sweep((0.8, 0.7, 0.75), (0.801, 0.6995, 0.7505)))
    assert (found.better, found.at_least_as_good) == ("does not hold", "holds")


def test_noise_and_single_seeds_cannot_be_told():
    found = claim(sweep((0.9, 0.6, 0.8), (0.7, 0.8, 0.6)))
    assert (found.better, found.at_least_as_good) == ("cannot be told", "cannot be told")
    single = claim(sweep((0.9,), (0.7,)))
    assert (single.better, single.at_least_as_good) == ("cannot be told", "cannot be told")
    assert math.isinf(single.high)


def test_staged_is_the_mean_of_both_orders_and_failed_cells_are_in_no_pair():
    cells = sweep((0.9, 0.9, 0.8), (0.7, 0.7, 0.6))
    at = next(
        i
        for i, done in enumerate(cells)
        if done.cell.arm is Arm.STAGED_REVERSED and done.cell.seed == 0
    )
    cells[at] = result_of(evaluation(2, a=0.5, b=0.5), arm=Arm.STAGED_REVERSED, seed=0)
    assert claim(cells).first_mean == pytest.approx((0.6 + 0.7 + 0.6) / 3)
    cells[at] = replace(cells[at], failure="DivergenceError: nan")
    found = claim(cells)
    assert found.num_seeds == 2
    assert found.first_mean == pytest.approx(0.65)


def test_every_learning_rate_is_published():
    cells = sweep((0.9, 0.8), (0.7, 0.75)) + sweep((0.6, 0.5), (0.7, 0.75), rate=1e-4)
    study = replace(study_of(), learning_rates=(1e-4, 1e-3))
    result = published(cells, study)
    assert [found.learning_rate for found in result.findings if found.is_primary] == [
        1e-4,
        1e-4,
        1e-3,
        1e-3,
    ]
    assert len(verdicts(result)) == 4


TIMING = Timing(start=START, evaluation_s=1.0, update_s=0.5, run_s=2.0)


def published(cells, study):
    return StudyResult(
        command="nemotron3 study simultaneous-rl",
        date="2026-11-30",
        commit="0123456789",
        device="a <CPU>",
        study=study,
        timing=TIMING,
        plan=make_plan(study, TIMING, jobs=2),
        cells=tuple(cells),
        findings=tuple(findings_of(study, cells)),
    )


def test_costs_are_counted_by_hand():
    study = study_of()  # 36 prompts x 8, two environments
    assert cell_s(study, TIMING, Arm.SIMULTANEOUS, 2) == 2 * 0.5 + 2 * 1.0 + 2.0
    assert cell_s(study, TIMING, Arm.STAGED, 2) == 2 * 0.5 + 2 * 1.0 + 2 * 2.0
    profiling = 2 * 128 * 4 / 288
    assert cell_s(study, TIMING, Arm.CURRICULUM, 2) == pytest.approx((2 + profiling) * 0.5 + 4.0)


@pytest.mark.parametrize("update_s", [0.01, 0.3, 3.0, 60.0])
def test_a_budget_decides_updates_and_seeds(update_s):
    study = quick_study("model")
    timing = replace(TIMING, update_s=update_s)
    plan = make_plan(study, timing, jobs=2)
    assert plan.steps % study.num_stages == 0
    if plan.expected_s > study.budget_s:
        assert (plan.num_seeds, plan.steps) == (1, study.num_stages)
        assert "too slow for 16 min" in statement(study, timing, plan)[-1]
    else:
        longer = replace(study, steps=plan.steps + study.num_stages, budget_s=None)
        assert make_plan(replace(longer, num_seeds=plan.num_seeds), timing, jobs=2).expected_s > 960


def test_what_seeds_can_show_is_said_beforehand():
    one, three = smallest_effect(1, START), smallest_effect(3, START)
    assert one.at_least is None
    assert three.sampling_deviation == pytest.approx(
        math.sqrt(1.5 * (0.5 * 0.5 / 50 + 0.8 * 0.2 / 50)) / 2
    )
    assert three.at_least == pytest.approx(three.deviations * three.sampling_deviation)
    said = " ".join(
        statement(study_of(num_seeds=3), TIMING, make_plan(study_of(num_seeds=3), TIMING, jobs=2))
    )
    assert "15 cells: 5 arms x 1 learning rate (0.001) x 3 seeds, each 2 updates" in said
    assert f"{three.at_least:.3f} in mean reward" in said


def test_pages_show_everything_and_escape_it(tmp_path):
    cells = sweep((0.9, 0.8), (0.7, 0.75))
    cells[-1] = replace(cells[-1], failure="DataError: <script>a|b</script>\nand more")
    result = published(cells, study_of(num_seeds=2))
    page = write_study_page(tmp_path / "report.html", result).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;a|b" in page
    assert "a &lt;CPU&gt;" in page
    assert page.count("<svg") == 3  # the mean, and two environments
    text = as_markdown(result)
    assert "<script" not in text
    assert "-0.000" not in text  # of a measure of which less is better, and there is none
    assert "&lt;script>a\\|b&lt;/script> and more" in text
    for table in text.split("### ")[1:]:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    for arm in Arm:
        assert text.count(arm.value) > 1
        assert arm.value in page


def test_the_documentation_s_page_is_filled_between_its_marks():
    result = published(sweep((0.9, 0.8), (0.7, 0.75)), study_of(num_seeds=2))
    text = "# T\n\n<!-- result -->\nNot measured yet.\n<!-- /result -->\nend\n"
    docs = STUDIES["rl"]
    assert "### The claim" in docs.filled(text, result)
    assert docs.filled(docs.filled(text, result), None) == text


def test_a_result_is_read_again_and_drawn(tmp_path):
    cells = sweep((0.9, 0.8), (0.7, 0.75))
    result = published(cells, study_of(num_seeds=2))
    write_json(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == (STUDIES["rl"], result)
    failed = [
        replace(done, failure="DivergenceError: nan") if done.cell.arm is Arm.REPLAY else done
        for done in cells
    ]
    for some, is_drawn in ((cells, True), (failed, False)):
        draw_simultaneous_rl(published(some, study_of(num_seeds=2)), tmp_path / "drawing.svg")
        drawn = (tmp_path / "drawing.svg").read_text()
        assert BLUE in drawn
        assert (GREEN in drawn) == is_drawn  # the colour of the arm with replay
